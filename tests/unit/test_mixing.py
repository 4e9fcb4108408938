"""Channels into rewards: against a naive oracle, through the real pipeline, and again after a restart."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.journal import Journal
from broker.mixing import EPSILON, Running, mix
from broker.pipeline import Pipeline
from broker.recorder import Recorder, decision_digests
from broker.recovery import recover
from broker.trajectories import Trajectory, unpack_all
from common import wire
from common.config import (
    AdvantageSection,
    ObrsSection,
    RolloutSection,
    RunConfig,
    RunSection,
    StalenessSection,
    TaskEntry,
)
from common.config import TaskSection as Task
from common.errors import ConfigError
from common.rewards import GateEntry, RewardModelEntry, RewardSection

G, B, VOCAB = 4, 2, 16
WEIGHTS = {"correct": 1.0, "style": 0.5}


def config(reward: RewardSection, **sections) -> RunConfig:
    base = {
        "rollout": RolloutSection(groups_per_step=B, group_size=G, max_prompt_tokens=2, max_tokens=2),
        "staleness": StalenessSection(0),
        "run": RunSection(steps=4, seed=3),
        "task": Task(reward_weights=WEIGHTS),
        "obrs": ObrsSection(mode="off"),
        "reward": reward,
    }
    return RunConfig(**{**base, **sections})


def message(group: int, channels: list[dict[str, float]], first: int = 0) -> wire.Trajectories:
    """Siblings of one set of channels, two tokens of prompt and two sampled."""
    names, n = sorted(channels[0]), len(channels)
    on = np.tile([0, 0, 1, 1], n).astype(np.uint8)
    rewards = [sum(WEIGHTS.get(name, 0) * value for name, value in one.items()) for one in channels]
    return wire.Trajectories(
        "r", names, np.full(n, group, np.int64), np.arange(first, first + n, dtype=np.int32),
        np.array(rewards, np.float32), np.array([[c[k] for k in names] for c in channels], np.float32),
        np.zeros(n, np.uint8), np.arange(0, 4 * n + 1, 4, dtype=np.int32), np.arange(4 * n, dtype=np.int32) % VOCAB, on,
        np.where(on, -0.5, 0).astype(np.float32), np.where(on, 0, -1).astype(np.int32),
        np.zeros((4 * n, 0), np.int32), np.zeros((4 * n, 0), np.float32),
    )  # fmt: skip


def members(groups: list[list[dict[str, float]]]) -> list[Trajectory]:
    found = []
    for number, group in enumerate(groups):
        for sibling, channels in enumerate(group):
            found += unpack_all(message(number, [channels], sibling))
    return found


def naive(groups: list[list[dict[str, float]]], reward: RewardSection) -> list[float]:
    """The mixture member by member."""
    out = []
    counted = [
        c["style"] for group in groups for c in group if "style" in c and reward.opens("style", c)
    ]  # of the one task there is
    for group in groups:
        known = [c["style"] for c in group if "style" in c and reward.opens("style", c)]

        def z(value: float, of: list[float]) -> float:
            if not of or max(of) == min(of):
                return 0.0
            mean = sum(of) / len(of)
            return (value - mean) / (math.sqrt(sum((v - mean) ** 2 for v in of) / len(of)) + EPSILON)

        def style(value: float, known: list[float] = known) -> float:
            kind = reward.normalised("style")
            return value if kind == "none" else z(value, known if kind == "group" else counted)

        for c in group:
            total = c["correct"]
            if reward.opens("style", c):
                if "style" in c:
                    total += 0.5 * style(c["style"])
                elif known:
                    total += 0.5 * sum(style(v) for v in known) / len(known)
                elif counted and reward.normalised("style") != "group":
                    total += 0.5 * sum(style(v) for v in counted) / len(counted)
            out.append(total)
    return out


VALUES = st.one_of(st.none(), st.sampled_from([0.0, 0.1, 0.7, 1.0]))
GROUPS = st.lists(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0]), VALUES), min_size=1, max_size=G), min_size=1, max_size=3
)


@settings(max_examples=40)
@given(given_groups=GROUPS, kind=st.sampled_from(["none", "group", "task_batch"]), gated=st.booleans())
def test_a_mixture_is_what_it_is_member_by_member(given_groups, kind, gated) -> None:
    groups = [[{"correct": c} | ({} if s is None else {"style": s}) for c, s in group] for group in given_groups]
    gate = {"style": GateEntry()} if gated else {}
    reward = RewardSection(
        models={"style": RewardModelEntry(path="/x", on_failure="neutral")}, normalise_by={"style": kind}, gate=gate
    )
    # groups of different sizes count alike in task_batch only if each is whole
    if kind == "task_batch" and len({len(group) for group in groups}) > 1:
        groups = [group[: min(map(len, groups))] for group in groups]
    found = mix(members(groups), config(reward), {})
    assert found.rewards.tolist() == pytest.approx(naive(groups, reward), abs=1e-5)
    lacking = [c for g in groups for c in g if "style" not in c and reward.opens("style", c)]
    assert found.missing["style"] == len(lacking)
    assert found.shut["style"] == sum(not reward.opens("style", c) for g in groups for c in g)


def test_nothing_configured_is_the_actors_reward_bit_for_bit() -> None:
    groups = [[{"correct": 0.1, "style": 0.3}] * G]
    sent = members(groups)
    sent = [dataclasses.replace(t, reward=0.1 + i) for i, t in enumerate(sent)]
    found = mix(sent, config(RewardSection()), {})
    assert found.rewards.tolist() == [np.float32(0.1 + i) for i in range(G)] and not found.missing


def test_a_padded_group_counts_as_its_copies_would() -> None:
    reward = RewardSection(normalise_by={"style": "task_batch"})
    short = [{"correct": 0.0, "style": 0.2}, {"correct": 1.0, "style": 0.9}]
    other = [{"correct": 0.0, "style": v} for v in (0.0, 0.3, 0.5, 1.0)]
    found = mix(members([short, other]), config(reward), {}).rewards
    copied = mix(members([[short[0], short[0], short[1], short[1]], other]), config(reward), {}).rewards
    assert found.tolist() == pytest.approx(copied[[0, 2, 4, 5, 6, 7]].tolist(), abs=1e-6)


def test_what_an_absent_channel_takes_moves_no_mean() -> None:
    """A neutral sibling leaves its group's mean, and so the others' centred rewards, where they were."""
    reward = RewardSection(models={"style": RewardModelEntry(path="/x", on_failure="neutral")})
    known = [{"correct": 1.0, "style": v} for v in (0.2, 0.4, 0.9)]
    three = mix(members([known]), config(reward), {}).rewards
    four = mix(members([[*known, {"correct": 1.0}]]), config(reward), {}).rewards
    assert four[3] == pytest.approx(float(three.mean()), abs=1e-6)
    assert (four[:3] - four.mean()).tolist() == pytest.approx((three - three.mean()).tolist(), abs=1e-6)


def test_mixed_tasks_have_statistics_and_weights_of_their_own() -> None:
    """Two tasks whose styles lie far apart: each is normalised by its own, and counts by its own weight."""
    entries = {"a": TaskEntry("sort6", reward_weights=WEIGHTS), "b": TaskEntry("guess", reward_weights={"style": 2.0})}
    settings = config(RewardSection(normalise_by={"style": "task_batch"}), task=Task(mix=entries))
    values = [[0.1, 0.3], [7.0, 9.0]]  # prompt 0 is a's, prompt 1 is b's
    batch = members([[{"correct": 1.0, "style": v} for v in group] for group in values])
    batch = [dataclasses.replace(t, prompt=t.group) for t in batch]
    assert mix(batch, settings, {}).rewards.tolist() == pytest.approx([0.5, 1.5, -2.0, 2.0], abs=1e-4)


@settings(max_examples=15)
@given(steps=st.lists(st.lists(st.floats(0, 1, width=16), min_size=1, max_size=6), min_size=1, max_size=5))
def test_running_statistics_are_those_of_all_values_weighted_by_age(steps) -> None:
    reward = RewardSection(normalise_by={"style": "task_running"}, memory=0.9)
    running = Running(config(reward))
    for number, values in enumerate(steps):
        batch = members([[{"correct": 0.0, "style": v}] for v in values])
        shuffled = batch[::-1]
        mean, deviation = running.observe(shuffled)["sort6", "style"]
        weights = np.concatenate([np.full(len(v), 0.9 ** (number - i)) for i, v in enumerate(steps[: number + 1])])
        seen = np.concatenate(steps[: number + 1])
        assert mean == pytest.approx(np.average(seen, weights=weights), abs=1e-6)
        spread = np.sqrt(np.average((seen - mean) ** 2, weights=weights))
        assert deviation == pytest.approx(spread, abs=1e-6)


def run(pipeline: Pipeline | Recorder, groups: list[list[dict[str, float]]]) -> None:
    """One step of ``groups``, whose members may differ in the channels that they have."""
    grant = pipeline.grant("a", len(groups), 0)
    assert grant is not None
    for number, group in zip(grant.groups.tolist(), groups, strict=True):
        for sibling, channels in enumerate(group):
            assert pipeline.admit(message(number, [channels], sibling), "a", 0).reasons == [""]
    assert pipeline.assemble(0) is None  # rejection is off: decided at once


def test_gates_and_scores_reach_advantages_and_the_receipt_shows_both() -> None:
    reward = RewardSection(gate={"style": GateEntry(at_least=1.0)})
    pipeline = Pipeline(config(reward, advantage=AdvantageSection(kind="dr_grpo")), VOCAB)
    group = [
        {"correct": 1.0, "style": 0.8}, {"correct": 1.0, "style": 0.2},
        {"correct": 0.0, "style": 1.0}, {"correct": 0.0, "style": 0.0},
    ]  # fmt: skip
    run(pipeline, [group, [{"correct": 0.0, "style": v} for v in (0.1, 0.9, 0.5, 0.0)]])
    shard, step = pipeline.shard(0, 0, 1), pipeline.step(0)
    assert shard is not None and step is not None
    wanted = np.array([1.4, 1.1, 0.0, 0.0])
    assert shard.advantages[:4].tolist() == pytest.approx((wanted - wanted.mean()).tolist(), abs=1e-6)
    assert (shard.advantages[4:] == 0).all()  # what a style is worth where nothing is right
    receipt = step.receipt
    raw = [1.4, 1.1, 0.5, 0.0, 0.05, 0.45, 0.25, 0.0]
    assert receipt["reward"] == pytest.approx(np.mean(raw)) and receipt["reward_mixed"] == pytest.approx(2.5 / 8)
    assert receipt["channels_gated"] == {"correct": 0, "style": 6} and receipt["groups_without_signal"] == 1


def test_resampling_looks_at_what_is_mixed() -> None:
    reward = RewardSection(gate={"style": GateEntry()})
    pipeline = Pipeline(config(reward, advantage=AdvantageSection(zero_signal="resample")), VOCAB)
    grant = pipeline.grant("a", 1, 0)
    assert grant is not None
    pipeline.admit(message(0, [{"correct": 0.0, "style": v} for v in (0.1, 0.9, 0.5, 0.0)]), "a", 0)
    assert pipeline.dropped["no_signal"] == G


def test_running_statistics_survive_a_restart(tmp_path) -> None:
    settings = config(RewardSection(normalise="task_running"), staleness=StalenessSection(3))
    journal = Journal(tmp_path, "run", 64.0)
    recorder = Recorder(Pipeline(settings, VOCAB), journal, dict)
    rng = np.random.default_rng(0)

    def groups() -> list[list[dict[str, float]]]:
        return [[{"correct": float(rng.integers(2)), "style": rng.random()} for _ in range(G)] for _ in range(B)]

    recorder.begin(0)
    run(recorder, groups())
    run(recorder, groups())
    recorder.snapshot()
    later = groups()
    grant = recorder.grant("a", B, 1)
    assert grant is not None
    for number, group in zip(grant.groups.tolist(), later, strict=True):
        sent = message(number, group)
        sent.versions[sent.trainable == 1] = 1
        recorder.admit(sent, "a", 1)
    recorder.assemble(1)
    journal.flush()
    while journal.durable < journal.last:
        journal.check()
    steps = range(recorder.pipeline.ledger.next_step)
    before = [decision_digests(recorder.pipeline, step) for step in steps]
    assert len(before) == 3 and len({d["advantages"] for d in before}) == len(before)
    again = Pipeline(settings, VOCAB)
    assert recover(again, journal).differences == []
    assert [decision_digests(again, step) for step in steps] == before
    assert again.state()["running"] == recorder.pipeline.state()["running"]
    journal.close()


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"gate": {"stile": GateEntry()}}, r"reward\.gate\.stile='correct': no such channel; did you mean 'style'"),
        (
            {"gate": {"style": GateEntry(where="corect")}},
            r"reward\.gate\.style\.where='corect': .*did you mean 'correct'",
        ),
        ({"normalise_by": {"stlye": "group"}}, r"reward\.normalise_by\.stlye.*did you mean 'style'"),
        ({"models": {"correct": RewardModelEntry(path="/x")}}, "choose another"),
    ],
)
def test_keys_of_no_channel_are_refused_with_the_near_one(section, words) -> None:
    with pytest.raises(ConfigError, match=words):
        RewardSection(**section).check_channels(("correct", "style"))


def test_a_padded_group_weighs_as_a_whole_one_in_running_statistics_too() -> None:
    """The same members, one step: what the batch would be normalised by is what all steps so far are."""
    groups = [[{"correct": 0.0}] * G, [{"correct": 1.0}] * (G - 1)]
    batch = members(groups)
    running = config(RewardSection(normalise="task_running"))
    rewards = mix(batch, running, Running(running).observe(batch)).rewards
    assert rewards.tolist() == pytest.approx([-1.0] * G + [1.0] * (G - 1), abs=1e-4)
    assert rewards.tolist() == mix(batch, config(RewardSection(normalise="task_batch")), {}).rewards.tolist()
