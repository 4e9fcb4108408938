"""How long the learner's ranks wait for each other.

::

    rank 0   publish (the broker, receivers) | send again to who came late | wait for a shard | take part
    others   send their parts, fetch their shard, and wait in the next collective ............|

A receiver that hangs holds up rank 0 and with it everybody, but must end nobody.
"""

from collections.abc import Sequence

from common.config import MEGABYTE, RunConfig
from learner.hf import model_config
from learner.layout import nbytes_of
from learner.mesh import COLLECTIVE_TIMEOUT_S
from learner.model.config import ModelConfig
from learner.weights.publish import longest_s


def patience_s(config: RunConfig, sizes: Sequence[int]) -> float:
    """The mesh's timeout: what a collective may take, beside what rank 0 may do alone before it takes part.

    ``sizes``: bytes of each model that is published; one after the other, and each perhaps twice.
    """
    weights = config.weights
    publishing = sum(longest_s(weights.deadline_s, size / (weights.least_mb_s * MEGABYTE)) for size in sizes)
    return COLLECTIVE_TIMEOUT_S + max(2 * publishing + config.learner.wait_s, config.learner.write_timeout_s)


def published_sizes(config: RunConfig) -> list[int]:
    """Bytes of each model that the learner publishes, as their directories describe them."""
    shapes = [model_config(config)]
    if config.joint.trains:
        shapes.append(ModelConfig.from_hf_dir(config.joint.path))
    return [nbytes_of(shape, config.learner.dtype) for shape in shapes]
