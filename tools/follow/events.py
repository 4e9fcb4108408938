"""TensorBoard's event files, written without TensorBoard: two framings and three messages.

A file is records one after the other, each ``length u64 | crc of it | data | crc of it`` (TFRecord, little-endian,
CRC-32C masked as TensorFlow does). ``data`` is a protocol buffer ``Event`` with a ``Summary`` of values. The format
is frozen since TensorFlow 1; writing it takes fewer lines than either package that can takes megabytes.
"""

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MASK = 0xA282EAD8  # tensorflow/core/lib/hash/crc32c.h
POLYNOMIAL = 0x82F63B78  # CRC-32C, Castagnoli, reflected
FLOAT32_MOST = 3.4028234663852886e38
DT_STRING = 7  # tensorflow/core/framework/types.proto


@dataclass(frozen=True)
class Scalar:
    """One number."""

    tag: str
    value: float


@dataclass(frozen=True)
class Histogram:
    """``counts[i]`` values in ``(edges[i], edges[i + 1]]``."""

    tag: str
    edges: Sequence[float]
    counts: Sequence[float]


@dataclass(frozen=True)
class Words:
    """Markdown."""

    tag: str
    text: str


Value = Scalar | Histogram | Words


class EventFile:
    """One file in a directory of its run's; :meth:`write` is on disk with :meth:`flush`."""

    def __init__(self, path: Path, wall_s: float) -> None:
        """``wall_s``: Unix time at which it begins."""
        self.path = path
        self._file = path.open("wb")
        self._record(event(wall_s, 0, b"", version="brain.Event:2"))
        self.flush()

    def write(self, wall_s: float, step: int, values: Sequence[Value]) -> None:
        """Everything that one step says, as one event."""
        self._record(event(wall_s, step, summary(values)))

    def flush(self) -> int:
        """Everything is with the operating system now; returns the file's size, bytes."""
        self._file.flush()
        return self._file.tell()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()

    def _record(self, data: bytes) -> None:
        length = struct.pack("<Q", len(data))
        self._file.write(length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data)))


# ---- messages (tensorboard/compat/proto: event.proto, summary.proto, tensor.proto) ------------------


def event(wall_s: float, step: int, of_summary: bytes, version: str = "") -> bytes:
    """``Event``: wall_time = 1, step = 2, file_version = 3 or summary = 5."""
    what = _bytes(3, version.encode()) if version else _bytes(5, of_summary)
    return _double(1, wall_s) + _integer(2, step) + what


def summary(values: Sequence[Value]) -> bytes:
    """``Summary``: value = 1, repeated."""
    return b"".join(_bytes(1, _value(value)) for value in values)


def _value(value: Value) -> bytes:
    """``Summary.Value``: tag = 1, simple_value = 2, histo = 5, tensor = 8, metadata = 9."""
    tag = _bytes(1, value.tag.encode())
    match value:
        case Scalar():
            return tag + _key(2, 5) + struct.pack("<f", max(-FLOAT32_MOST, min(FLOAT32_MOST, value.value)))
        case Histogram():
            return tag + _bytes(5, _histogram(value))
        case Words():
            plugin = _bytes(1, _bytes(1, b"text"))  # SummaryMetadata.plugin_data.plugin_name
            shape = _bytes(2, _bytes(2, _integer(1, 1)))  # TensorProto.tensor_shape.dim.size: one string
            tensor = _integer(1, DT_STRING) + shape + _bytes(8, value.text.encode())
            return tag + _bytes(8, tensor) + _bytes(9, plugin)


def _histogram(value: Histogram) -> bytes:
    """``HistogramProto``: min = 1, max, num, sum, sum_squares, bucket_limit = 6, bucket = 7, the two packed doubles.

    Sums are taken at the middles of the bins, which is exact for integers between half-integer edges.
    """
    edges, counts = value.edges, value.counts
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    known = [middle for middle, count in zip(middles, counts, strict=True) if count] or [0.0]
    total = sum(middle * count for middle, count in zip(middles, counts, strict=True))
    squares = sum(middle * middle * count for middle, count in zip(middles, counts, strict=True))
    head = (min(known), max(known), float(sum(counts)), float(total), float(squares))
    limits, buckets = [edges[0], *edges[1:]], [0.0, *counts]
    return b"".join(_double(number, figure) for number, figure in enumerate(head, 1)) + b"".join(
        _bytes(number, struct.pack(f"<{len(figures)}d", *figures)) for number, figures in ((6, limits), (7, buckets))
    )


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are ten bytes long
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _integer(number: int, value: int) -> bytes:
    return _key(number, 0) + _varint(value)


def _double(number: int, value: float) -> bytes:
    return _key(number, 1) + struct.pack("<d", value)


def _bytes(number: int, value: bytes) -> bytes:
    return _key(number, 2) + _varint(len(value)) + value


# ---- CRC-32C ------------------------------------------------------------------------------------


def _table() -> tuple[int, ...]:
    found = []
    for byte in range(256):
        rest = byte
        for _ in range(8):
            rest = rest >> 1 ^ (POLYNOMIAL if rest & 1 else 0)
        found.append(rest)
    return tuple(found)


TABLE = _table()


def masked_crc(data: bytes) -> int:
    """As TFRecords carry it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF
