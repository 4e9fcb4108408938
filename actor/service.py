"""The actor process: credits in, trajectories out, weights swapped between tokens.

::

    messages -> start granted groups -> swap weights that arrived -> one decode step -> score -> send
        ^                                                                                   |
        +-----------------------------------------------------------------------------------+

The engine decodes everything in flight together; nothing waits for a group, a grant or a publish.
"""

import dataclasses
import logging
import os
import secrets
import socket
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
import torch

from actor.engine.base import Completion, Engine, SampleRequest
from actor.outbox import Finished, Outbox, pack
from actor.rewards import combine
from actor.tasks.base import PromptItem, Task, make_task
from actor.weights import GroupCollective, bucket_tensors
from common import wire
from common.config import RunConfig
from common.errors import ConfigError, CroupierError, TaskError
from common.link import connect
from common.philox import STREAM_EVALUATION, STREAM_SAMPLING
from common.process import StopFlag
from common.weights import StagedWeights, WeightReceiver

IDLE_WAIT_S = 0.01  # how long an idle actor blocks for a message before it looks for new weights
EVALUATION_ID = 1 << 62  # request ids of evaluations; groups count from 0
EVALUATION_STRIDE = 1 << 24  # prompts of one evaluation

log = logging.getLogger("actor")


@dataclass
class _Evaluation:
    id: int
    items: dict[int, PromptItem]
    prompts: int  # asked for; those without an item failed
    rewards: dict[int, float] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    versions: list[int] = field(default_factory=list)


def make_engine(config: RunConfig) -> Engine:
    """The engine that the configuration names."""
    if config.actor.engine != "local":
        raise ConfigError(
            f"actor.engine={config.actor.engine!r}: only the embedded engine exists; set actor.engine=local"
        )
    from actor.engine.local import LocalEngine

    longest = config.rollout.max_length
    return LocalEngine(
        config.model.path,
        max_sequences=config.actor.max_sequences,
        max_length=longest,
        dtype=getattr(torch, config.model.dtype),
        threads=config.actor.threads,
        record_experts=config.rollout.routing_replay,
        frozen=config.optim.freeze,
        expert_bias=config.loss.expert_bias_rate > 0,
    )


class ActorService:
    """One actor; :meth:`run` returns when the broker says Stop or the process is asked to end."""

    def __init__(self, config: RunConfig, name: str, stop: StopFlag) -> None:
        self.config = config
        self.name = name
        self.stop = stop
        self.task: Task = make_task(config.task.name, config.model.path, config.run.seed, config.task.params)
        combine(dict.fromkeys(self.task.channels, 0.0), config.task.reward_weights)  # wrong weights fail at once
        self.engine = make_engine(config)
        self.outbox = Outbox()
        self.counters: Counter[str] = Counter()
        self._grants: deque[wire.Grant] = deque()
        self._prompts: dict[int, PromptItem] = {}  # by group
        self._left: dict[int, int] = {}  # siblings still sampling, by group
        self._evaluations: dict[int, _Evaluation] = {}
        hello = wire.Hello(
            role="actor",
            name=name,
            run_id="",
            session=secrets.token_hex(4),
            rank=0,
            world=1,
            version=self.engine.version,
            capacity=config.actor.max_sequences // config.rollout.group_size,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        self.link = connect(config.broker, hello)
        device = next(iter(self.engine.weight_targets().values())).device
        deadline = config.weights.deadline_s
        self.receiver = WeightReceiver(self.link.send, lambda prepare: GroupCollective(prepare, deadline, device))

    def run(self) -> None:
        """Sample until told to stop."""
        try:
            if self.link.wait_welcome(self.config.actor.wait_s, lambda: self.stop.is_set) is None:
                return
            log.info("%s serves run %s", self.name, self.link.run_id)
            while not self.stop.is_set:
                self._turn()
        finally:
            self.receiver.close()
            self.link.close("stopped")

    def _turn(self) -> None:
        block = not self.engine.busy and not self._startable()
        while (message := self.link.receive(IDLE_WAIT_S if block else 0.0)) is not None:
            self._handle(message)
            block = False
            if self.stop.is_set:
                return
        self._swap()
        self._start()
        if self.engine.busy:
            began = time.perf_counter()
            completions = self.engine.step()
            self.counters["seconds_decode"] += time.perf_counter() - began  # type: ignore[assignment]
            if completions:
                self._collect(completions)
        self.link.counters = {k: float(v) for k, v in self.counters.items()}

    def _handle(self, message: object) -> None:
        match message:
            case wire.Grant():
                self._grants.append(self._unknown(message))
            case wire.Ack():
                for group, sibling, reason in self.outbox.acknowledge(message):
                    self.counters["refused"] += 1
                    log.warning("the broker refused trajectory %d.%d: %s", group, sibling, reason)
            case wire.Prepare():
                self.receiver.on_prepare(message)
            case wire.Go():
                self.receiver.on_go(message)
            case wire.Welcome():
                for unacknowledged in self.outbox.unacknowledged():
                    self.link.send(unacknowledged)
            case wire.Stop():
                self.stop.set(f"the broker said stop: {message.reason}")

    # ---- weights --------------------------------------------------------------------------------

    def _swap(self) -> None:
        """Use every version that has arrived, oldest first, between two decode steps."""
        while (staged := self.receiver.staged()) is not None:
            try:
                self._use(staged)
            except CroupierError as error:
                log.error("version %d cannot be used: %s", staged.version, error)
                self.receiver.failed(staged, str(error))

    def _use(self, staged: StagedWeights) -> None:
        if staged.version != self.engine.version:  # a resync brings the same version again
            self.engine.swap(staged.version, dict(bucket_tensors(staged.buckets)))
            self.counters["swaps"] += 1
        self.link.set_version(staged.version)
        self.receiver.applied(staged)

    # ---- rollouts -------------------------------------------------------------------------------

    def _unknown(self, grant: wire.Grant) -> wire.Grant:
        """``grant`` without the groups that we have: a broker that came back grants what we owe again."""
        queued = {group for waiting in self._grants for group in waiting.groups.tolist()}
        have = queued | self._left.keys() | self.outbox.groups()
        if not have.isdisjoint(grant.groups.tolist()):
            new = np.array([group not in have for group in grant.groups.tolist()], np.bool_)
            grant = dataclasses.replace(grant, groups=grant.groups[new], prompts=grant.prompts[new])
        return grant

    def _startable(self) -> bool:
        return bool(self._grants) and self._grants[0].min_version <= self.engine.version

    def _start(self) -> None:
        limit = self.config.actor.unacked_mb * (1 << 20)
        while self._startable() and self.outbox.nbytes < limit:
            grant = self._grants.popleft()
            if grant.evaluation >= 0:
                self._start_evaluation(grant.evaluation, grant.evaluation_prompts)
            for group, prompt in zip(grant.groups.tolist(), grant.prompts.tolist(), strict=True):
                self._start_group(group, prompt)

    def _start_group(self, group: int, prompt: int) -> None:
        rollout = self.config.rollout
        try:
            item = self.task.prompt(prompt, "train")
            self._check_prompt(item)
        except TaskError as error:
            self.link.send(wire.GroupFailed(group, f"prompt {prompt}: {error}"))
            return
        self._prompts[group] = item
        self._left[group] = rollout.group_size
        self.engine.add(
            SampleRequest(
                request_id=group,
                prompt_ids=item.prompt_ids,
                samples=rollout.group_size,
                max_tokens=rollout.max_tokens,
                temperature=rollout.temperature,
                noise_key=(self.config.run.seed, STREAM_SAMPLING),
                top_logprobs=rollout.top_logprobs,
                ignore_eos=rollout.ignore_eos,
            )
        )

    def _check_prompt(self, item: PromptItem) -> None:
        limit = self.config.rollout.max_prompt_tokens
        if len(item.prompt_ids) > limit:
            raise TaskError(f"a prompt of {len(item.prompt_ids)} tokens; raise rollout.max_prompt_tokens={limit}")

    def _start_evaluation(self, evaluation: int, prompts: int) -> None:
        items = {n: item for n in range(prompts) if (item := self._heldout(n)) is not None}
        self._evaluations[evaluation] = _Evaluation(evaluation, items, prompts)
        if not items:
            self._finish_evaluation(evaluation)
        for n, item in items.items():
            self.engine.add(
                SampleRequest(
                    request_id=EVALUATION_ID + evaluation * EVALUATION_STRIDE + n,
                    prompt_ids=item.prompt_ids,
                    samples=1,
                    max_tokens=self.config.rollout.max_tokens,
                    temperature=self.config.evaluation.temperature,
                    noise_key=(self.config.run.seed, STREAM_EVALUATION),
                    top_logprobs=0,
                )
            )

    def _collect(self, completions: list[Completion]) -> None:
        finished = []
        for completion in completions:
            if completion.request_id >= EVALUATION_ID:
                self._collect_evaluation(completion)
            else:
                self.counters["tokens"] += len(completion.token_ids)
                scored = self._score(completion)
                if scored is not None:
                    finished.append(scored)
        if finished:
            message = pack(self.link.run_id, self.task.channels, finished)
            self.outbox.add(message)
            self.link.send(message)

    def _score(self, completion: Completion) -> Finished | None:
        """None if the task's own code failed: that is not the policy's fault, and costs one sibling."""
        group = completion.request_id
        item = self._prompts[group]
        self._left[group] -= 1
        if self._left[group] == 0:
            del self._left[group], self._prompts[group]
        try:
            channels, reward = self._reward(item, completion)
        except Exception as error:  # noqa: BLE001  # a verifier is foreign code
            self.counters["reward_failures"] += 1
            reason = f"reward of {self.config.task.name}: {type(error).__name__}: {error}"
            log.warning("trajectory %d.%d: %s", group, completion.sibling, reason)
            self.link.send(wire.GroupFailed(group, reason[:500], completion.sibling))
            return None
        return Finished(group, item.prompt_ids, completion, channels, reward)

    def _reward(self, item: PromptItem, completion: Completion) -> tuple[dict[str, float], float]:
        """Channels and their weighted sum. Raises whatever the task's verifier raises."""
        channels = self.task.reward(item, completion.token_ids)
        return channels, combine(channels, self.config.task.reward_weights)

    def _collect_evaluation(self, completion: Completion) -> None:
        number, n = divmod(completion.request_id - EVALUATION_ID, EVALUATION_STRIDE)
        evaluation = self._evaluations[number]
        try:
            _, evaluation.rewards[n] = self._reward(evaluation.items[n], completion)
        except Exception as error:  # noqa: BLE001  # a verifier is foreign code
            self._evaluation_failed(n, error)
            evaluation.rewards[n] = 0.0
        evaluation.lengths[n] = len(completion.token_ids)
        evaluation.versions += [int(completion.versions.min()), int(completion.versions.max())]
        if len(evaluation.rewards) == len(evaluation.items):
            self._finish_evaluation(number)

    def _heldout(self, n: int) -> PromptItem | None:
        """Held-out prompt ``n``; None, and a reward of 0, if the task cannot make a fitting one."""
        try:
            item = self.task.prompt(n, "heldout")
            self._check_prompt(item)
        except Exception as error:  # noqa: BLE001  # a task is foreign code
            self._evaluation_failed(n, error)
            return None
        return item

    def _evaluation_failed(self, n: int, error: Exception) -> None:
        self.counters["evaluation_failures"] += 1
        log.warning(
            "held-out prompt %d of %s counts as 0: %s: %s", n, self.config.task.name, type(error).__name__, error
        )

    def _finish_evaluation(self, number: int) -> None:
        """Report it; prompts that failed count as 0."""
        evaluation = self._evaluations.pop(number)
        versions = evaluation.versions or [self.engine.version]
        self.link.send(
            wire.EvaluationResult(
                evaluation=number,
                version_min=min(versions),
                version_max=max(versions),
                rewards=np.array([evaluation.rewards.get(n, 0.0) for n in range(evaluation.prompts)], np.float32),
                lengths=np.array([evaluation.lengths.get(n, 0) for n in range(evaluation.prompts)], np.int32),
            )
        )


def run_actor(config: RunConfig, name: str, stop: StopFlag) -> None:
    """Serve one run to its end."""
    ActorService(config, name, stop).run()
