"""Frames in and out of a ZeroMQ socket, within bounds; what the broker's end and a peer's have in common."""

from typing import Any

import zmq

from common.errors import WireError

HIGH_WATER_MARK = 1000  # messages a socket buffers; beyond it sends wait in the outbox
MAX_MESSAGE_BYTES = 1 << 30  # where broker.max_message_mb is not given
FRAME_OVERHEAD = 256  # bytes that encryption adds to a frame, and more
LINGER_MS = 500  # how long a closing socket tries to deliver
ZERO_COPY_BYTES = 64 * 1024


def count_bytes(frames: list[Any]) -> int:
    """Of all frames."""
    return sum(memoryview(f).nbytes for f in frames)


def check_size(message: Any, frames: list[Any], limit: int) -> int:
    """Bytes of ``frames``; raises :class:`WireError` beyond ``limit``."""
    nbytes = count_bytes(frames)
    if nbytes > limit:
        raise WireError(
            f"{message.TAG} of {nbytes} bytes exceeds the {limit} that one message may have; raise "
            "broker.max_message_mb for every process"
        )
    return nbytes


def receive_frames(socket: zmq.Socket[bytes], max_frames: int, limit: int) -> tuple[list[zmq.Frame], str]:
    """One message's frames, or the first alone and what is wrong with the rest. Raises zmq.Again if none is there."""
    frames: list[zmq.Frame] = []
    count, nbytes, more = 0, 0, True
    while more:
        frame = socket.recv(flags=zmq.NOBLOCK, copy=False)
        more = frame.more
        count += 1
        nbytes += len(frame)
        if count <= max_frames and nbytes <= limit:
            frames.append(frame)
        else:
            del frames[1:]
    if count > max_frames:
        return frames, f"message of {count} frames exceeds {max_frames}"
    if nbytes > limit:
        return frames, f"message of {nbytes} bytes exceeds the {limit} of broker.max_message_mb"
    return frames, ""


def send_frames(socket: zmq.Socket[bytes], frames: list[Any]) -> None:
    """Large ones are not copied. Raises zmq.Again if the socket takes no more."""
    large = any(memoryview(f).nbytes >= ZERO_COPY_BYTES for f in frames)
    socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=not large)
