"""Trajectories made by hand, and batches through the broker's own functions as far as a learner's tokens."""

import numpy as np
import torch

from broker.batch import Batch
from broker.decision import Decision
from broker.packing import make_shards
from broker.trajectories import unpack_all
from common import wire
from common.codec import decode, encode
from common.config import RunConfig
from learner.feed import to_batch
from learner.losses.tokens import Tokens
from learner.model.config import ModelConfig
from learner.step import StepBatch

VOCAB = 19
SHAPE = ModelConfig(
    vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, rms_norm_eps=1e-6, tie_word_embeddings=False,
    num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0,
)  # fmt: skip


def sibling_of(
    group, sibling, reward, token_ids, trainable, log_q, versions, *,
    topk=None, truncated=False, actor="a", event=-1, channels=None, blocks=(), block_rewards=(),
):  # fmt: skip
    """A trajectory of arrays ``[T]``, alone in its message; ``blocks [k, 4]``."""
    n = len(token_ids)
    topk_ids, topk_log_q = (np.zeros((n, 0)), np.zeros((n, 0))) if topk is None else topk
    channels = {"correct": reward} if channels is None else channels
    blocks = np.array(blocks, np.int32).reshape(-1, 4)
    message = wire.Trajectories(
        "made", list(channels), np.array([group]), np.array([sibling], np.int32), np.array([reward], np.float32),
        np.array([list(channels.values())], np.float32), np.array([truncated], np.uint8), np.array([0, n], np.int32),
        np.asarray(token_ids, np.int32), np.asarray(trainable, np.uint8), np.asarray(log_q, np.float32),
        np.asarray(versions, np.int32), np.asarray(topk_ids, np.int32), np.asarray(topk_log_q, np.float32),
        blocks=np.insert(blocks, 0, 0, axis=1), block_rewards=np.array(block_rewards, np.float32),
    )  # fmt: skip
    message.check()
    return unpack_all(message, actor, event)[0]


def trajectory(group, sibling, reward, roles, rng, *, ids=None, log_q=None, versions=None, topk=None, event=-1):
    """``roles[T]``: 0 given, 1 sampled, ``wire.STARTS`` where a segment begins; the rest is drawn unless given."""
    roles = np.asarray(roles, np.uint8)
    n, on = len(roles), roles == 1
    ids = rng.integers(0, VOCAB, n) if ids is None else ids
    log_q = np.log(rng.uniform(0.05, 1, n)) if log_q is None else np.asarray(log_q)
    versions = np.zeros(n) if versions is None else np.asarray(versions)
    return sibling_of(
        group, sibling, float(reward), ids, roles, np.where(on, log_q, 0), np.where(on, versions, -1), topk=topk,
        event=event,
    )  # fmt: skip


def delivered(batch: Batch, decision: Decision, config: RunConfig, world: int = 1) -> list[StepBatch]:
    """What each data rank is given: cut, sent, received and made into tensors."""
    found = []
    for shard in make_shards(batch, decision, world, config):
        message = decode([bytes(frame) for frame in encode(shard)], wire.FROM_BROKER)
        assert isinstance(message, wire.Shard)
        message.check()
        found.append(to_batch(message, torch.device("cpu"), SHAPE, config.rollout.temperature))
    return found


def tokens_of(batch: StepBatch) -> Tokens:
    """Its sampled tokens, as the loss is given them."""
    whole = Tokens(batch.log_q, batch.log_m, batch.log_p_v, batch.advantages, batch.weights, batch.accept)
    return whole[batch.trainable == 1]
