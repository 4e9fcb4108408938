"""A group commit of the journal as bytes, and back; what was damaged on the disk is noticed when it is read.

::

    chunk = length of the table, its digest | table: kind, head, sizes of frames, digest of frames | frames
    large frames: a value each, beside the chunk, written as they are instead of being copied into it

A disk that gives back other bytes than it was given must not become a decision: every byte that is read is under
a digest (XXH3, 64 bits), an event's frames under one of their own, so that one event is read without the others.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import xxhash

HEAD = struct.Struct(">QQ")  # bytes of the table, its digest
APART_BYTES = 128 << 10  # frames from here on are values of their own
ALIGNMENT = 64  # frames start at multiples, so that arrays in them are aligned
Row = tuple[str, dict[str, Any], list[int], int]  # kind, head, sizes of frames (-1: apart), digest of frames
Apart = Callable[[int, int], bytes | None]  # (event's number, frame's place) -> a large frame; None: it is gone


@dataclass(frozen=True)
class Event:
    """One thing that the broker was told or decided. ``frames`` are copies, safe to keep."""

    seq: int
    kind: str
    head: dict[str, Any]  # msgpack-able
    frames: list[bytes]


class DamagedChunk(ValueError):
    """A chunk, or an event in it, that is not what was written."""


def _digest(frames: Sequence[bytes | memoryview]) -> int:
    found = xxhash.xxh3_64()
    for frame in frames:
        found.update(frame)
    return found.intdigest()


def pack(events: Sequence[tuple[str, dict[str, Any], list[memoryview]]]) -> bytes:
    """A chunk of events: ``(kind, head, frames)`` each; it lacks the frames that :func:`apart` gives."""
    rows = [
        [kind, head, [-1 if f.nbytes >= APART_BYTES else f.nbytes for f in frames], _digest(frames)]
        for kind, head, frames in events
    ]
    table: bytes = msgpack.packb(rows)
    start = HEAD.size + len(table)
    parts: list[Any] = [HEAD.pack(len(table), xxhash.xxh3_64_intdigest(table)), table, b"\0" * (-start % ALIGNMENT)]
    for _, _, frames in events:
        for frame in frames:
            if frame.nbytes < APART_BYTES:
                parts += [frame, b"\0" * (-frame.nbytes % ALIGNMENT)]
    return b"".join(parts)


def apart(
    first: int, events: Sequence[tuple[str, dict[str, Any], list[memoryview]]]
) -> Iterator[tuple[int, int, memoryview]]:
    """``(event's number, frame's place, frame)`` of the large frames of events from number ``first`` on."""
    for seq, (_, _, frames) in enumerate(events, first):
        yield from ((seq, place, frame) for place, frame in enumerate(frames) if frame.nbytes >= APART_BYTES)


def table_of(first: int, chunk: memoryview) -> tuple[list[Row], int]:
    """A row for each event of the chunk that begins with number ``first``, and where the table ends.

    Raises :class:`DamagedChunk`.
    """
    if len(chunk) < HEAD.size:
        raise DamagedChunk(f"the events from {first} on are cut short")
    length, digest = HEAD.unpack(chunk[: HEAD.size])
    end = HEAD.size + length
    table = chunk[HEAD.size : end]
    if len(table) != length or xxhash.xxh3_64_intdigest(table) != digest:
        raise DamagedChunk(f"the events from {first} on are not what was written")
    return msgpack.unpackb(table, strict_map_key=False), end


def unpack(first: int, chunk: memoryview, large: Apart, only: int | None = None) -> Iterator[Event]:
    """The events of the chunk that begins with number ``first``, or ``only`` one; ``large`` has its large frames.

    Raises :class:`DamagedChunk`.
    """
    table, offset = table_of(first, chunk)
    offset += -offset % ALIGNMENT
    for seq, (kind, head, sizes, digest) in enumerate(table, first):
        wanted, frames = only is None or seq == only, []
        for place, size in enumerate(sizes):
            if wanted:
                frames.append(bytes(chunk[offset : offset + size]) if size >= 0 else large(seq, place) or b"")
            offset += size + (-size % ALIGNMENT) if size >= 0 else 0
        if wanted:
            if _digest(frames) != digest:
                raise DamagedChunk(f"event {seq} ({kind}) is not what was written")
            yield Event(seq, kind, head, frames)
