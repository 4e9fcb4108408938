"""A broker that was killed at any instant comes back where it was, and a replay finds the same decisions."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.chunks import Event
from broker.fixed import MIXING, changed, fixed_settings
from broker.journal import Journal
from broker.pipeline import Pipeline
from broker.recorder import Recorder, apply, decision_digests, difference, shard_digests
from broker.recovery import recover
from common import wire
from common.codec import encode
from common.config import (
    AdvantageSection,
    BrokerSection,
    ObrsSection,
    RolloutSection,
    RunConfig,
    RunSection,
    StalenessSection,
    TaskEntry,
    TaskSection,
)
from common.errors import ConfigError, JournalError
from common.frozen import TeacherEntry
from common.objective import LossSection
from common.rewards import RewardSection
from common.routing import Routing
from tests.routes import routes
from tools.replay import verify

B, G, STEPS, VOCAB = 3, 2, 6, 16
ROUTING = Routing((0, 1, 2), experts=8, per_token=2)


def config(**sections) -> RunConfig:
    base = {
        "run": RunSection(seed=5, steps=STEPS),
        "rollout": RolloutSection(groups_per_step=B, group_size=G, max_prompt_tokens=3, max_tokens=5),
        "staleness": StalenessSection(2),
        "broker": BrokerSection(assemble_ahead=1, retain_mb=4.0),
    }
    return RunConfig(**{**base, **sections})


CONFIGS = {
    "threshold": config(),
    "off": config(obrs=ObrsSection(mode="off"), task=TaskSection(mix={"a": TaskEntry(), "b": TaskEntry(ratio=0.5)})),
    "rethin": config(obrs=ObrsSection(rethin_below=1.0)),
    "budget": config(obrs=ObrsSection(mode="budget", budget=0.7, window=2)),
}
CONFIGS["ess"] = config(obrs=ObrsSection(mode="ess", target_ess=0.9, window=2))
CONFIGS["auto"] = config(staleness=StalenessSection("auto", start=1, most=4))
CONFIGS["skip"] = config(advantage=AdvantageSection(skip_passed=0.5, zero_signal="resample"))
CONFIGS["routed"] = config(
    obrs=ObrsSection(rethin_below=1.0), rollout=dataclasses.replace(config().rollout, routing_replay=True)
)
TAUGHT = {
    "task": TaskSection(mix={"a": TaskEntry("sort6"), "b": TaskEntry("sort6")}),
    "teachers": {"one": TeacherEntry("x", ("a",)), "two": TeacherEntry("y", ("b",))},
    "loss": LossSection(kl=0.1, distill=1.0),
}
CONFIGS["frozen"] = config(obrs=ObrsSection(mode="budget", rethin_below=1.0), **TAUGHT)
CONFIGS["frozen_off"] = config(obrs=ObrsSection(mode="off"), **TAUGHT)


def pipeline_of(name: str) -> Pipeline:
    return Pipeline(CONFIGS[name], VOCAB, ROUTING if name == "routed" else None)


def rollouts(group: int, siblings: list[int], version: int, seed: int, routed: int = 0) -> wire.Trajectories:
    rng = np.random.default_rng((seed, group, *siblings))
    lengths = rng.integers(3, 8, len(siblings))
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    n = int(offsets[-1])
    on = np.ones(n, np.uint8)
    on[offsets[:-1]] = 0
    rewards = rng.integers(0, 2, len(siblings)).astype(np.float32)
    return wire.Trajectories(
        "r", ["correct"], np.full(len(siblings), group), np.array(siblings, np.int32), rewards, rewards[:, None],
        np.zeros(len(siblings), np.uint8), offsets, rng.integers(0, VOCAB, n).astype(np.int32), on,
        np.where(on, -rng.random(n), 0).astype(np.float32), np.where(on, version, -1).astype(np.int32),
        np.zeros((n, 0), np.int32), np.zeros((n, 0), np.float32),
        routes(rng, n, routed // ROUTING.per_token, ROUTING.experts, ROUTING.per_token),
    )  # fmt: skip


def drive(recorder: Recorder, rng: np.random.Generator, published: list[int], turns: int, flights: list) -> None:
    """A random life: grants, arrivals in pieces and repeats, lost actors, scores, commits, checkpoints."""
    pipeline = recorder.pipeline
    for _ in range(turns):
        match rng.integers(0, 8):
            case 0 | 1:
                actor = f"a{rng.integers(0, 2)}"
                grant = recorder.grant(actor, int(rng.integers(1, 4)), published[0])
                if grant is not None:
                    flights += [(int(g), actor, s, published[0]) for g in grant.groups for s in range(G)]
            case 2 | 3 if flights:
                group, actor, sibling, version = flights.pop(int(rng.integers(0, len(flights))))
                message = rollouts(group, [sibling], version, 1, pipeline.routed)
                for _ in range(1 + (rng.random() < 0.2)):
                    recorder.admit(message, actor, published[0])
            case 4 if rng.random() < 0.2:
                recorder.actor_lost(f"a{rng.integers(0, 2)}")
            case 5:
                request = recorder.assemble(published[0])
                if request is not None and rng.random() < 0.5:
                    score(recorder, request, published[0])
            case 4 if recorder.pipeline.config.staleness.auto:
                recorder.set_budget(int(rng.integers(0, 5)), "a whim", at=published[0])
            case 4 if recorder.pipeline.config.obrs.rethin_below:
                recorder.rethin(pipeline.committed_step + 1, published[0])
            case 6 if pipeline.requests:
                asked = [*pipeline.requests.values()]
                score(recorder, asked[rng.integers(len(asked))], published[0])
            case 7:
                step = pipeline.committed_step + 1
                if recorder.shard(step, 0, 2) is not None and step == published[0]:
                    recorder.commit(step, {"loss": float(step)})
                    published[0] += 1
                    if rng.random() < 0.3:
                        recorder.checkpointed(step)
                    if rng.random() < 0.3 and recorder.journal is not None:
                        recorder.snapshot()


def score(recorder: Recorder, request: wire.ScoreRequest, version: int) -> None:
    rng = np.random.default_rng(request.request)
    log_p = np.where(request.wanted, -rng.random(len(request.token_ids)) * 1.5, 0).astype(np.float32)
    result = wire.ScoreResult(
        request.request, max(version, request.min_version), 0.1, log_p, np.zeros((len(log_p), 0), np.float32)
    )
    recorder.scored(result)


def settle(journal: Journal) -> None:
    journal.flush()
    while journal.durable < journal.last:
        journal.check()


def fingerprint(pipeline: Pipeline) -> dict:
    """Everything that later decisions and answers depend on."""
    state = pipeline.state()
    steps = [s[0] for s in state["steps"]]
    state["digests"] = [decision_digests(pipeline, s) for s in steps]
    whole = [s for s in steps if not pipeline.steps.being_scored(s)]  # not those that are thinned again
    state["shards"] = [shard_digests([pipeline.shard(s, r, 2) for r in range(2)]) for s in whole]
    state["receipts"] = [pipeline.step(s).receipt for s in steps]
    return state


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30), lives=st.lists(st.integers(1, 120), min_size=1, max_size=4))
def test_a_broker_killed_at_any_instant_comes_back_where_it_was(tmp_path: Path, name: str, seed: int, lives: list[int]):
    directory = tmp_path / f"{seed}-{len(lives)}-{lives[0]}-{len(list(tmp_path.iterdir()))}"
    rng, published, flights = np.random.default_rng(seed), [0], []
    before = None
    for turns in lives:
        journal = Journal(directory, "r", 64)
        pipeline = pipeline_of(name)
        if journal.last >= 0:
            found = recover(pipeline, journal)
            assert found.differences == []
            recover(looked_at := pipeline_of(name), journal)  # looking makes shards
            assert fingerprint(looked_at) == before
        recorder = Recorder(pipeline, journal, dict)
        if journal.last < 0:
            recorder.begin(0)
            recorder.questions([4])
        drive(recorder, rng, published, turns, flights)
        settle(journal)
        before = fingerprint(pipeline)
        assert pipeline.queued == pipeline.held()
        journal.close()
    journal = Journal(directory, "", 64, read_only=True)
    again = pipeline_of(name)
    for event in journal.events():
        apply(again, event)
        assert difference(again, event) == ""
    assert {**fingerprint(again), "counts": 0} == {**before, "counts": 0}
    journal.close()


def test_expert_records_come_back_with_their_shards_byte_for_byte(tmp_path: Path):
    pipeline = pipeline_of("routed")
    journal = Journal(tmp_path / "j", "r", 64)
    recorder = Recorder(pipeline, journal, dict)
    recorder.begin(0)
    sent = {}
    for group in recorder.grant("a", B, 0).groups.tolist():
        message = rollouts(group, list(range(G)), 0, 1, ROUTING.width)
        sent[group] = message.experts
        assert recorder.admit(message, "a", 0).reasons == [""] * G
    score(recorder, recorder.assemble(0), 0)
    shards = [recorder.shard(0, rank, 2) for rank in range(2)]
    settle(journal)
    journal.close()
    journal = Journal(tmp_path / "j", "r", 64)
    again = pipeline_of("routed")
    assert recover(again, journal).differences == []
    for rank, shard in enumerate(shards):
        assert [bytes(f) for f in encode(again.shard(0, rank, 2))] == [bytes(f) for f in encode(shard)]
        assert shard.experts.size
    np.testing.assert_array_equal(again.step(0).batch.experts, np.concatenate([sent[g] for g in sorted(sent)]))
    served = next(event for event in journal.events() if event.kind == "served")
    again.shard(0, 0, 2).experts[0, 0] ^= 1
    assert difference(again, served) == "step 0: shards of ranks [0]"
    journal.close()


def test_a_changed_decision_is_named(tmp_path: Path):
    journal = Journal(tmp_path / "j", "r", 64)
    recorder = Recorder(Pipeline(CONFIGS["threshold"], VOCAB), journal, dict)
    recorder.begin(0)
    drive(recorder, np.random.default_rng(3), [0], 400, [])
    settle(journal)
    for change, part in (
        ({"obrs": ObrsSection(threshold=2.0)}, "threshold"),
        ({"run": dataclasses.replace(CONFIGS["threshold"].run, seed=6)}, "coins"),
    ):
        other = Pipeline(config(**change), VOCAB)
        odd = ""
        for event in journal.events():
            apply(other, event)
            odd = odd or difference(other, event)
        assert odd.startswith("step 0: ")
        assert part in odd
        assert "grouping" not in odd
    journal.close()


def test_pruning_keeps_all_that_a_restart_needs(tmp_path: Path):
    journal = Journal(tmp_path / "j", "r", 64)
    pipeline = Pipeline(CONFIGS["threshold"], VOCAB)
    recorder = Recorder(pipeline, journal, dict)
    recorder.begin(0)
    rng, published, flights = np.random.default_rng(4), [0], []
    for _ in range(12):
        drive(recorder, rng, published, 25, flights)
        settle(journal)
        seq = recorder.snapshot()
        settle(journal)
        journal.prune(pipeline.sources(), seq)
    drive(recorder, rng, published, 10, flights)
    settle(journal)
    before, kept = fingerprint(pipeline), sum(1 for _ in journal.events())
    journal.close()
    journal = Journal(tmp_path / "j", "r", 64)
    again = Pipeline(CONFIGS["threshold"], VOCAB)
    recover(again, journal)
    assert fingerprint(again) == before
    assert kept < journal.last
    journal.close()


def test_a_replay_begins_behind_what_was_pruned_and_says_so_where_more_is_pruned_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tools.replay.read_vocab_size", lambda path: VOCAB)
    monkeypatch.setattr("tools.replay.read_routing", lambda config: None)
    gaps = 0
    for seed in range(12):
        where, settings = tmp_path / f"{seed}", config(staleness=StalenessSection(0))
        journal = Journal(where, "r", 64)
        pipeline = Pipeline(settings, VOCAB)
        recorder = Recorder(pipeline, journal, dict)
        recorder.begin(0)
        rng, published, flights = np.random.default_rng(seed), [0], []
        for turn in range(8):
            seq, needed = recorder.snapshot(), pipeline.sources()  # in one commit with what follows
            drive(recorder, rng, published, 25, flights)
            settle(journal)
            if turn:
                journal.prune(needed, seq)
        drive(recorder, rng, published, 5, flights)
        settle(journal)
        journal.close()
        journal = Journal(where, "r", 64, read_only=True)
        held = [event.seq for event in journal.events()]
        gaps += held != list(range(held[0], journal.last + 1))
        found = verify(settings, journal)
        assert not found.difference and found.first + found.events == journal.last + 1, seed
        assert list(range(found.first, journal.last + 1)) == [seq for seq in held if seq >= found.first]
        kept, hole = journal.events, found.first + found.events // 2
        monkeypatch.setattr(
            journal, "events", lambda of=0, kept=kept, hole=hole: (e for e in kept(of) if e.seq != hole)
        )
        with pytest.raises(JournalError, match=r"event \d+ is gone: the run has pruned it meanwhile; once more"):
            verify(settings, journal)
        journal.close()
    assert gaps > 3


@pytest.mark.parametrize("snapshot", [False, True])
def test_other_bounds_at_a_restart_lose_nothing_that_was_granted_under_the_old_ones(tmp_path: Path, snapshot: bool):
    journal = Journal(tmp_path / "j", "r", 64)
    pipeline = Pipeline(config(), VOCAB)
    recorder = Recorder(pipeline, journal, dict)
    recorder.begin(0)
    for group in recorder.grant("a", 100, 0).groups.tolist():
        recorder.admit(rollouts(group, [0, 1], 0, 1), "a", 0)
    if snapshot:
        recorder.snapshot()
    before = fingerprint(pipeline)
    assert pipeline.held() == 3 * B * G  # a budget of 2
    journal.close()
    tight = 1.01 * B * config().rollout.largest_group(0) / (1 << 20)
    assert pipeline.queue_bytes > tight * (1 << 20)
    changed = config(staleness=StalenessSection(0), broker=BrokerSection(assemble_ahead=1, queue_mb=tight))
    journal = Journal(tmp_path / "j", "r", 64)
    again = Pipeline(changed, VOCAB)
    recover(again, journal)
    assert fingerprint(again) == before
    assert again.grant("a", 1, 0) is None
    journal.close()


@pytest.mark.parametrize("snapshot", [False, True])
def test_what_a_run_may_not_change_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: bool):
    journal = Journal(tmp_path / "j", "r", 64)
    recorder = Recorder(Pipeline(config(), VOCAB), journal, dict)
    recorder.begin(0)
    if snapshot:
        recorder.snapshot()
    journal.close()
    journal = Journal(tmp_path / "j", "r", 64)
    rollout = dataclasses.replace(config().rollout, group_size=4, top_logprobs=3)
    other = Pipeline(config(rollout=rollout), VOCAB)
    odd = r"rollout\.group_size=2, not 4 and rollout\.top_logprobs=0, not 3; set that back, or choose another run\.name"
    with pytest.raises(JournalError, match=odd):
        recover(other, journal)
    changed = {
        r"obrs\.threshold=1\.0, not 1\.5": config(obrs=ObrsSection(threshold=1.5)),
        r"advantage\.kind=grpo, not rloo": config(advantage=AdvantageSection(kind="rloo")),
        r"loss\.aggregate=token_mean, not constant": config(loss=LossSection(aggregate="constant")),
        r"rollout\.temperature=1\.0, not 0\.5": config(rollout=dataclasses.replace(config().rollout, temperature=0.5)),
        r"task\.mix=\[\['sort6', 1\.0\]\], not \[\['a', 1\.0\], \['b', 0\.5\]\]": config(
            task=TaskSection(mix={"a": TaskEntry(), "b": TaskEntry(ratio=0.5)})
        ),
    }
    monkeypatch.setattr("tools.replay.read_vocab_size", lambda path: VOCAB)
    for odd, now in changed.items():
        with pytest.raises(JournalError, match=odd):
            recover(Pipeline(now, VOCAB), journal)
        with pytest.raises(JournalError, match=odd):
            verify(now, journal)
    smaller = rf"model\.path's vocab_size={VOCAB}, not 4; set that back"
    with pytest.raises(JournalError, match=smaller):
        recover(Pipeline(config(), 4), journal)
    monkeypatch.setattr("tools.replay.read_vocab_size", lambda path: 4)
    with pytest.raises(JournalError, match=smaller):
        verify(config(), journal)
    longer = dataclasses.replace(config().rollout, max_tokens=7)
    recover(
        Pipeline(config(rollout=longer, obrs=ObrsSection(rethin_below=0.5), loss=LossSection(clip_low=0.1)), VOCAB),
        journal,
    )
    journal.close()


def test_requests_of_a_broker_without_a_journal_are_numbered_apart_from_an_earlier_ones():
    """A replica may still be scoring for the earlier one, and bring what has the same shape."""
    numbers = []
    for generation in range(2):
        pipeline = Pipeline(config(), VOCAB)
        Recorder(pipeline, None, dict).begin(generation)
        for group in pipeline.grant("a", B, 0).groups:
            pipeline.admit(rollouts(int(group), [0, 1], 0, 1), "a", 0)
        numbers.append(pipeline.assemble(0).request)
    assert numbers[1] > numbers[0] + 1_000_000


def test_a_journal_that_numbered_requests_from_0_is_read_so():
    head = {"generation": 3, "budget": 2}
    for more, request in (({}, 0), ({"requests_apart": True}, 3 << 32)):
        pipeline = Pipeline(config(), VOCAB)
        apply(pipeline, Event(0, "begin", head | more, []))
        groups = pipeline.grant("a", B, 0).groups
        for group in groups:
            pipeline.admit(rollouts(int(group), [0, 1], 0, 1), "a", 0)
        assert groups[0] == 3 << 32 and pipeline.assemble(0).request == request


@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize("mixed_first", [False, True])
def test_whether_the_broker_mixes_rewards_may_not_change_either(tmp_path: Path, mixed_first: bool, snapshot: bool):
    pair = [config(), config(reward=RewardSection(normalise="group"))]
    first, second = pair[::-1] if mixed_first else pair
    journal = Journal(tmp_path / "j", "r", 64)
    recorder = Recorder(Pipeline(first, VOCAB), journal, dict)
    recorder.begin(0)
    if snapshot:
        recorder.snapshot()
    journal.close()
    journal = Journal(tmp_path / "j", "r", 64)
    odd = rf"reward\.normalise, .*\)={mixed_first}, not {not mixed_first}; set that back"
    with pytest.raises(JournalError, match=odd):
        recover(Pipeline(second, VOCAB), journal)
    recover(Pipeline(first, VOCAB), journal)
    journal.close()


def test_of_older_journals_it_is_known_by_what_they_say_of_it():
    plain, mixing = (fixed_settings(c) for c in (config(), config(reward=RewardSection(normalise="group"))))
    for old in (dict(plain), dict(mixing)):
        mixes = old.pop(MIXING)
        assert bool(changed(old, plain)) == mixes and bool(changed(old, mixing)) == (not mixes)


def test_a_large_snapshot_is_no_cause_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("broker.recorder.SNAPSHOT_BYTES", 10_000)
    journal = Journal(tmp_path / "j", "r", 64)
    recorder = Recorder(Pipeline(config(), VOCAB), journal, lambda: {"much": bytes(50_000)})
    recorder.begin(0)

    def settle() -> None:
        recorder.flush()
        deadline = time.monotonic() + 10
        while journal.durable < journal.last:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def turns(count: int) -> int:
        settle()
        before = journal.count("snapshot")
        for _ in range(count):
            recorder.snapshot_if_due()
            settle()
        return journal.count("snapshot") - before

    recorder.snapshot()
    assert turns(5) == 0
    journal.append("note", {"what": "x", "values": {}}, [bytes(60_000)])
    assert turns(5) == 0  # the snapshots would be most of what is written
    journal.append("note", {"what": "x", "values": {}}, [bytes(60_000)])
    assert turns(5) == 1
    journal.close()


def test_a_journal_has_room_for_the_snapshots_of_a_wide_window():
    rollout = RolloutSection(groups_per_step=64, group_size=16, max_prompt_tokens=24, max_tokens=1000)
    with pytest.raises(ConfigError, match=r"broker\.journal_mb=256\.0: .* and two snapshots of obrs\.window=64, "):
        config(rollout=rollout, obrs=ObrsSection(mode="budget", window=64), broker=BrokerSection(journal_mb=256.0))
    config(rollout=rollout, obrs=ObrsSection(mode="budget", window=1), broker=BrokerSection(journal_mb=256.0))


class Full:
    """A recorder whose journal of 1 MB is filled by bytes that ``sources`` hold on to."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.journal = Journal(directory, "r", 1)
        self.pipeline = Pipeline(config(), VOCAB)
        self.held: list[int] = []
        monkeypatch.setattr(self.pipeline, "sources", lambda: self.held)
        self.recorder = Recorder(self.pipeline, self.journal, dict)
        self.recorder.begin(0)

    def write(self, count: int, hold: bool) -> None:
        for _ in range(count):
            seq = self.journal.append("note", {"what": "x", "values": {}}, [bytes(60_000)])
            self.held += [seq] * hold
            self.settle()

    def settle(self) -> None:
        self.journal.flush()
        deadline = time.monotonic() + 10
        while self.journal.is_deleting or self.journal.durable < self.journal.last:
            self.journal.check()
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def turns(self, count: int = 20) -> int:
        """Snapshots that so many idle turns write."""
        before = self.journal.last
        for _ in range(count):
            self.recorder.make_room()
            self.settle()
        return self.journal.last - before


def test_a_journal_that_is_full_is_emptied_without_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    full = Full(tmp_path / "j", monkeypatch)
    full.write(18, hold=False)
    assert full.recorder.room() == 0
    assert full.turns() == 1 and full.journal.used_bytes < full.journal.limit_bytes / 4
    assert full.recorder.grant("a", 1, 0) is not None
    full.journal.close()


def test_a_journal_much_smaller_than_what_may_be_retained_does_not_stop_a_run_without_checkpoints(tmp_path: Path):
    steps, tokens, journal = 40, 2000, Journal(tmp_path / "j", "r", 1)
    settings = dataclasses.replace(
        CONFIGS["off"], run=RunSection(steps=steps), staleness=StalenessSection(0),
        rollout=RolloutSection(groups_per_step=1, group_size=2, max_prompt_tokens=1, max_tokens=tokens),
        broker=BrokerSection(journal_mb=1.0),
    )  # fmt: skip
    settings.check_room()
    pipeline = Pipeline(settings, VOCAB)
    recorder = Recorder(pipeline, journal, dict)
    recorder.begin(0)
    n = 2 * tokens
    on = np.tile(np.arange(tokens) > 0, 2)
    deadline = time.monotonic() + 30
    while pipeline.committed_step + 1 < steps:
        assert time.monotonic() < deadline, f"stands at step {pipeline.committed_step}: {journal.used_bytes} bytes"
        step = pipeline.ledger.next_step
        granted = recorder.grant("a", 1, step)
        if granted is not None:
            message = wire.Trajectories(
                "r", ["correct"], np.repeat(granted.groups, 2), np.arange(2, dtype=np.int32), np.zeros(2, np.float32),
                np.zeros((2, 1), np.float32), np.zeros(2, np.uint8), np.array([0, tokens, n], np.int32),
                np.zeros(n, np.int32), on.astype(np.uint8), np.where(on, np.float32(-1), np.float32(0)),
                np.where(on, np.int32(step), np.int32(-1)), np.zeros((n, 0), np.int32), np.zeros((n, 0), np.float32),
            )  # fmt: skip
            assert recorder.admit(message, "a", step).reasons == ["", ""]
            recorder.assemble(step)
            assert recorder.shard(step, 0, 1) is not None
            recorder.commit(step, {})
        recorder.make_room()
        recorder.flush()
        time.sleep(0.001)  # for the thread that writes
    journal.close()


@pytest.mark.parametrize("snapshot_bytes", [0, 200_000])
def test_a_journal_that_cannot_be_emptied_is_looked_at_when_something_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot_bytes: int
):
    full = Full(tmp_path / "j", monkeypatch)
    full.recorder._service_state = lambda: {"ballast": bytes(snapshot_bytes)}
    full.write(9, hold=True)
    assert full.turns() <= 1
    full.write(9, hold=True)
    assert full.recorder.grant("a", 1, 0) is None
    assert full.turns() <= 2 and full.recorder.grant("a", 1, 0) is None
    assert full.turns() == 0, "nothing has changed"
    full.held.clear()
    full.pipeline.committed_step += 1
    assert full.turns() == 1
    assert full.recorder.grant("a", 1, 0) is not None
    full.journal.close()


def test_other_settings_of_assembly_at_a_restart_change_nothing_and_impossible_ones_are_named(tmp_path: Path):
    journal = Journal(tmp_path / "j", "r", 64)
    pipeline = Pipeline(CONFIGS["off"], VOCAB)
    recorder = Recorder(pipeline, journal, dict)
    recorder.begin(0)
    drive(recorder, np.random.default_rng(6), [0], 300, [])
    assert pipeline.committed_step > 1
    before = fingerprint(pipeline)
    journal.close()
    journal = Journal(tmp_path / "j", "r", 64)
    hasty = dataclasses.replace(CONFIGS["off"], broker=BrokerSection(assemble_ahead=0, retain_mb=4.0))
    again = Pipeline(hasty, VOCAB)
    recover(again, journal)
    assert fingerprint(again) == before
    short = Pipeline(dataclasses.replace(CONFIGS["off"], run=RunSection(seed=5, steps=1)), VOCAB)
    with pytest.raises(JournalError, match=r"step \d was assembled when the journal was written.*run\.steps"):
        recover(short, journal)
    journal.close()


def test_a_step_is_thinned_again_under_a_later_version_and_never_once_it_was_served(tmp_path: Path):
    pipeline = Pipeline(CONFIGS["rethin"], VOCAB)
    journal = Journal(tmp_path / "j", "r", 64)
    recorder = Recorder(pipeline, journal, dict)
    recorder.begin(0)
    for _ in range(2):
        for group in recorder.grant("a", B, 0).groups:
            recorder.admit(rollouts(int(group), list(range(G)), 0, 1), "a", 0)
        score(recorder, recorder.assemble(0), 0)
    first = pipeline.step(1).decision
    assert recorder.rethin(1, 0) is None  # no newer version
    request = recorder.rethin(1, 1)
    assert pipeline.shard(1, 0, 1) is None  # not before the answer
    assert pipeline.queued == pipeline.held()
    log_p = np.where(request.wanted, -3.0, 0).astype(np.float32)
    recorder.scored(wire.ScoreResult(request.request, 1, 0.1, log_p, np.zeros((len(log_p), 0), np.float32)))
    entry = pipeline.step(1)
    kept = entry.decision.accept == 1
    assert 0 < kept.sum() < first.accepted
    assert (first.accept[kept] == 1).all()
    np.testing.assert_array_equal(entry.decision.log_m[kept], np.minimum(first.log_m[kept], np.float32(-3.0)))
    assert entry.receipt["rethinned_by_version"] == 1
    assert entry.receipt["rethinned_tokens"] == first.accepted - kept.sum()
    assert pipeline.counts["tokens_accepted"] == pipeline.step(0).decision.accepted + kept.sum()
    assert recorder.rethin(1, 2) is None  # once is enough
    assert recorder.shard(0, 0, 1) is not None
    assert recorder.rethin(0, 1) is None  # the learner may have it
    recorder.snapshot()
    settle(journal)
    again = Pipeline(CONFIGS["rethin"], VOCAB)
    assert recover(again, journal).differences == []
    assert fingerprint(again) == fingerprint(pipeline)
    assert again.rethin(0, 1) is None
    journal.close()
