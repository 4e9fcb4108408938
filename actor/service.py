"""The actor process: credits in, trajectories out, weights taken in flight.

::

    messages -> start granted groups -> load weights that arrived -> step the engine -> reply or score -> send
        ^                                                                                            |
        +--------------------------------------------------------------------------------------------+

The engine samples everything in flight together; nothing waits for a group, a grant or a publish.
"""

import dataclasses
import logging
import os
import secrets
import socket
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from actor.engine.base import Completion, Engine, Failure, SampleRequest
from actor.evaluation import EVALUATION_ID, Evaluations
from actor.outbox import Finished, Outbox, pack
from actor.rewards import combine
from actor.rollout import Rollout, Rollouts
from actor.tasks.base import MultiTurnTask, PromptItem, Task, make_task
from actor.weights import GroupCollective
from common import wire
from common.config import RunConfig
from common.errors import ConfigError, TaskError
from common.link import connect
from common.philox import STREAM_EVALUATION, STREAM_SAMPLING
from common.process import StopFlag
from common.weights import StagedWeights, WeightReceiver

IDLE_WAIT_S = 0.01  # how long an idle actor blocks for a message before it looks for new weights
ENGINE_WAIT_S = 0.005  # how long a step may wait for an engine that samples elsewhere
REASON = 500  # characters of a failure that travel

log = logging.getLogger("actor")


def make_engine(config: RunConfig, name: str) -> Engine:
    """The engine that the configuration names, for the actor ``name``."""
    if config.actor.engine == "sglang":
        from actor.engine.sglang import SglangEngine

        return SglangEngine(config, name)
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
        if config.rollout.max_turns > 1 and not isinstance(self.task, MultiTurnTask):
            raise ConfigError(
                f"rollout.max_turns={config.rollout.max_turns}: task {config.task.name} has one turn; set it to 1"
            )
        self.engine = make_engine(config, name)
        self.outbox = Outbox()
        self.counters: Counter[str] = Counter()
        self.rollouts = Rollouts(config.rollout, self.task)
        self._grants: deque[wire.Grant] = deque()
        self._evaluations = Evaluations(config.task.name, self.counters)
        self._loading: StagedWeights | None = None  # the version that the engine is taking into use
        self._using = 0  # the newest version that the engine has had in use
        hello = wire.Hello(
            role="actor",
            name=name,
            run_id="",
            session=secrets.token_hex(4),
            rank=0,
            world=1,
            version=0,
            capacity=config.actor.max_sequences // config.rollout.started,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        self.link = connect(config.broker, hello)
        deadline, device = config.weights.deadline_s, self.engine.device
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
            self.engine.close()

    def _turn(self) -> None:
        block = not self.engine.busy and not self._startable()
        while (message := self.link.receive(IDLE_WAIT_S if block else 0.0)) is not None:
            self._handle(message)
            block = False
            if self.stop.is_set:
                return
        self._take_weights()
        self._start()
        if self.engine.busy:
            began = time.perf_counter()
            ended = self.engine.step(ENGINE_WAIT_S)
            self.counters["seconds_decode"] += time.perf_counter() - began  # type: ignore[assignment]
            if ended:
                self._collect(ended)
        self.link.counters = self.engine.counters | {k: float(v) for k, v in self.counters.items()}

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

    def _take_weights(self) -> None:
        """Use every version that has arrived, oldest first."""
        while self._loading is None and (staged := self.receiver.staged()) is not None:
            if staged.version == self._using:  # a resync brings the same version again
                self.receiver.applied(staged)
            else:
                self._loading = staged
                self.engine.load(staged.version, staged.buckets)
        while self._loading is not None and (loaded := self.engine.loaded()) is not None:
            staged, self._loading = self._loading, None
            if loaded.error:
                log.error("version %d cannot be used: %s", staged.version, loaded.error)
                self.receiver.failed(staged, loaded.error)
                continue
            self.counters["swaps"] += 1
            self._using = staged.version
            self.link.set_version(staged.version)
            self.receiver.applied(staged, adopted=loaded.keeps, copied=not loaded.keeps)

    # ---- rollouts -------------------------------------------------------------------------------

    def _unknown(self, grant: wire.Grant) -> wire.Grant:
        """``grant`` without the groups that we have: a broker that came back grants what we owe again."""
        queued = {group for waiting in self._grants for group in waiting.groups.tolist()}
        have = queued | self.rollouts.request_ids() | self.outbox.groups()
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
            item = self._prompt(prompt, "train")
        except TaskError as error:
            self.link.send(wire.GroupFailed(group, f"prompt {prompt}: {error}"))
            return
        started = self.rollouts.start(group, item, rollout.started, rollout.group_size)
        self._ask_first(started, rollout.temperature, STREAM_SAMPLING, rollout.top_logprobs)

    def _start_evaluation(self, number: int, prompts: int) -> None:
        finished = self._evaluations.start(number, prompts, lambda n: self._prompt(n, "heldout"))
        for request_id, item in self._evaluations.requests(number):
            started = self.rollouts.start(request_id, item, 1, 1)
            self._ask_first(started, self.config.evaluation.temperature, STREAM_EVALUATION, 0)
        if finished is not None:
            self._send_evaluation(finished)

    def _prompt(self, index: int, split: Any) -> PromptItem:
        """Raises TaskError if the task has none or it is too long, and whatever else the task raises."""
        item, limit = self.task.prompt(index, split), self.config.rollout.max_prompt_tokens
        if len(item.prompt_ids) > limit:
            raise TaskError(f"a prompt of {len(item.prompt_ids)} tokens; raise rollout.max_prompt_tokens={limit}")
        return item

    def _ask_first(self, started: Sequence[Rollout], temperature: float, stream: int, top_logprobs: int) -> None:
        """The first turn of all siblings in one request, so that their prompt is read once."""
        first = started[0]
        for rollout in started:
            rollout.given = first.item.prompt_ids
        self.engine.add(
            SampleRequest(
                request_id=first.request_id,
                prompt_ids=first.item.prompt_ids,
                samples=len(started),
                max_tokens=self.config.rollout.max_tokens,
                temperature=temperature,
                noise_key=(self.config.run.seed, stream),
                top_logprobs=top_logprobs,
                ignore_eos=self.config.rollout.ignore_eos and stream == STREAM_SAMPLING,
            )
        )

    def _ask_next(self, rollout: Rollout, given: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """A further turn, sampled as the first was."""
        limits, train = self.config.rollout, rollout.request_id < EVALUATION_ID
        request = self.rollouts.next_turn(
            rollout,
            given,
            (self.config.run.seed, STREAM_SAMPLING if train else STREAM_EVALUATION),
            max_tokens=limits.max_tokens,
            temperature=limits.temperature if train else self.config.evaluation.temperature,
            top_logprobs=limits.top_logprobs if train else 0,
            ignore_eos=limits.ignore_eos and train,
        )
        self.engine.add(request)

    def _collect(self, ended: Sequence[Completion | Failure]) -> None:
        finished = []
        for one in ended:
            rollout = self.rollouts.get(one.request_id, one.sibling)
            if rollout is None:
                continue
            if isinstance(one, Failure):
                self.counters["engine_failures"] += 1
                self._fail(rollout, one.reason)
            elif (scored := self._advance(rollout, one)) is not None:
                finished.append(scored)
        if finished:
            message = pack(self.link.run_id, self.task.channels, finished)
            self.outbox.add(message)
            self.link.send(message)

    def _advance(self, rollout: Rollout, completion: Completion) -> Finished | None:
        """One more turn is sampled: go on, or score what is whole. None unless a trajectory is to be sent.

        A task whose own code fails costs one sibling: that is not the policy's fault.
        """
        self.counters["tokens"] += len(completion.token_ids)
        rollout.take(completion)
        try:
            reply = self.rollouts.reply(rollout)
            if reply is not None:
                self._ask_next(rollout, reply)
                return None
            channels, reward = self._reward(rollout)
        except Exception as error:  # noqa: BLE001  # a task is foreign code
            self.counters["reward_failures"] += 1
            self._fail(rollout, f"{self.config.task.name}: {type(error).__name__}: {error}")
            return None
        place, spare = self.rollouts.ended(rollout)
        for sibling in spare:
            self.engine.cancel(rollout.request_id, sibling)
            self.counters["cancelled"] += 1
        if rollout.request_id >= EVALUATION_ID:
            self._evaluated(rollout, reward)
            return None
        return Finished(rollout.request_id, place, rollout.turns, channels, reward)

    def _reward(self, rollout: Rollout) -> tuple[dict[str, float], float]:
        """Channels and their weighted sum. Raises whatever the task's verifier raises."""
        completions = [turn.completion.token_ids for turn in rollout.turns]
        if isinstance(self.task, MultiTurnTask):
            channels = self.task.reward_turns(rollout.item, completions)
        else:
            channels = self.task.reward(rollout.item, completions[0])
        return channels, combine(channels, self.config.task.reward_weights)

    def _fail(self, rollout: Rollout, reason: str) -> None:
        """``rollout`` will never be whole."""
        log.warning("rollout %d.%d: %s", rollout.request_id, rollout.sibling, reason)
        place = self.rollouts.failed(rollout)
        if rollout.request_id >= EVALUATION_ID:
            self.counters["evaluation_failures"] += 1
            self._evaluated(rollout, 0.0)
        elif place is not None:
            self.link.send(wire.GroupFailed(rollout.request_id, reason[:REASON], place))

    def _evaluated(self, rollout: Rollout, reward: float) -> None:
        finished = self._evaluations.take(rollout, reward)
        if finished is not None:
            self._send_evaluation(finished)

    def _send_evaluation(self, result: wire.EvaluationResult) -> None:
        if result.version_max < 0:  # nothing was sampled
            result = dataclasses.replace(result, version_min=self._using, version_max=self._using)
        self.link.send(result)


def run_actor(config: RunConfig, name: str, stop: StopFlag) -> None:
    """Serve one run to its end."""
    ActorService(config, name, stop).run()
