"""A process that grades one answer after another for :class:`actor.tasks.grading.Graders`.

::

    python -m actor.tasks.gradeworker math
        {"references": ["1/2"], "answer": "\\boxed{0.5}"}                        -> {"read": true, "correct": true}
    python -m actor.tasks.gradeworker gym
        {"name": ..., "params": JSON, "entry": Python literals, "answer": ...}  -> {"score": 1.0}

Every request says after how many ``seconds`` the process kills itself. JSON lines on the socket that
is its standard input. An answer that makes a verifier raise has failed. Memory is bounded: who runs
out of it ends without a verdict, and one that verifiers have filled half of it says so (``spent``),
to be replaced before that can happen to an answer that is innocent.
"""

import ast
import functools
import importlib
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 2 << 30  # of address space: sympy and what it needs take a quarter of it
SPENT_BYTES = MEMORY_BYTES // 2  # latex2sympy's parser keeps something of every new kind of answer, for ever
REFERENCES_KEPT = 4096
ENTRIES_KEPT = 64  # siblings come soon after one another


def grade_math(request: dict[str, Any]) -> dict[str, Any]:
    """By math-verify, without its own timeouts: they are signals that cannot interrupt a long multiplication."""
    from math_verify import verify

    try:
        given = _parse(request["answer"])
        correct = bool(given) and any(
            verify(_reference(wanted), given, timeout_seconds=None) for wanted in request["references"]
        )
    except MemoryError:  # which says nothing of the answer
        raise
    except Exception:  # noqa: BLE001  # sympy raises whatever it likes
        return {"read": False, "correct": False}
    return {"read": bool(given), "correct": correct}


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    return list(parse(text, parsing_timeout=None))


@functools.lru_cache(maxsize=REFERENCES_KEPT)
def _reference(text: str) -> list[Any]:
    return _parse(f"\\boxed{{{text}}}")


def grade_gym(request: dict[str, Any]) -> dict[str, Any]:
    """By the data set's own verifier, as :mod:`actor.tasks.gymrules` lets it."""
    from actor.tasks.gymrules import score

    dataset = _dataset(request["name"], request["params"])
    return {"score": score(dataset, request["name"], request["answer"], _entry(request["entry"]))}


@functools.lru_cache(maxsize=8)
def _dataset(name: str, params: str) -> Any:
    from actor.tasks.gymrules import make_dataset, take_away_eval

    take_away_eval()
    return make_dataset(name, json.loads(params), size=1, seed=0)


@functools.lru_cache(maxsize=ENTRIES_KEPT)
def _entry(literals: str) -> Any:
    return ast.literal_eval(literals)


GRADE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"math": grade_math, "gym": grade_gym}


def prepare(kind: str) -> None:
    """Load what is needed, which takes a second or two, before any deadline runs."""
    if kind == "math":
        grade_math({"references": ["1"], "answer": "\\boxed{1}"})
    else:
        importlib.import_module("reasoning_gym")


def is_spent() -> bool:
    """Whether there may not be memory for another answer."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split(maxsplit=1)[0]) * resource.getpagesize() > SPENT_BYTES


def main(kind: str) -> None:
    """Until the other end is closed."""
    logging.disable(logging.CRITICAL)  # math-verify says at every call that it has no timeout
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    channel = socket.socket(fileno=os.dup(0))
    prepare(kind)
    channel.sendall(b"{}\n")
    with channel.makefile("rb") as lines:
        for line in lines:
            request = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, request["seconds"])  # the signal's own action ends the process
            try:
                verdict = GRADE[kind](request)
            except MemoryError:
                os._exit(1)  # a fresh process may grade it
            signal.setitimer(signal.ITIMER_REAL, 0)
            channel.sendall(json.dumps({**verdict, "spent": is_spent()}).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1])
