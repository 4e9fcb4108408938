"""Rewards beyond the task's own verifier: reward models, gates, normalisation (algorithms.md 3.5).

::

    channels of a rollout = the task's (rule) + one for each of reward.models (orm, grm)
    reward = sum over channels c of  task.reward_weights[c] * normalised(c), 0 where c's gate is shut

Actor and broker read the same section: the first makes the channels, the second mixes them.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

import numpy as np

from common.errors import ConfigError
from common.near import suggest
from common.objective import require

Normalise = Literal["none", "group", "task_batch", "task_running"]
MAX_MODELS = 16  # each has counters in an actor's heartbeat
PORTS = {"http": 80, "https": 443}
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


@dataclass(frozen=True)
class RewardModelEntry:
    """One reward model; its name in ``reward.models`` is its channel's."""

    kind: Literal["orm", "grm"] = "orm"  # outcome: a classifier that scores the text; generative: a judge that writes
    path: str = ""  # orm: directory of a sequence-classification checkpoint that the actor runs itself
    url: str = ""  # orm: the endpoint, whole; grm: the base of an OpenAI-compatible API, http://HOST:PORT/v1
    protocol: Literal["sglang", "vllm", "scores"] = "sglang"  # orm over HTTP: what is posted and answered
    tokenizer: str = ""  # orm over HTTP: directory whose chat template writes the text; plain text without one
    label: int = 0  # orm: which of its outputs is the reward
    squash: Literal["none", "sigmoid"] = "none"  # orm: of that output
    batch: int = 16  # orm: texts scored together
    threads: int = 1  # orm in the actor: of its matrix products
    model: str = ""  # as the server calls it
    api_key_env: str = ""  # name of an environment variable
    rubric: str = ""  # grm: what is judged and how; or a file with it, as file:PATH
    scale: tuple[float, float] = (1.0, 10.0)  # grm: the judge's worst and best score, which become 0 and 1
    samples: int = 1  # grm: judgements of one answer, averaged
    temperature: float = 0.0  # grm
    max_tokens: int = 1024  # grm: of a judgement
    references: int = 2  # grm: exemplars shown to it at most (reward.exemplars)
    retries: int = 2  # of one request, and of one judgement that cannot be read
    timeout_s: float = 60.0  # of one request
    concurrency: int = 8  # requests at once
    down_after: int = 5  # failures in a row after which it is left alone for a while
    probe_s: float = 30.0  # that while
    on_failure: Literal["exclude", "neutral"] = "exclude"  # of a rollout without its score: no sibling, or no channel

    @property
    def port(self) -> int:
        """Of ``url``; 0 if it names none that could be."""
        try:
            parts = urlsplit(self.url)
            known = PORTS.get(parts.scheme, 0) if parts.hostname else 0
            return known and (known if parts.port is None else parts.port)
        except ValueError:
            return 0

    def check(self, name: str) -> None:
        """Raise :class:`ConfigError` naming ``reward.models.<name>`` unless this can be run."""
        key = f"reward.models.{name}"
        require(NAME.fullmatch(name) is not None, "reward.models", name, "needs a plain name of letters and digits")
        if self.kind == "grm":
            require(not self.path, f"{key}.path", self.path, "a generative model is served elsewhere; set url")
            require(bool(self.model), f"{key}.model", self.model, "name the judge as its server does")
            require(
                self.samples == 1 or self.temperature > 0,
                f"{key}.samples",
                self.samples,
                "greedy judgements are all alike; set it to 1 or temperature above 0",
            )
            require(bool(self.rubric.strip()), f"{key}.rubric", self.rubric, "say what is judged, or file:PATH")
        else:
            require(
                bool(self.path) != bool(self.url),
                f"{key}.path",
                self.path,
                "an outcome reward model is either a directory (path) or an endpoint (url)",
            )
        remote = self.kind == "grm" or bool(self.url)
        require(not remote or self.port > 0, f"{key}.url", self.url, "must read http://HOST:PORT/PATH")
        parts = urlsplit(self.url)
        require(
            parts.password is None,
            f"{key}.url",
            f"{parts.scheme}://…@{parts.hostname}",
            "holds a password; set api_key_env to the name of an environment variable that does",
        )
        require(
            not self.api_key_env or NAME.fullmatch(self.api_key_env) is not None,
            f"{key}.api_key_env",
            f"{self.api_key_env[:4]}…",
            "is the name of an environment variable, never a key",
        )
        low, high = self.scale
        require(
            math.isfinite(low) and math.isfinite(high) and low < high,
            f"{key}.scale",
            self.scale,
            "must be the worst and the best score",
        )
        for field_name, least, most in (
            ("label", 0, 10_000), ("batch", 1, 1024), ("threads", 1, 1024), ("samples", 1, 64),
            ("temperature", 0, 10), ("max_tokens", 1, 1e6), ("references", 0, 64), ("retries", 0, 100),
            ("timeout_s", 0.01, 1e5), ("concurrency", 1, 4096), ("down_after", 1, 1e6), ("probe_s", 0.01, 1e5),
        ):  # fmt: skip
            value = getattr(self, field_name)
            require(least <= value <= most, f"{key}.{field_name}", value, f"must lie in [{least:g}, {most:g}]")

    def read_key(self, name: str) -> str:
        """The API key, "" where none is wanted. Raises :class:`ConfigError` if its variable is not set."""
        key = os.environ.get(self.api_key_env, "") if self.api_key_env else ""
        if self.api_key_env and not key:
            raise ConfigError(
                f"reward.models.{name}.api_key_env={self.api_key_env}: this environment variable is not set; export it "
                "where the actors start"
            )
        return key

    def read_rubric(self, name: str) -> str:
        """The rubric's text. Raises :class:`ConfigError` if it is in a file that cannot be read or is empty."""
        if not self.rubric.startswith("file:"):
            return self.rubric.strip()
        file = Path(self.rubric.removeprefix("file:"))
        try:
            text = file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"reward.models.{name}.rubric={self.rubric!r}: {error}; correct the path") from error
        require(bool(text), f"reward.models.{name}.rubric", self.rubric, "the file is empty; say what is judged")
        return text


@dataclass(frozen=True)
class GateEntry:
    """A channel that counts only where another says so."""

    where: str = "correct"
    at_least: float = 0.5


@dataclass(frozen=True)
class RewardSection:
    """What is done with reward channels; ``task.reward_weights`` says how much each counts."""

    models: dict[str, RewardModelEntry] = field(default_factory=dict)  # channel -> who makes it
    normalise: Normalise = "none"  # z scores of a channel within a group, a step, or all steps so far; task by task
    normalise_by: dict[str, str] = field(default_factory=dict)  # channels that are treated otherwise
    memory: float = 0.99  # task_running: what of its statistics is kept from one step to the next
    gate: dict[str, GateEntry] = field(default_factory=dict)  # channel -> where it counts
    deadline_s: float = 120.0  # of one verifier that is not run in the loop, and of one reward model's word
    threads: int = 4  # of an actor, for verifiers that are slow
    exemplars: str = ""  # JSONL of answers written by people: {"question": text or number, "answer": text}

    def __post_init__(self) -> None:
        """Validate."""
        require(len(self.models) <= MAX_MODELS, "reward.models", list(self.models), f"at most {MAX_MODELS} models")
        for name, entry in self.models.items():
            entry.check(name)
        for channel, kind in self.normalise_by.items():
            rule = f"must be one of {', '.join(get_args(Normalise))}"
            require(kind in get_args(Normalise), f"reward.normalise_by.{channel}", kind, rule)
        require(0 < self.memory < 1, "reward.memory", self.memory, "must lie between 0 and 1")
        require(0.01 <= self.deadline_s <= 1e5, "reward.deadline_s", self.deadline_s, "must lie in [0.01, 1e5] seconds")
        require(1 <= self.threads <= 1024, "reward.threads", self.threads, "must lie in [1, 1024]")
        for channel, gate in self.gate.items():
            key = f"reward.gate.{channel}.where"
            require(gate.where != channel, key, gate.where, "a channel cannot be its own gate")
            require(
                gate.where not in self.models,
                key,
                gate.where,
                "is a reward model's word; a gate is a rule's, name a channel of the task",
            )
            finite = math.isfinite(gate.at_least)
            require(finite, f"reward.gate.{channel}.at_least", gate.at_least, "must be a finite number")

    def opens(self, channel: str, channels: Mapping[str, float]) -> bool:
        """Whether ``channel`` counts beside the values ``channels`` of the same rollout."""
        gate = self.gate.get(channel)
        if gate is None:  # float32, as channels travel: actor and broker agree at the bound
            return True
        return bool(np.float32(channels.get(gate.where, -math.inf)) >= np.float32(gate.at_least))

    def normalised(self, channel: str) -> str:
        """How ``channel`` is."""
        return self.normalise_by.get(channel, self.normalise)

    @property
    def mixes(self) -> bool:
        """Whether the broker takes advantages of anything but the weighted sum that the actor sends."""
        kinds = {self.normalise, *self.normalise_by.values()}
        neutral = any(entry.on_failure == "neutral" for entry in self.models.values())
        return kinds != {"none"} or bool(self.gate) or neutral

    def check_channels(self, made: Iterable[str], where: str = "task") -> None:
        """Raise :class:`ConfigError`, suggesting the near name, for a key that no channel bears.

        ``made``: the channels of ``where``, beside which those of the reward models stand.
        """
        own = list(made)
        for name in self.models:
            require(name not in own, "reward.models", name, f"{where} has a channel of this name; choose another")
        known = [*own, *self.models]
        for name in self.normalise_by:
            require(name in known, f"reward.normalise_by.{name}", self.normalise_by[name], _no_such(name, known))
        for name, gate in self.gate.items():
            require(name in known, f"reward.gate.{name}", gate.where, _no_such(name, known))
            require(gate.where in own, f"reward.gate.{name}.where", gate.where, _no_such(gate.where, own))


def _no_such(name: str, known: list[str]) -> str:
    return f"no such channel; {suggest(name, sorted(known), 'channels')}"
