"""Where reasoning-gym's verifiers (0.1.25) are kept from harm and from being fooled.

Some pass the policy's text to ``eval``, directly or through sympy: the first lose their ``eval``, the
others are shown arithmetic alone. Some give full marks for wrong answers: what they let pass is
checked once more. All run in a process of their own, see :mod:`actor.tasks.grading`.
"""

import ast
import importlib
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

CORRECT_FROM = 0.9999  # every reference answer scores 1; one wrong cell of a hundred scores .99
READ_BY_SYMPY = (
    "countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"
)  # fmt: skip
EVALUATING = (
    "algorithmic.binary_matrix",
    "games.n_queens",
    "algorithmic.spiral_matrix",
    "algorithmic.string_insertion",
)
_FUNCTIONS = (
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh",
    "atanh", "exp", "log", "ln", "sqrt", "Abs", "abs", "pi",
)  # fmt: skip
_ARITHMETIC = re.compile(r"[\w\s+\-*/^().,=|×÷·−]*")
_ATTRIBUTE = re.compile(r"\.\s*[^\W\d]|__")


def make_dataset(name: str, params: dict[str, Any], size: int, seed: int) -> Any:
    """The data set. Raises TypeError, ValueError or AssertionError for parameters that it does not take."""
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec

    if name == "composite" and isinstance(params.get("datasets"), list):
        params = {**params, "datasets": [DatasetSpec(**{"weight": 1.0, "config": {}, **d}) for d in params["datasets"]]}
    return reasoning_gym.create_dataset(name, size=size, seed=seed, **params)


def take_away_eval() -> None:
    """In this process, verifiers that evaluate an answer read Python literals and nothing else."""
    for name in EVALUATING:
        importlib.import_module(f"reasoning_gym.{name}").eval = ast.literal_eval  # type: ignore[attr-defined]


def is_arithmetic(text: str) -> bool:
    """Whether sympy may evaluate ``text``: numbers, variables of one letter, known functions and operators."""
    if not _ARITHMETIC.fullmatch(text) or _ATTRIBUTE.search(text):
        return False
    return all(len(word) == 1 or word in _FUNCTIONS for word in re.findall(r"[^\W\d]\w*", text))


def score(dataset: Any, name: str, answer: str, entry: dict[str, Any]) -> float:
    """What ``answer`` is worth, in [0, 1]; one that the verifier cannot read is worth nothing.

    Raises MemoryError.
    """
    name = str(entry.get("metadata", {}).get("source_dataset", name))
    if name in READ_BY_SYMPY and not is_arithmetic(answer):
        return 0.0
    try:
        found = float(dataset.score_answer(answer, entry))
        if not math.isfinite(found) or (found >= CORRECT_FROM and name in _CHECKS and not _CHECKS[name](answer, entry)):
            return 0.0
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  # verifiers raise for answers that they did not expect
        return 0.0
    return found


def as_literal(entry: dict[str, Any]) -> str:
    """``entry`` as Python literals, for another process; numpy's numbers and words become Python's."""
    return repr(_plain(entry))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(_plain(one) for one in value)
    return value.item() if hasattr(value, "item") else value


# ---- what would pass though it is wrong ---------------------------------------------------------


def _same_word(answer: str, entry: dict[str, Any]) -> bool:
    """The verifier compares the truth values of two strings."""
    return answer.strip().casefold() == str(entry["answer"]).casefold()


def _same_probability(answer: str, entry: dict[str, Any]) -> bool:
    """The verifier gives ``0`` full marks for agreeing with the first character of ``0.2344``."""
    return abs(float(Fraction(answer.replace(",", ""))) - float(Fraction(entry["answer"]))) <= 1e-4


def _is_number(answer: str, _entry: dict[str, Any]) -> bool:
    """The verifier's ``min(1.0, nan)`` is 1."""
    return "nan" not in answer.casefold()


def _uses_the_numbers(answer: str, entry: dict[str, Any]) -> bool:
    """The verifier takes any four numbers."""
    return sorted(map(int, re.findall(r"\d+", answer))) == sorted(map(int, entry["metadata"]["numbers"]))


def _same_words(answer: str, entry: dict[str, Any]) -> bool:
    """The verifier takes the answer with anything behind it, twice itself even."""
    return answer.casefold().split() == str(entry["answer"]).casefold().split()


_CHECKS: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "game_of_life_halting": _same_word,
    "coin_flip": _same_probability,
    "complex_arithmetic": _is_number,
    "puzzle24": _uses_the_numbers,
    "spell_backward": _same_words,
    "letter_jumble": _same_words,
}
