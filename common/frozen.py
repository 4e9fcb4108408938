"""Frozen models that score tokens beside the policy: a reference for ``loss.kl``, teachers for ``loss.distill``.

::

    reference: {path: DIR}            teachers: {NAME: {path: DIR, tasks: [LABEL, ...]}}

Each is a process of its own (``python -m learner.score RUN.yaml --serves NAME``), the policy replica's
program without new weights. A teacher is bound to the prompts of its tasks (algorithms.md 3.6).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.objective import require

POLICY = ""  # what a scorer serves that is no frozen model: the newest weights
REFERENCE = "reference"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
RESERVED = ("policy", REFERENCE)


@dataclass(frozen=True)
class ReferenceSection:
    """The model that ``loss.kl`` holds the policy to; nothing is started while that is 0."""

    path: str = ""  # a Hugging Face directory; empty: model.path, the policy as it began
    count: int = 1  # processes of it

    def __post_init__(self) -> None:
        """Validate."""
        require(self.count >= 1, "reference.count", self.count, "must be at least 1; set loss.kl=0 to do without")


@dataclass(frozen=True)
class TeacherEntry:
    """One teacher of ``loss.distill``; nothing is started while that is 0."""

    path: str = ""  # a Hugging Face directory with the policy's tokenizer
    tasks: tuple[str, ...] = ()  # labels of the tasks that it teaches; empty: every one
    count: int = 1  # processes of it


@dataclass(frozen=True)
class FrozenModel:
    """A frozen model that the run needs."""

    name: str  # that its scorers say they serve
    key: str  # of the YAML, which says where it lies
    path: str
    count: int
    tasks: tuple[int, ...] | None = None  # numbers of the tasks whose tokens it scores; None: all

    @property
    def words(self) -> str:
        """For people."""
        return words_of(self.name)

    @property
    def role(self) -> str:
        """What its processes are called, before their numbers."""
        return self.name if self.name == REFERENCE else f"teacher-{self.name}"

    def process(self, index: int) -> str:
        """The name of its process ``index``, under which it speaks to the broker."""
        return f"{self.role}-{index}"


def words_of(scorer: str) -> str:
    """A scorer's kind and name, for people."""
    if scorer == POLICY:
        return "a policy replica"
    return "a reference model" if scorer == REFERENCE else f"teacher {scorer}"


def command_of(scorer: str) -> str:
    """What starts a process that serves ``scorer``."""
    return "python -m learner.score RUN.yaml" + (f" --serves {scorer}" if scorer else "")


def check_teachers(teachers: Mapping[str, TeacherEntry], labels: Sequence[str]) -> None:
    """Raise :class:`ConfigError` for a teacher that cannot be; ``labels`` are those of the run's tasks."""
    taught: dict[str, str] = {}
    for name, teacher in teachers.items():
        key = f"teachers.{name}"
        require(
            NAME.fullmatch(name) is not None and name not in RESERVED,
            key,
            name,
            "a teacher's name names a process: A-Z a-z 0-9 _ -, 64 at most, and neither policy nor reference",
        )
        require(bool(teacher.path), f"{key}.path", teacher.path, "needs the teacher's Hugging Face directory")
        require(teacher.count >= 1, f"{key}.count", teacher.count, "must be at least 1; remove the teacher instead")
        for label in teacher.tasks or labels:
            require(
                label in labels,
                f"{key}.tasks",
                list(teacher.tasks),
                f"this run has no task {label!r}; it has {', '.join(labels)}",
            )
            require(
                label not in taught,
                f"{key}.tasks",
                list(teacher.tasks),
                f"task {label!r} has a teacher already, {taught.get(label)}; each task has one at most, and a teacher "
                "without tasks takes them all",
            )
            taught[label] = name
