"""Every message that two processes exchange, with a shape beside each array.

::

    peer   -> broker   Hello, Heartbeat, Bye
    broker -> peer     Welcome, Refused, WhoAreYou, Pong, Stop
    actor  -> broker   Trajectories, GroupFailed, EvaluationResult
    broker -> actor    Grant, Ack
    broker -> replica  ScoreRequest                 replica -> broker   ScoreResult, ScoreFailed
    learner-> broker   Fetch, Commit, Checkpointed  broker -> learner   Shard, Waiting, KeepBest
    weights            learner: Publish, Published, PublishFailed · broker: Prepare, Go, Resync, PublishDone
                       receiver (actor, replica): Ready, Applied, ReceiveFailed

All travel over one ROUTER (the broker's) and a DEALER per peer. Per-token arrays are aligned at
the token that they describe: ``log_q[t]`` belongs to ``token_ids[t]``. ``N`` counts tokens, ``B``
trajectories, ``k`` the alternatives of ``rollout.top_logprobs`` (0 where none were asked for), ``R``
the experts that one token is routed to (0 without ``rollout.routing_replay``): those of the first
sparse layer in the engine's order of decreasing weight, then those of the next. Row t of ``experts``
belongs to the pass that read token t, prompt tokens included; a token that was never read (the last
one) has a row of UNROUTED.
"""

from typing import Any

from common.wire.actors import (
    NO_ANSWER,
    Ack,
    EvaluationResult,
    Grant,
    GroupFailed,
)
from common.wire.fields import (
    EXPERT,
    FAILED,
    FINISH_REASONS,
    MAX_TEXT,
    NEVER,
    STARTS,
    UNROUTED,
    check_lengths,
    check_offsets,
)
from common.wire.peers import (
    MAX_COUNTERS,
    MAX_FACT,
    MAX_FACTS,
    Bye,
    Heartbeat,
    Hello,
    Pong,
    Refused,
    Stop,
    Welcome,
    WhoAreYou,
)
from common.wire.steps import (
    Checkpointed,
    Commit,
    Fetch,
    KeepBest,
    ScoreFailed,
    ScoreRequest,
    ScoreResult,
    Shard,
    Waiting,
)
from common.wire.trajectories import (
    LOG_Q_TOLERANCE,
    MAX_BLOCKS,
    MAX_MEMBERS,
    Trajectories,
)
from common.wire.weights import (
    MAX_RANKS,
    Applied,
    Go,
    Prepare,
    Publish,
    PublishDone,
    Published,
    PublishFailed,
    Ready,
    ReceiveFailed,
    Resync,
)

__all__ = [
    "EXPERT",
    "FAILED",
    "FINISH_REASONS",
    "FROM_BROKER",
    "LOG_Q_TOLERANCE",
    "MAX_BLOCKS",
    "MAX_COUNTERS",
    "MAX_FACT",
    "MAX_FACTS",
    "MAX_MEMBERS",
    "MAX_RANKS",
    "MAX_TEXT",
    "NEVER",
    "NO_ANSWER",
    "STARTS",
    "TO_BROKER",
    "UNROUTED",
    "Ack",
    "Applied",
    "Bye",
    "Checkpointed",
    "Commit",
    "EvaluationResult",
    "Fetch",
    "Go",
    "Grant",
    "GroupFailed",
    "Heartbeat",
    "Hello",
    "KeepBest",
    "Pong",
    "Prepare",
    "Publish",
    "PublishDone",
    "PublishFailed",
    "Published",
    "Ready",
    "ReceiveFailed",
    "Refused",
    "Resync",
    "ScoreFailed",
    "ScoreRequest",
    "ScoreResult",
    "Shard",
    "Stop",
    "Trajectories",
    "Waiting",
    "Welcome",
    "WhoAreYou",
    "check_lengths",
    "check_offsets",
]

TO_BROKER: dict[str, type[Any]] = {
    m.TAG: m
    for m in (
        Hello, Heartbeat, Bye, Trajectories, GroupFailed, EvaluationResult, ScoreResult, ScoreFailed, Fetch, Commit,
        Checkpointed, Publish, Published, PublishFailed, Ready, Applied, ReceiveFailed,
    )
}  # fmt: skip
FROM_BROKER: dict[str, type[Any]] = {
    m.TAG: m
    for m in (
        Welcome, Refused, WhoAreYou, Pong, Stop, Grant, Ack, ScoreRequest, Shard, Waiting, KeepBest, Prepare, Go,
        PublishDone, Resync,
    )
}  # fmt: skip
