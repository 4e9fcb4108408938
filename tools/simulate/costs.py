"""Costs fitted to what runs tell. Pure.

::

    decode(rows, context), prefill(tokens), train(tokens), score(tokens), ... -> Setup

Costs are CPU seconds of main threads where all processes share a machine; what other threads of a process took
(receiving weights, sockets) is the rest of its CPU time. Elsewhere they are seconds that passed. Of a learner
of several ranks they are one rank's. Several runs of the same model tell more than one: a cost that no run varies, the
share of a step that does not depend on its tokens say, is taken as proportional. Where processes share a
machine, ``machine.cores`` is what they got of it while more of them wanted to run than there were cores.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.profile.causes import marks_of
from tools.profile.figures import budgets_told
from tools.profile.spent import NS
from tools.profile.verdict import cores_of
from tools.simulate.sample import WAITING, Sample, wanting
from tools.simulate.settings import Setup, replaced, settings_of
from tools.watch.sound import counts, mapping, number

TRAINING = ("load", "forward", "backward", "reduce", "optimizer", "joint")  # states of a learner's step
CROWDED = 0.3  # of its time a run must have more threads than cores to say how many cores there were
ALIKE = 0.004  # columns of a fit whose least singular value is a smaller share of the greatest are too alike


def fit(samples: Sequence[Sample], notes: list[str]) -> Setup:
    """The setup of the first sample at the costs of all."""
    first = samples[0]
    setup = replaced(Setup(), settings_of(first.config))
    machine = _machine(samples, notes)
    for sample in samples:
        sample.shared = bool(machine["shared"])
    prompt = first.tokens / first.sequences - first.sampled
    costs = {
        "rollout": {"prompt_tokens": max(1, round(prompt))},
        "length": _lengths(first),
        "obrs": {"rejected_per_lag": _rejected(samples)},
        "actor": _actor_costs(samples, notes),
        "replica": _replica_costs(samples),
        "learner": _learner_costs(samples),
        "weights": _weights_costs(samples),
        "broker": _broker_costs(samples, notes),
        "machine": machine,
        "staleness": {"budget": _budget(first)},
    }
    return replaced(setup, costs)


def least_squares(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> NDArray[np.float64]:
    """Coefficients, none negative, that fit best; columns that nothing varies are left to those that vary more.

    Each row of ``rows`` is one equation; of columns that are proportional to each other the last one counts.
    """
    a, b = np.asarray(rows, np.float64), np.asarray(targets, np.float64)
    chosen = list(range(a.shape[1]))
    scale = np.maximum(np.abs(a).max(axis=0), 1e-300)
    while chosen:
        part = a[:, chosen] / scale[chosen]
        singular = np.linalg.svd(part, compute_uv=False)
        if len(part) < len(chosen) or singular[-1] < ALIKE * singular[0]:
            chosen.pop(0)  # too alike to be told apart
            continue
        found = np.linalg.lstsq(part, b, rcond=None)[0] / scale[chosen]
        if (found >= 0).all():
            whole = np.zeros(a.shape[1])
            whole[chosen] = found
            return whole
        chosen.pop(int(np.argmin(found * scale[chosen])))
    return np.zeros(a.shape[1])


def _all(samples: Iterable[Sample], name: str) -> list[list[float]]:
    """Times, cost in nanoseconds and amount of every key."""
    return [sums for sample in samples for sums in sample.tally(name).values()]


def _budget(sample: Sample) -> int:
    """Of staleness.budget=auto what it mostly was."""
    section = sample.config.staleness
    told = budgets_told(sample.trained)
    return round(float(np.median(told))) if section.auto and told else section.first


def _mean(samples: Sequence[Sample], seconds: Callable[[Sample], float], per: Callable[[Sample], float]) -> float:
    """Seconds of all samples together over how often."""
    count = sum(per(sample) for sample in samples)
    return sum(seconds(sample) for sample in samples) / count if count else 0.0


def _actor_costs(samples: Sequence[Sample], notes: list[str]) -> dict[str, float]:
    rows, costs = [], []
    for sample in samples:
        for times, of_rows, of_context, cost in _decoding(sample):
            weight = 1 / np.sqrt(times)  # of sums over that many steps, each equally uncertain
            rows.append([weight * of_context, weight * times, weight * of_rows])
            costs.append(weight * cost)
    if not rows:
        notes.append(
            "actors' timelines tell of no decoding (SGLang servers?): actor.*_s are defaults, set them by hand"
        )
        return {}
    of_context, fixed, of_row = least_squares(rows, costs).tolist()
    played_s, turn_s = least_squares(
        [[s.steps * s.sequences, _engine_steps(s)] for s in samples], [s.cost("actor", "play") for s in samples]
    ).tolist()
    prefill = _all(samples, "prefill")
    pass_s, token_s = least_squares(
        [[s[0], s[2]] for s in prefill], [s[1] * NS for s in prefill]
    ).tolist() if prefill else (0.0, 0.0)  # fmt: skip
    swaps = _all(samples, "swap")
    return {
        "step_s": fixed + turn_s,
        "row_s": of_row,
        "context_s": of_context,
        "prefill_s": pass_s,
        "prefill_token_s": token_s,
        "sequence_s": played_s + _mean(samples, lambda s: s.cost("actor", "send"), lambda s: s.steps * s.sequences),
        "swap_s": sum(s[1] for s in swaps) * NS / max(1, sum(s[0] for s in swaps)),
    }


def _decoding(sample: Sample) -> Iterator[tuple[float, float, float, float]]:
    """Steps, rows, rows times contexts and cost in seconds: by the context where that is tallied, else by rows."""
    of_rows, contexts = sample.tally("context_rows"), sample.tally("context")
    for place, (times, cost, amount) in contexts.items():
        if place in of_rows and of_rows[place][2]:
            yield times, of_rows[place][2], amount, cost * NS
    rows = sum(sums[2] for sums in of_rows.values())
    longest = sum(sums[2] for sums in contexts.values()) / rows if rows else 0.0  # on average
    for live, (times, cost, _) in sample.tally("decode").items():
        if live:
            yield times, times * live, times * live * longest, cost * NS


def _engine_steps(sample: Sample) -> float:
    return sum(sums[0] for sums in sample.tallies.get("decode", {}).values())


def _replica_costs(samples: Sequence[Sample]) -> dict[str, float]:
    scored = _all(samples, "score")
    if not scored:
        return {}
    batch_s, token_s = least_squares([[s[0], s[2]] for s in scored], [s[1] * NS for s in scored]).tolist()
    asked = [s for s in samples if s.config.obrs.mode != "off"]
    swap_s = _mean(asked, lambda s: s.cost("replica", "swap"), lambda s: s.steps * s.config.replica.count)
    return {"score_s": batch_s, "score_token_s": token_s, "swap_s": swap_s}


def _learner_costs(samples: Sequence[Sample]) -> dict[str, float]:
    """Of one rank: all ranks are at it at the same time."""

    def seconds(sample: Sample, *states: str) -> float:
        return sample.cost("learner", *states) / sample.config.learner.ranks

    rows = [[s.steps, s.steps * s.tokens] for s in samples]
    step_s, token_s = least_squares(rows, [seconds(s, *TRAINING, "commit") for s in samples]).tolist()
    if not step_s:  # no run varies the size: the optimizer is known to look at no token
        step_s = _mean(samples, lambda s: seconds(s, "reduce", "optimizer", "commit"), lambda s: s.steps)
        token_s = max(0.0, _mean(samples, lambda s: seconds(s, *TRAINING, "commit"), lambda s: s.steps) - step_s)
        token_s /= samples[0].tokens
    checkpoints = [s for s in samples if s.config.learner.checkpoint_every]
    checkpoint_s = _mean(
        checkpoints, lambda s: seconds(s, "checkpoint"), lambda s: s.steps / s.config.learner.checkpoint_every
    )
    return {"step_s": step_s, "token_s": token_s, "checkpoint_s": checkpoint_s}


def _receivers(sample: Sample) -> int:
    config = sample.config
    return config.actor.count + (config.replica.count if config.obrs.mode != "off" else 0)


def _weights_costs(samples: Sequence[Sample]) -> dict[str, float]:
    """Gathering and sending are the first rank's alone.

    Threads that receive are the only ones beside the main one with much to do, so theirs is that CPU time. The
    time of a collective is the learner's ``send``: those who receive are at it as long.
    """
    by_receivers = _mean(samples, lambda s: s.steps * _receivers(s), lambda s: s.steps)
    sent = _mean(samples, _sending, lambda s: s.steps)
    received = _mean(samples, lambda s: s.threads["actor"] + s.threads["replica"], lambda s: s.steps * _receivers(s))
    return {
        "gather_s": _mean(samples, lambda s: s.cost("learner", "gather"), lambda s: s.steps),
        "send_s": 0.0,
        "receiver_s": sent / by_receivers,
        "receive_s": received if samples[0].shared else sent,
    }


def _sending(sample: Sample) -> float:
    return (
        sample.cpu("learner", "send") + sample.threads["learner"] if sample.shared else sample.wall("learner", "send")
    )


def _broker_costs(samples: Sequence[Sample], notes: list[str]) -> dict[str, float]:
    """Messages are taken as those of trajectories; what is done a turn is spread over them."""

    def each(*states: str) -> float:
        return _mean(samples, lambda s: s.cost("broker", *states), lambda s: s.steps)

    admitted = _all(samples, "admit")
    trajectories = max(1.0, sum(s[2] for s in admitted))
    messages = sum(
        sum(s[0] for s in sample.tallies.get("admit", {}).values()) + sample.steps * (4 + 4 * _receivers(sample))
        for sample in samples
    )  # fetch, commit, publish, published and scores; ready, applied and heartbeats
    turns = sum(s.cost("broker", "receive", "grant") + s.cpu("broker", *WAITING) for s in samples)
    return {
        "message_s": turns / max(1, messages),
        "trajectory_s": sum(s[1] for s in admitted) * NS / trajectories,
        "assemble_s": each("collate"),
        "decide_s": each("thin"),
        "pack_s": each("pack"),
        "commit_s": each("commit"),
        **_delays(samples, notes),
    }


def _delays(samples: Sequence[Sample], notes: list[str]) -> dict[str, float]:
    """From the marks of steps that were ready when the learner asked: packed, on disk, sent, there."""
    held, under_way = [], []
    for sample in samples:
        marks, packed = marks_of(sample.run.timelines), sample.wall("broker", "pack") / sample.steps
        for life in sample.run.timelines.of("learner"):
            for wait in life.slices:
                mark = marks.get(wait.step, {})
                if wait.state != "idle.shard" or wait.start < sample.window.start or not mark.get("served"):
                    continue
                if mark.get("decided") and mark.get("asked") and mark["decided"][0] < mark["asked"][0]:
                    held.append((mark["served"][0] - mark["asked"][0]) * NS - packed)
                    under_way.append((wait.end - mark["served"][0]) * NS)
    if not held:
        notes.append("no shard was ready when the learner asked: how long the journal holds answers is a default")
        return {}
    return {"hold_s": max(0.0, float(np.median(held))), "link_s": max(0.0, float(np.median(under_way)))}


def _machine(samples: Sequence[Sample], notes: list[str]) -> dict[str, float | bool]:
    hosts = {life.header.get("host") for s in samples for life in s.run.timelines.lives}
    if len(hosts) != 1:
        return {"shared": False}
    there = min(cores_of(samples[0].run.timelines).values(), default=None)
    if there is None:
        notes.append("how many cores the machine has is not known: taken as enough for all; set machine.cores")
        return {"shared": False}
    got = [cores for sample in samples if (cores := _cores_got(sample, there)) is not None]
    return {"shared": True, "cores": min(float(there), float(np.mean(got))) if got else float(there)}


def _cores_got(sample: Sample, there: int) -> float | None:
    """What the processes had of the machine's cores while they wanted more than all; None: that was seldom."""
    slowed = any(part.slowdown > 1 or part.pace_s > 0 for part in (sample.config.actor, sample.config.learner))
    threads = wanting(sample)
    crowded = sum(seconds for count, seconds in threads.items() if count >= there)
    if slowed or crowded < CROWDED * sum(threads.values()):
        return None
    return solve_cores(threads, sum(sum(states.values()) for states in sample.states.values()))


def solve_cores(seconds: Mapping[int, float], used: float) -> float:
    """c with sum over n of seconds[n] min(n, c) = used; the most threads at once if even all of them used no more."""
    low, high = 0.0, float(max(seconds, default=0))
    for _ in range(60):
        middle = (low + high) / 2
        if sum(min(n, middle) * s for n, s in seconds.items()) < used:
            low = middle
        else:
            high = middle
    return high


def _lengths(sample: Sample) -> dict[str, Any]:
    """All as long as they may be, or the lengths that receipts tell of: their means a step, spread as they are."""
    config = sample.config
    if config.rollout.ignore_eos:
        return {"kind": "longest"}
    told = counts(mapping(sample.run.status.get("trajectories_by_length")).get("trained"))
    bins = {size: count for size, count in sorted(told.items()) if size > 0 and count > 0}
    mean = sample.sampled
    if len(bins) < 2:
        return {"kind": "histogram", "values": (max(1, round(mean)),), "weights": (1.0,)}
    sizes, weights = np.array(list(bins), np.float64), np.array(list(bins.values()), np.float64)
    centres = np.maximum(1, np.round(sizes * 0.75))  # of a bin from half of its name to its name
    centres *= mean / float((centres * weights).sum() / weights.sum())
    return {"kind": "histogram", "values": tuple(max(1, round(c)) for c in centres), "weights": tuple(weights.tolist())}


def _rejected(samples: Sequence[Sample]) -> float:
    """Tokens that rejection took, over the lags of all tokens proposed."""
    taken = lags = 0.0
    for step in itertools.chain.from_iterable(sample.run.steps for sample in samples):
        proposed, accepted, lag = (number(step.get(key)) for key in ("tokens_proposed", "tokens_accepted", "lag_mean"))
        if step.get("acceptance") is None or proposed is None or accepted is None or lag is None:
            continue
        taken += max(0.0, proposed - accepted)
        lags += proposed * lag
    return taken / lags if lags > 0 else 0.0
