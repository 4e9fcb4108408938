"""Messages to frames and back: a msgpack header, then raw array bytes.

::

    encode(message) -> [header, payload...]      decode(frames) -> message

The header is ``{"w": WIRE_VERSION, "t": tag, "h": {plain fields}, "a": [[name, dtype, shape,
frame, offset], ...]}``. Arrays of a small message share one payload frame (fewer frames are
faster), long ones of a large one get a frame each and are sent without a copy. Decoding copies
nothing: arrays are read-only views of the received frames. Nothing is ever unpickled.

What arrives may be hostile. Refusing costs no more than reading the bytes: a header is walked
before anything is made of it, arrays must fill their frames (a view keeps its whole frame in
memory), and what an error quotes is short.
"""

import dataclasses
import reprlib
import types
import typing
from collections.abc import Sequence
from functools import cache
from itertools import islice
from typing import Any, ClassVar, Protocol

import msgpack
import numpy as np

from common.errors import WireError

WIRE_VERSION = 5
JOIN_BELOW_BYTES = 64 * 1024  # arrays of smaller messages share one frame
OWN_FRAME_BYTES = 8 * 1024  # of an array in a larger message; smaller ones share a frame with their neighbours
ALIGNMENT = 8
MAX_HEADER_BYTES = 4 << 20  # the largest is a Publish: 70 bytes a tensor, 18,000 tensors for Qwen3-30B-A3B
HEAVY_FROM_BYTES = 4096  # longer headers may be no more than a quarter lists and maps: empty ones are 64 times dearer
MAX_ARRAYS = 64
MAX_FRAMES = 1 + MAX_ARRAYS
MAX_DEPTH = 4  # of lists and maps in a field annotated Any
INT_BOUND = 1 << 63
_NO_ROW = (None,) * 5
_FRAMES = "_frames"  # of a decoded message: what it came as
_HEAVY = np.isin(np.arange(256), [*range(0x80, 0xA0), *range(0xC7, 0xCA), *range(0xD4, 0xD9), *range(0xDC, 0xE0)])


class Message(Protocol):
    """What the codec carries: a dataclass with a tag and a check of its own contents."""

    TAG: ClassVar[str]

    def check(self) -> None:
        """Raise :class:`common.errors.DataError` where fields contradict each other."""


def array(dtype: str, ndim: int, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that travels as raw bytes: little-endian ``dtype``, exactly ``ndim`` axes.

    ``default`` is for constructors alone: on the wire the array is always there.
    """
    metadata = {"dtype": np.dtype(dtype).newbyteorder("<").str, "ndim": ndim}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class _Layout:
    arrays: dict[str, tuple[str, int]]  # name -> dtype, axes
    plain: dict[str, Any]  # name -> annotation
    rows: list[tuple[str, str, int, Any, int]]  # of the arrays, in order: name, dtype, axes, dtype, bytes an item


@cache
def _layout(kind: Any) -> _Layout:
    hints = typing.get_type_hints(kind)
    arrays, plain = {}, {}
    for f in dataclasses.fields(kind):
        if "dtype" in f.metadata:
            arrays[f.name] = (f.metadata["dtype"], f.metadata["ndim"])
        else:
            plain[f.name] = hints[f.name]
    rows = [(name, dtype, ndim, np.dtype(dtype), np.dtype(dtype).itemsize) for name, (dtype, ndim) in arrays.items()]
    return _Layout(arrays, plain, rows)


def encode(message: Any) -> list[Any]:
    """Frames of ``message``: bytes and array memory, ready for ``send_multipart(copy=False)``.

    What UTF-8 cannot say, lone surrogates that foreign code put into an error's text, is escaped.
    """
    kind: Any = type(message)
    layout = _layout(kind)
    plain = {name: getattr(message, name) for name in layout.plain}
    arrays = {}
    for name, _, ndim, kind_of_items, _ in layout.rows:
        value = np.ascontiguousarray(getattr(message, name), kind_of_items)
        if value.ndim != ndim:
            raise WireError(f"{message.TAG}.{name}: has shape {value.shape}, needs {ndim} axes")
        arrays[name] = value
    own_frame = OWN_FRAME_BYTES if sum(a.nbytes for a in arrays.values()) >= JOIN_BELOW_BYTES else JOIN_BELOW_BYTES
    table: list[list[Any]] = []
    payload: list[Any] = []
    pieces: list[bytes] = []  # of the frame that small arrays share
    offset = 0
    for name, value in arrays.items():
        alone = value.nbytes >= own_frame
        if alone and pieces:
            payload.append(b"".join(pieces))
            pieces, offset = [], 0
        table.append([name, value.dtype.str, list(value.shape), len(payload), offset])
        if alone:
            payload.append(value.reshape(-1).view(np.uint8).data)
        else:
            padding = -value.nbytes % ALIGNMENT
            pieces += [value.tobytes(), b"\0" * padding]
            offset += value.nbytes + padding
    if pieces:
        payload.append(b"".join(pieces))
    fields = {"w": WIRE_VERSION, "t": message.TAG, "h": plain, "a": table}
    header = msgpack.packb(fields, unicode_errors="backslashreplace")
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(f"{message.TAG}: header of {len(header)} bytes exceeds {MAX_HEADER_BYTES}")
    return [header, *payload]


def frames_of(message: Any) -> list[Any]:
    """What ``message`` was decoded from, or if it was made here what :func:`encode` makes of it.

    A decoded message is not to be changed: ``dataclasses.replace`` makes another.
    """
    found: list[Any] | None = message.__dict__.get(_FRAMES)
    return encode(message) if found is None else found


def decode(frames: Sequence[Any], kinds: dict[str, type[Any]]) -> Any:
    """The message in ``frames``, one of ``kinds`` by tag; arrays are read-only views of the frames.

    Raises :class:`WireError` naming what is wrong; :meth:`Message.check` may raise
    :class:`common.errors.DataError`.
    """
    head = _header(frames)
    kind: Any = kinds.get(head["t"])
    if kind is None:
        raise WireError(f"message {_short(head['t'])} is not expected here; expected one of {', '.join(sorted(kinds))}")
    layout = _layout(kind)
    values = _plain_fields(head["t"], head["h"], layout)
    values.update(_array_fields(head["t"], head["a"], frames[1:], layout))
    message = kind(**values)
    message.check()
    message.__dict__[_FRAMES] = list(frames)
    return message


def _short(value: Any) -> str:
    """``value`` for an error message; the sender may have made it long or deep."""
    return reprlib.repr(value)


def _header(frames: Sequence[Any]) -> dict[str, Any]:
    if not frames:
        raise WireError("empty message")
    if len(frames) > MAX_FRAMES:
        raise WireError(f"message of {len(frames)} frames exceeds {MAX_FRAMES}")
    raw = memoryview(frames[0])
    if raw.nbytes > MAX_HEADER_BYTES:
        raise WireError(f"header of {raw.nbytes} bytes exceeds {MAX_HEADER_BYTES}")
    if raw.nbytes > HEAVY_FROM_BYTES and 4 * int(_HEAVY[np.frombuffer(raw, np.uint8)].sum()) > raw.nbytes:
        raise WireError(f"header of {raw.nbytes} bytes is more structure than content")
    try:
        # Walks without making objects: lists that declare more than the bytes can hold would be allocated otherwise.
        walker = msgpack.Unpacker(max_buffer_size=MAX_HEADER_BYTES)
        walker.feed(raw)
        walker.skip()
        head = msgpack.unpackb(raw, strict_map_key=False)
    except Exception as error:  # msgpack raises half a dozen unrelated types on bad bytes
        what = str(error) or type(error).__name__
        raise WireError(f"header is not msgpack: {what[:200]}") from error
    if not isinstance(head, dict) or set(head) != {"w", "t", "h", "a"}:
        raise WireError("header must be a map of w, t, h and a")
    if head["w"] != WIRE_VERSION:
        raise WireError(
            f"wire version {_short(head['w'])}, this process speaks {WIRE_VERSION}; run the same croupier on both ends"
        )
    if not isinstance(head["t"], str) or not isinstance(head["h"], dict) or not isinstance(head["a"], list):
        raise WireError("header fields have the wrong types")
    return head


def _plain_fields(tag: str, given: dict[str, Any], layout: _Layout) -> dict[str, Any]:
    if set(given) != set(layout.plain):
        odd = ", ".join(sorted(_short(name) for name in islice(set(given) ^ set(layout.plain), 8)))
        raise WireError(f"{tag}: fields {odd} are missing or unknown")
    for name, annotation in layout.plain.items():
        if not _matches(given[name], annotation):
            raise WireError(f"{tag}.{name}: {_short(given[name])} is not {annotation}")
    return dict(given)


def _matches(value: Any, annotation: Any) -> bool:
    if annotation is Any:
        return _is_plain(value, MAX_DEPTH)
    origin = typing.get_origin(annotation)
    if origin is list:
        (item,) = typing.get_args(annotation)
        return isinstance(value, list) and all(_matches(v, item) for v in value)
    if origin is dict:
        key, item = typing.get_args(annotation)
        return isinstance(value, dict) and all(_matches(k, key) and _matches(v, item) for k, v in value.items())
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, a) for a in typing.get_args(annotation))
    if annotation is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool) and -INT_BOUND <= value < INT_BOUND
    return isinstance(value, annotation)


def _is_plain(value: Any, depth: int) -> bool:
    """Scalars, and lists and maps of them, nested at most ``depth`` deep."""
    if isinstance(value, list):
        return depth > 0 and all(_is_plain(v, depth - 1) for v in value)
    if isinstance(value, dict):
        return depth > 0 and all(isinstance(k, str) and _is_plain(v, depth - 1) for k, v in value.items())
    if isinstance(value, int):
        return -INT_BOUND <= value < INT_BOUND
    return value is None or isinstance(value, float | str)


def _array_fields(tag: str, table: list[Any], payload: Sequence[Any], layout: _Layout) -> dict[str, Any]:
    if len(table) != len(layout.rows):
        raise _other_arrays(tag, layout)
    values: dict[str, Any] = {}
    buffers = [memoryview(frame).toreadonly() for frame in payload]
    sizes = [buffer.nbytes for buffer in buffers]
    frames = len(sizes)
    last, end = -1, 0  # the frame of the array before, and where that array ends
    for row, (name, dtype, ndim, kind, itemsize) in zip(table, layout.rows, strict=True):
        named, said, shape, frame, offset = row if type(row) is list and len(row) == 5 else _NO_ROW
        if (named != name or said != dtype or type(frame) is not int or not 0 <= frame < frames) or (
            type(offset) is not int or type(shape) is not list or len(shape) != ndim
        ):
            raise _odd_row(tag, row, name, dtype, ndim, frames, layout)
        count = 1
        for n in shape:
            if type(n) is not int or not 0 <= n < INT_BOUND:
                raise _odd_row(tag, row, name, dtype, ndim, frames, layout)
            count *= n
        if frame != last or offset != end + -end % ALIGNMENT:
            if frame != last + 1 or offset:
                raise WireError(f"{tag}.{name}: frame {frame} at {offset} does not follow the array before it")
            _check_filled(tag, sizes, last, end)
        end = offset + count * itemsize
        if end > sizes[frame]:
            raise WireError(
                f"{tag}.{name}: shape {shape} needs {end - offset} bytes at {offset}, the frame has {sizes[frame]}"
            )
        try:
            view = np.frombuffer(buffers[frame], kind, count, offset)
            values[name] = view if ndim == 1 else view.reshape(shape)
        except (ValueError, OverflowError) as error:  # an empty array whose other axis no memory could hold
            raise WireError(f"{tag}.{name}: shape {shape} cannot be: {error}") from error
        last = frame
    _check_filled(tag, sizes, last, end)
    if last + 1 != frames:
        raise WireError(f"{tag}: {frames} payload frames, the arrays need {last + 1}")
    return values


def _other_arrays(tag: str, layout: _Layout) -> WireError:
    return WireError(f"{tag}: arrays must be exactly {', '.join(layout.arrays) or 'none'}, in this order")


def _odd_row(tag: str, row: Any, name: str, dtype: str, ndim: int, frames: int, layout: _Layout) -> WireError:
    """Why ``row`` is not ``[name, dtype, shape, frame, offset]`` of the array that comes next in ``layout``."""
    if type(row) is not list or not row or row[0] != name:
        return _other_arrays(tag, layout)
    if len(row) != 5:
        return WireError(f"{tag}: array entry {_short(row)} is malformed")
    _, said, shape, frame, offset = row
    if said != dtype:
        return WireError(f"{tag}.{name}: dtype {_short(said)}, needs {dtype!r}")
    if type(frame) is int and type(offset) is int and 0 <= frame < frames:
        return WireError(f"{tag}.{name}: shape {_short(shape)}, needs {ndim} axes of 0 to {INT_BOUND - 1}")
    return WireError(
        f"{tag}.{name}: frame {_short(frame)} at {_short(offset)} is not in the message of {frames} payload frames"
    )


def _check_filled(tag: str, sizes: list[int], frame: int, end: int) -> None:
    """A frame stays in memory as long as any array in it, so it holds nothing else."""
    if frame >= 0 and sizes[frame] - end >= ALIGNMENT:
        raise WireError(f"{tag}: payload frame {frame} has {sizes[frame]} bytes, its arrays end at {end}")
