"""Sizes that sections reckon with."""

MEGABYTE = 1 << 20
BYTES_PER_TOKEN = 13  # of a queued trajectory: ids, flag, log q and version
BYTES_PER_ALTERNATIVE = 8  # id and log q
BYTES_PER_EXPERT = 2  # of an expert record
BYTES_BESIDE = 1 << 16  # of a message, beside a trajectory's tokens: header, names, blocks
BYTES_SERVED = 18  # a token of a shard without its expert record: ids, two flags, log q, log m and log p
BYTES_JOURNALED = 1.5  # written for a byte of trajectory: scores, tables and padding on top
BYTES_FROZEN = 4  # a token of one frozen model's scores, journaled and served


def bytes_per_token(alternatives: int, experts: int) -> int:
    """Of a trajectory, with as many of each recorded of a token."""
    return BYTES_PER_TOKEN + BYTES_PER_ALTERNATIVE * alternatives + BYTES_PER_EXPERT * experts
