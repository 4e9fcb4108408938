"""A plain message is read in fewer passes: what is found of it is what a loop over its tokens finds."""

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.batch import collate
from broker.decision import Rule, Scores, accept_all, reject, thin_again
from broker.packing import make_shards
from broker.receipts import receipt
from broker.trajectories import unpack_all
from common import wire
from common.codec import decode, encode, frames_of
from common.config import AdvantageSection, RolloutSection, RunConfig
from common.config.units import BYTES_PER_TOKEN

VOCAB, STEP = 13, 7
TOKEN = st.tuples(
    st.sampled_from([0, 0, 0, 1, 1, 1, 1, 1, 1, wire.STARTS, wire.EXPERT]),
    st.sampled_from([4, 4, 4, 4, 4, 6]),  # its version
    st.sampled_from([False] * 9 + [True]),  # whether what is not sampled says otherwise
)
TRAJECTORY = st.lists(TOKEN, min_size=1, max_size=8)
MESSAGES = st.lists(TRAJECTORY, min_size=1, max_size=4)
SETTLED = settings(max_examples=60)


def message_of(shapes, seed=0):
    """A message of one group whose trajectories begin with a given token and end with a sampled one."""
    rng = np.random.default_rng(seed)
    roles, versions, log_q, cuts = [], [], [], [0]
    for shape in shapes:
        for role, version, odd in [(0, 4, False), *shape, (1, shape[-1][1], False)]:
            odd = odd and role != wire.EXPERT  # which would be a fault
            roles.append(role)
            versions.append(version if role == 1 or odd else -1)
            log_q.append(-float(rng.exponential()) if role == 1 or odd else 0.0)
        cuts.append(len(roles))
    b, n = len(shapes), len(roles)
    sent = wire.Trajectories(
        "r", ["correct"], np.zeros(b, np.int64), np.arange(b, dtype=np.int32), rng.random(b, np.float32),
        rng.random((b, 1), np.float32), np.zeros(b, np.uint8), np.array(cuts, np.int32),
        rng.integers(0, VOCAB, n, np.int32), np.array(roles, np.uint8), np.array(log_q, np.float32),
        np.array(versions, np.int32), np.zeros((n, 0), np.int32), np.zeros((n, 0), np.float32),
    )  # fmt: skip
    return decode([bytes(frame) for frame in encode(sent)], wire.TO_BROKER)


def per_trajectory(message):
    """``(role, version, log q)`` of every token of each."""
    tokens = list(
        zip(message.trainable.tolist(), message.versions.tolist(), message.log_q.tolist(), strict=True)
    )  # fmt: skip
    return [tokens[a:b] for a, b in zip(message.cu_seqlens[:-1], message.cu_seqlens[1:], strict=True)]


@SETTLED
@given(MESSAGES)
def test_what_is_said_of_a_message_is_what_its_tokens_say(shapes):
    message = message_of(shapes)
    found = per_trajectory(message)
    oldest = [min(version for role, version, _ in tokens if role == 1) for tokens in found]
    assert message.summary == (oldest, [sum(role == 1 for role, _, _ in tokens) for tokens in found])
    everything = [token for tokens in found for token in tokens]
    versions = {version for role, version, _ in everything if role == 1}
    assert message.is_plain == (
        len(versions) == 1
        and all(
            role == 1 or (role == 0 and log_q == 0 and version not in versions) for role, version, log_q in everything
        )
    )
    assert message._is_sound(VOCAB, 6) and not message._find_faults(VOCAB, 6, 0, 1)
    assert message.faults(VOCAB, 3).keys() == {b for b, tokens in enumerate(found)}


FAULTS = {
    "a token id below 0": ("token_ids", -1), "a token id above all": ("token_ids", VOCAB),
    "NaN": ("log_q", np.nan), "infinite": ("log_q", np.inf), "minus infinity": ("log_q", -np.inf),
    "positive": ("log_q", 0.5), "of the future": ("versions", 9), "without a version": ("versions", -1),
    "an unknown role": ("trainable", 9),
}  # fmt: skip


@SETTLED
@given(MESSAGES, st.sampled_from(sorted(FAULTS)), st.data())
def test_no_fault_is_overlooked(shapes, what, data):
    message = message_of(shapes)
    name, value = FAULTS[what]
    column = getattr(message, name).copy()
    sampled = np.flatnonzero(message.trainable == 1)
    at = int(data.draw(st.sampled_from(sampled.tolist())))
    column[at] = value
    spoilt = dataclasses.replace(message, **{name: column})
    owner = int(np.searchsorted(message.cu_seqlens, at, side="right")) - 1
    assert owner in spoilt.faults(VOCAB, 6)


@SETTLED
@given(MESSAGES, st.integers(0, 9), st.integers(1, 3), st.sampled_from(["keep", "mask"]))
def test_a_batch_is_the_same_whether_or_not_its_trajectories_are_known_to_be_plain(shapes, seed, world, silent):
    config = RunConfig(
        rollout=RolloutSection(group_size=len(shapes) + 1),
        advantage=AdvantageSection(zero_signal=silent, overlong_filter=silent == "mask"),
    )
    message = message_of(shapes, seed)
    message.finish = (np.arange(len(shapes)) % 2).astype(np.uint8)  # every other one was cut off
    members = unpack_all(message)
    assert [t.nbytes for t in members] == [BYTES_PER_TOKEN * t.length for t in members]
    batches = [
        collate(STEP, [dataclasses.replace(t, plain=known and t.plain) for t in members], config)
        for known in (True, False)
    ]
    assert batches[0].plain == (message.is_plain and batches[0].whole) and not batches[1].plain
    noise = np.random.default_rng(seed).normal(0, 0.5, batches[0].tokens)
    scores = Scores(STEP, np.minimum(0, batches[1].log_q + noise).astype(np.float32), np.zeros((len(noise), 0)))
    rule, later = Rule(3, 0.1), dataclasses.replace(scores, version=STEP + 1)
    ways = (
        accept_all,
        lambda b: reject(b, scores, rule),
        lambda b: thin_again(b, reject(b, scores, rule), later, rule),
    )
    for decide in ways:
        made = []
        for batch in batches:
            decision = decide(batch)
            shards = make_shards(batch, decision, world, config)
            made.append((
                receipt(batch, decision, 1.1), [[bytes(frame) for frame in encode(shard)] for shard in shards],
                batch.on.tolist(), batch.own_log_q.tobytes(), batch.lags.tolist(), batch.counted_tokens.tolist(),
                [rows.tolist() for rows in batch.by_lag(decision.accept == 1)], batch.copies.tolist(), batch.nbytes,
            ))  # fmt: skip
        assert repr(made[0]) == repr(made[1])


def test_what_a_message_came_as_is_what_is_kept_of_it():
    message = message_of([[(1, 4, False)]])
    again = decode([bytes(frame) for frame in frames_of(message)], wire.TO_BROKER)
    assert (
        [bytes(f) for f in encode(again)]
        == [bytes(f) for f in encode(message)]
        == [bytes(f) for f in frames_of(message)]
    )
    changed = dataclasses.replace(message, rewards=message.rewards + 1)
    assert decode([bytes(f) for f in frames_of(changed)], wire.TO_BROKER).rewards[0] == message.rewards[0] + 1
