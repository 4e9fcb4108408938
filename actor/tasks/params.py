"""A task's own parameters, read and refused with the remedy."""

import math
from dataclasses import replace
from typing import Any

from actor.sandbox.box import Limits
from common.errors import TaskError
from common.near import suggest


def read_number(params: dict[str, Any], name: str, default: float, least: float, most: float) -> float:
    """``task.params.<name>``, a number in [least, most]. Raises TaskError for anything else."""
    value = params.get(name, default)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not least <= value <= most:
        raise TaskError(f"task.params.{name}={value!r}: must be a number in [{least:g}, {most:g}]")
    return value  # type: ignore[no-any-return]


def read_limits(params: dict[str, Any], usual: Limits) -> Limits:
    """``usual`` with ``task.params.wall_s``, ``.cpu_s`` and ``.memory_mb`` of one run in the sandbox."""
    return replace(
        usual,
        wall_s=read_number(params, "wall_s", usual.wall_s, 0.1, 600),
        cpu_s=read_number(params, "cpu_s", usual.cpu_s, 0.1, 600),
        memory_mb=int(read_number(params, "memory_mb", usual.memory_mb, 32, 1 << 16)),
    )


def read_names(params: dict[str, Any], name: str, known: tuple[str, ...]) -> list[str]:
    """``task.params.<name>``, some of ``known``; all of them if it is not given. Raises TaskError for anything else."""
    given = params.get(name, list(known))
    if not isinstance(given, list) or not given:
        raise TaskError(f"task.params.{name}={given!r}: must be a list of names; known: {', '.join(known)}")
    for one in given:
        if one not in known:
            raise TaskError(f"task.params.{name}: there is no {one!r}; {suggest(str(one), known)}")
    return given
