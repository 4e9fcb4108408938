"""Reward channels into the one number that advantages are taken of (algorithms.md 3.5). Pure.

::

    channels -> gate: shut, a channel counts nothing -> z score, channel by channel and task by task
             -> absent: its group's mean -> weighted sum

Without ``reward.normalise``, gates or models whose failures are neutral, that number is the reward
that the actor sent, bit for bit. The statistics of a channel are of the members where it counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.trajectories import Trajectory
from common.config import RunConfig

EPSILON = 1e-6  # added to a deviation

Floats = NDArray[np.float64]
Scales = dict[tuple[str, str], tuple[float, float]]  # (task, channel) -> mean and deviation it is normalised by


@dataclass(frozen=True)
class Mixed:
    """What became of a batch's channels."""

    rewards: NDArray[np.float32]  # [B]
    missing: dict[str, int] = field(default_factory=dict)  # members that a channel counts for and that lack it
    shut: dict[str, int] = field(default_factory=dict)  # members that its gate keeps it from


@dataclass(frozen=True)
class _Channel:
    """One channel of one task; ``n`` members."""

    values: Floats  # [n] 0 where absent
    known: NDArray[np.bool_]  # [n] present, and its gate open
    open: NDArray[np.bool_]  # [n]


def mix(members: Sequence[Trajectory], config: RunConfig, scales: Scales, normalise: bool = True) -> Mixed:
    """What ``members[B]``, sorted by group, are rewarded with; ``scales``: what :class:`Running` chose for them.

    Without ``normalise`` the channels are gated and completed alone.
    """
    sent = np.array([t.reward for t in members], np.float32)
    if not config.reward.mixes:
        return Mixed(sent)
    groups = np.array([t.group for t in members], np.int64)
    total = np.zeros(len(members))
    missing: dict[str, int] = {}
    shut: dict[str, int] = {}
    labels = tasks_of(members, config)
    for task in np.unique(labels).tolist():
        inside = np.flatnonzero(labels == task)
        owner, copies = _owners(groups[inside], config.rollout.group_size)
        for name, weight in sorted(weights_of(config, task).items()):
            channel = _read([members[i] for i in inside.tolist()], name, config)
            shut[name] = shut.get(name, 0) + int((~channel.open).sum())
            missing[name] = missing.get(name, 0) + int((channel.open & ~channel.known).sum())
            kind = config.reward.normalised(name) if normalise else "none"
            values = channel.values
            if kind == "group":
                values = _by_group(channel, owner)
            elif kind != "none":
                scale = scales.get((task, name)) if kind == "task_running" else _moments(channel, copies)
                values = _standard(values, scale)
            total[inside] += weight * np.where(channel.open, _completed(values, channel.known, owner, copies), 0.0)
    return Mixed(total.astype(np.float32), missing, shut)


def _owners(groups: Sequence[int] | NDArray[np.int64], group_size: int) -> tuple[NDArray[np.int64], Floats]:
    """Of each member of ``groups`` the number of its group here, and how often it counts.

    A padded group weighs as a whole one (algorithms.md 3.3).
    """
    _, owner, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return owner, (group_size / sizes)[owner]


def tasks_of(members: Sequence[Trajectory], config: RunConfig) -> NDArray[np.str_]:
    """The label of each member's task ``[B]``."""
    numbers, _ = config.task.mixture.places(np.array([t.prompt for t in members], np.int64))
    return np.array(config.task.labels)[numbers]


def weights_of(config: RunConfig, task: str) -> Mapping[str, float]:
    """What the channels of the task called ``task`` count."""
    return config.task.entries[task].reward_weights


def _read(members: Sequence[Trajectory], name: str, config: RunConfig) -> _Channel:
    opened = np.array([config.reward.opens(name, t.channels) for t in members], np.bool_)
    present = np.array([name in t.channels for t in members], np.bool_)
    values = np.array([t.channels.get(name, 0.0) for t in members], np.float64)
    return _Channel(values, present & opened, opened)


def _by_group(channel: _Channel, owner: NDArray[np.int64]) -> Floats:
    """z scores within each group."""
    mean, count = _means(channel.values, channel.known, owner)
    centred = np.where(channel.known, channel.values - mean[owner], 0.0)
    spread = np.sqrt(np.bincount(owner, np.square(centred)) / np.maximum(1, count))
    high = np.full(len(count), -np.inf)
    low = np.full(len(count), np.inf)
    np.maximum.at(high, owner[channel.known], channel.values[channel.known])
    np.minimum.at(low, owner[channel.known], channel.values[channel.known])
    differs = high > low  # never by a small deviation, which sums of equal numbers may have
    return np.where(differs[owner], centred / (spread + EPSILON)[owner], 0.0)


def _means(values: Floats, known: NDArray[np.bool_], owner: NDArray[np.int64]) -> tuple[Floats, NDArray[np.int64]]:
    """Each group's mean over what is known of it (0 where nothing is), and of how many."""
    count = np.bincount(owner, known)
    mean = np.bincount(owner, np.where(known, values, 0.0)) / np.maximum(1, count)
    return mean, count.astype(np.int64)


def _moments(channel: _Channel, copies: Floats) -> tuple[float, float] | None:
    """Mean and deviation of what is known, a padded group's members counted as often as its copies would be."""
    values, weights = channel.values[channel.known], copies[channel.known]
    if not len(values) or values.max() == values.min():
        return None
    mean = float(np.average(values, weights=weights))
    return mean, float(np.sqrt(np.average(np.square(values - mean), weights=weights)))


def _standard(values: Floats, scale: tuple[float, float] | None) -> Floats:
    """z scores; 0 where a channel does not vary."""
    if scale is None or scale[1] <= 0:
        return np.zeros(len(values))
    return (values - scale[0]) / (scale[1] + EPSILON)


def _completed(values: Floats, known: NDArray[np.bool_], owner: NDArray[np.int64], copies: Floats) -> Floats:
    """What is not known takes its group's mean, or where a group knows nothing the mean of all."""
    if known.all() or not known.any():
        return np.where(known, values, 0.0)
    mean, count = _means(values, known, owner)
    overall = float(np.average(values[known], weights=copies[known]))
    return np.where(known, values, np.where(count > 0, mean, overall)[owner])


class Running:
    """Statistics of each channel of each task over all steps so far, the older ones fading."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        kinds = {config.reward.normalise, *config.reward.normalise_by.values()}
        self._on = "task_running" in kinds
        self._sums: dict[tuple[str, str], tuple[float, float, float]] = {}  # weight, mean, mean square deviation

    def observe(self, members: Sequence[Trajectory]) -> Scales:
        """Take in a step's ``members[B]``; returns what they are normalised by. Their order changes nothing."""
        found: Scales = {}
        if not self._on:
            return found
        ordered = sorted(members, key=lambda t: (t.group, t.sibling))
        labels = tasks_of(ordered, self._config)
        for task in np.unique(labels).tolist():
            inside = [ordered[i] for i in np.flatnonzero(labels == task).tolist()]
            _, copies = _owners([t.group for t in inside], self._config.rollout.group_size)
            for name in sorted(weights_of(self._config, task)):
                if self._config.reward.normalised(name) == "task_running":
                    channel = _read(inside, name, self._config)
                    self._add((task, name), channel.values[channel.known], copies[channel.known])
                    if (task, name) in self._sums:
                        _, mean, square = self._sums[task, name]
                        found[task, name] = (mean, float(np.sqrt(square)))
        return found

    def _add(self, key: tuple[str, str], values: Floats, copies: Floats) -> None:
        if not len(values):
            return
        before, mean, square = self._sums.get(key, (0.0, 0.0, 0.0))
        before *= self._config.reward.memory
        weight = float(copies.sum())
        total = before + weight
        centre = float(np.average(values, weights=copies))
        share = weight / total
        both = (1 - share) * square + share * float(np.average(np.square(values - centre), weights=copies))
        if values.min() == values.max():
            both = (1 - share) * square
        step = centre - mean if before else 0.0
        self._sums[key] = (
            total,
            centre if not before else mean + share * step,
            both + share * (1 - share) * step * step,
        )

    def state(self) -> list[list[Any]]:
        """What :meth:`restore` needs."""
        return [[*key, *sums] for key, sums in sorted(self._sums.items())]

    def restore(self, state: Sequence[Sequence[Any]]) -> None:
        """Take up where :meth:`state` was written."""
        self._sums = {(task, name): (total, mean, square) for task, name, total, mean, square in state}


def pack_scales(scales: Scales) -> list[list[Any]]:
    """For a snapshot."""
    return [[*key, *value] for key, value in sorted(scales.items())]


def unpack_scales(packed: Sequence[Sequence[Any]]) -> Scales:
    """From a snapshot."""
    return {(task, name): (mean, deviation) for task, name, mean, deviation in packed}
