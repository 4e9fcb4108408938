"""Messages of a publish: offered, prepared, sent, applied."""

from dataclasses import dataclass
from typing import Any, ClassVar

from common.errors import DataError
from common.wire.fields import Unchecked

MAX_RANKS = 4096  # of one receiver


@dataclass
class Publish(Unchecked):
    """The learner offers a version. ``tensors`` lists (HF name, dtype, shape) in the order sent."""

    TAG: ClassVar[str] = "publish"
    version: int
    host: str
    port: int  # of the learner's TCPStore
    backend: str  # "gloo" | "nccl"
    bucket_bytes: int
    tensors: list[list[Any]]
    seconds: float = 0.0  # that so many bytes may take, beside weights.deadline_s
    stream: str = "policy"  # whose weights they are: the policy's, or the rollout model's of a run that has one


@dataclass
class Prepare(Unchecked):
    """Broker to a receiver: be ready to receive ``version`` in group ``epoch`` as ``[rank, rank + ranks)``."""

    TAG: ClassVar[str] = "prepare"
    epoch: int
    rank: int  # its first; the learner is 0
    ranks: int  # as many as its last Ready said, one at first
    world: int
    publish: dict[str, Any]  # the Publish, field by field


@dataclass
class Ready:
    """The receiver will enter the collective as soon as it is told Go, if ``ranks`` are what Prepare said.

    If they are not, the broker forms another group. None means: not this time.
    """

    TAG: ClassVar[str] = "ready"
    epoch: int
    version: int
    ranks: int = 1  # processes that receive: the ranks of its SGLang servers, or itself

    def check(self) -> None:
        """Groups stay small."""
        if not 0 <= self.ranks <= MAX_RANKS:
            raise DataError(f"ready: {self.ranks} ranks, must lie in [0, {MAX_RANKS}]")


@dataclass
class Go(Unchecked):
    """Broker to learner and receivers: everyone in ``members`` (rank order) said Ready."""

    TAG: ClassVar[str] = "go"
    epoch: int
    version: int
    members: list[str]
    world: int  # ranks of them all, and the learner's
    stream: str = "policy"


@dataclass
class Published(Unchecked):
    """Learner: the collective is done. ``digest`` is over the bytes sent."""

    TAG: ClassVar[str] = "published"
    epoch: int
    version: int
    digest: str
    seconds: float


@dataclass
class PublishFailed(Unchecked):
    """Learner: the collective broke; the version must be offered again in a new epoch."""

    TAG: ClassVar[str] = "publish_failed"
    epoch: int
    version: int
    reason: str


@dataclass
class Applied(Unchecked):
    """Receiver: the version is in use from now on."""

    TAG: ClassVar[str] = "applied"
    epoch: int
    version: int
    digest: str


@dataclass
class ReceiveFailed(Unchecked):
    """Receiver: the collective or the digest failed; it still serves its old version."""

    TAG: ClassVar[str] = "receive_failed"
    epoch: int
    version: int
    reason: str


@dataclass
class PublishDone(Unchecked):
    """Broker to learner: the publish is settled; ``dropped`` receivers did not take it."""

    TAG: ClassVar[str] = "publish_done"
    version: int
    applied: list[str]
    dropped: list[str]
    stream: str = "policy"


@dataclass
class Resync(Unchecked):
    """Broker to learner: publish your current version of ``stream`` again, ``reason`` says for whom."""

    TAG: ClassVar[str] = "resync"
    reason: str
    stream: str = "policy"
