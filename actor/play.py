"""Rollouts played: from a granted group or an evaluation to what the broker is told.

::

    start -> engine -> completion -> the task replies -> engine -> ... -> scored -> Finished
               ^                  -> the agent's answer
               +---- its next request (actor.gateway) <-+      its end -> scored -> Finished

Siblings of a task's first turn are asked for in one request, so that their prompt is read once. What
is slow to reply or to score does so beside the sampling (:mod:`actor.scoring`); so do reward models.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actor.engine.base import Completion, Engine, Failure, SampleRequest
from actor.evaluation import EVALUATION_ID, Evaluations, Scored, answer_key
from actor.outbox import Finished
from actor.rewards import combine
from actor.rollout import Ids, Rollout, Rollouts
from actor.scoring.members import Members
from actor.scoring.scorer import Outcome, Scorer
from actor.tasks.agent import AgentTask
from actor.tasks.base import AnsweringTask, BlockTask, HoldingTask, MultiTurnTask, PromptItem, Task, make_task
from actor.tasks.foreign import words_of_failure
from actor.tasks.mixed import MixedTask, parts_of
from common import wire
from common.config import RunConfig
from common.errors import ConfigError, EngineError, TaskError
from common.philox import STREAM_EVALUATION, STREAM_SAMPLING
from common.trace import Tracer, silent

if TYPE_CHECKING:
    from actor.gateway.driver import Driver, Ended

REASON = 500  # characters of a failure that travel
HELD_OUT_SHARE = 4  # one in so many sequences of an actor is for evaluation, however busy training keeps it

log = logging.getLogger("actor")


def open_task(config: RunConfig) -> Task:
    """The configured task, or several as one. Raises TaskError or ConfigError if the configuration does not fit."""
    section, tasks = config.task, {}
    for label, entry in section.entries.items():
        task = tasks[label] = make_task(entry.name, config.rollout_path, config.run.seed, entry.params)
        made = dict.fromkeys([*task.channels, *config.reward.models], 0.0)
        combine(made, entry.reward_weights)  # wrong weights fail at once
        if section.mix and isinstance(task, AgentTask):
            raise ConfigError(
                f"task.mix.{label}: agents hold conversations of their own, through the gateway, and cannot be mixed "
                "with tasks that are sampled here; train it alone with task.name=agent"
            )
    config.reward.check_channels(dict.fromkeys(name for task in tasks.values() for name in task.channels))
    if config.rollout.max_turns > 1 and not any(isinstance(t, MultiTurnTask | AgentTask) for t in tasks.values()):
        raise ConfigError(
            f"rollout.max_turns={config.rollout.max_turns}: task {', '.join(tasks)} has one turn; set it to 1"
        )
    whole = [label for label, task in tasks.items() if not isinstance(task, BlockTask)]
    if config.advantage.blocks != "off" and whole:
        raise ConfigError(
            f"advantage.blocks={config.advantage.blocks}: task {', '.join(whole)} has no blocks, so nothing of it "
            "would be trained; set it to off, or take sort6_confidence, sort6_twice or tagged"
        )
    _check_held_out(config, list(tasks.values()))
    return MixedTask(tasks, section.mixture) if section.mix else tasks[section.name]


def _check_held_out(config: RunConfig, tasks: Sequence[Task]) -> None:
    """Raise ConfigError if an evaluation asks for more of a task's questions than it holds out."""
    prompts, section = config.evaluation.prompts, config.task
    turns = np.bincount(section.mixture.places(np.arange(prompts))[0], minlength=len(tasks))
    for label, task, asked in zip(section.labels, tasks, turns.tolist(), strict=True):
        if isinstance(task, HoldingTask) and asked > task.held_out:
            raise ConfigError(
                f"evaluation.prompts={prompts}: asks {label} for {asked} held-out questions, and "
                f"task.params.heldout={task.held_out} are held out; set evaluation.prompts to less, or heldout to more"
            )


def _make_driver(config: RunConfig, task: Task, engine: Engine) -> "Driver | None":
    if not isinstance(task, AgentTask):
        return None
    from actor.gateway.driver import Driver

    return Driver(config, task, engine.cancel)


class Play:
    """Everything that an actor samples. ``send`` is given GroupFailed and EvaluationResult messages."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        engine: Engine,
        counters: Counter[str],
        send: Callable[[Any], None],
        tracer: Tracer | None = None,
    ) -> None:
        self.config, self.task, self.engine, self.counters = config, task, engine, counters
        self.tracer = tracer or silent()
        self.date = -1  # of what is started now; see Rollout.date
        self.rollouts = Rollouts(config.rollout, task)
        self._send = send
        self._labels = config.task.labels
        channels = [(*part.channels, *config.reward.models) for part in parts_of(task)]
        self._evaluations = Evaluations(self._labels, channels, config.task.mixture, counters)
        self._held_out: deque[tuple[int, PromptItem, int]] = deque()  # (request id, question, samples) to begin
        self._held_out_items: dict[int, PromptItem] = {}  # the same at every evaluation
        self._evaluating = 0  # held-out completions under way
        self._members = Members(config, task, counters)
        self._scorer = Scorer(config, task, self._members.exemplars, counters)
        self._driver = _make_driver(config, task, engine)

    @property
    def waits_for_agents(self) -> bool:
        """Whether agents are at work, who may ask at any moment."""
        return self._driver is not None and self._driver.busy

    @property
    def figures(self) -> dict[str, float]:
        """Of scoring, by name: for the heartbeat."""
        return self._scorer.counters

    def close(self) -> None:
        """Stop the agents, verifiers and reward models."""
        self._scorer.close()
        if self._driver is not None:
            self._driver.close()

    # ---- starting -------------------------------------------------------------------------------

    def start_group(self, group: int, prompt: int) -> None:
        """Question ``prompt`` of the training split, for every sibling."""
        rollout = self.config.rollout
        try:
            item = self._prompt(prompt, "train")
            members, question = self._members.of(prompt, item), self._members.question(prompt)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # a task is foreign code
            self.counters["prompt_failures"] += 1
            what = str(error) if isinstance(error, TaskError) else words_of_failure(error)
            log.warning("prompt %d: %s", prompt, what)
            self._send(wire.GroupFailed(group, f"prompt {prompt}: {what}"[:REASON]))
            return
        siblings = rollout.started_beside(len(members))
        started = self.rollouts.start(group, item, siblings + len(members), rollout.group_size)
        began = self.tracer.now() if self.tracer.follows(group) else 0
        for one in started:
            one.question, one.began = question, began
        self._begin(started, siblings)
        if self.rollouts.get(group, 0) is None:
            return  # it cannot be sampled
        for one, (text, completion) in zip(started[siblings:], members, strict=True):
            one.exemplar = text
            one.take(completion)
            self.counters["exemplars"] += 1
            self._scorer.turn(one, lambda one=one: self._reward(one))  # type: ignore[misc]

    def start_evaluation(self, number: int, prompts: int, samples: int = 1) -> None:
        """Held-out questions ``[0, prompts)``, each completed ``samples`` times."""
        asked, finished = self._evaluations.start(number, prompts, samples, self._held_out_question)
        self._held_out.extend((request_id, item, samples) for request_id, item in asked)
        self._ask_held_out()
        if finished is not None:
            self._send(finished)

    def _ask_held_out(self) -> None:
        """Begin held-out questions while there is room beside training, or else in their own share of it.

        An engine takes its turns in order: all of them at once would make every later turn of a group wait.
        """
        room = self.config.actor.max_sequences
        if isinstance(self.task, AgentTask):
            room = min(room, self.task.workers)
        while self._held_out:
            request_id, item, samples = self._held_out[0]
            own = self._evaluating + samples <= max(samples, room // HELD_OUT_SHARE)
            if not own and len(self.rollouts) + samples > room:
                return
            self._held_out.popleft()
            self._evaluating += samples
            self._begin(self.rollouts.start(request_id, item, samples, samples), samples)

    def _held_out_question(self, index: int) -> PromptItem:
        """Made once: hundreds at the beginning of an evaluation hold up everything else that this actor samples."""
        if index not in self._held_out_items:
            self._held_out_items[index] = self._prompt(index, "heldout")
        return self._held_out_items[index]

    def _prompt(self, index: int, split: Any) -> PromptItem:
        """Raises TaskError if the task has none or it is too long, and whatever else the task raises."""
        item, limit = self.task.prompt(index, split), self.config.rollout.max_prompt_tokens
        if len(item.prompt_ids) > limit:
            raise TaskError(f"a prompt of {len(item.prompt_ids)} tokens; raise rollout.max_prompt_tokens={limit}")
        return item

    def _begin(self, started: Sequence[Rollout], sampled: int) -> None:
        """Sample the first of ``started``, so many; all fail if their question cannot be sampled."""
        for rollout in started:
            rollout.date = self.date
        if self._driver is not None:
            self._driver.start(started)
            return
        prompt_ids = started[0].item.prompt_ids
        for rollout in started:
            rollout.given = prompt_ids
        try:
            self._ask(started[0], prompt_ids, 0, self.config.rollout.max_tokens, samples=sampled)
        except EngineError as error:
            for rollout in started:
                self._fail(rollout, str(error))

    def _ask(self, rollout: Rollout, prompt_ids: Ids, first_token: int, max_tokens: int, samples: int = 1) -> None:
        """One turn of ``rollout`` and the siblings that follow it. Raises EngineError if it cannot be sampled."""
        limits, train = self.config.rollout, rollout.request_id < EVALUATION_ID
        self.engine.add(
            SampleRequest(
                request_id=rollout.request_id,
                prompt_ids=prompt_ids,
                samples=samples,
                max_tokens=max_tokens,
                temperature=limits.temperature if train else self.config.evaluation.temperature,
                noise_key=(self.config.run.seed, STREAM_SAMPLING if train else STREAM_EVALUATION),
                top_logprobs=limits.top_logprobs if train or self._driver is not None else 0,
                ignore_eos=limits.ignore_eos and train,
                first_sibling=rollout.sibling,
                first_token=first_token,
            )
        )

    # ---- going on -------------------------------------------------------------------------------

    def follow_agents(self) -> None:
        """Ask what agents ask; what they have finished is scored."""
        for event in self._driver.poll() if self._driver is not None else ():
            rollout = event.rollout
            if self.rollouts.get(rollout.request_id, rollout.sibling) is not rollout:
                continue  # enough of its siblings have ended, by an event before this one
            if event.ask is None:
                self._played(rollout, event)
                continue
            placed = event.ask.placed
            try:
                self._ask(rollout, placed.prompt_ids, placed.first_token, placed.max_tokens)
            except EngineError as error:
                self._fail(rollout, str(error))

    def _played(self, rollout: Rollout, ended: "Ended") -> None:
        """An agent is done."""
        rollout.turns = ended.turns
        self.counters["segments"] += sum(turn.fresh for turn in ended.turns)
        try:
            if ended.error:
                raise TaskError(ended.error)
            self._scorer.judge(rollout, ended.channels)
        except TaskError as error:
            self.counters["agent_failures"] += 1
            self._fail(rollout, str(error))

    def collect(self, ended: Sequence[Completion | Failure]) -> list[Finished]:
        """What the engine has ended: turns go on, what is whole is scored. Returns what :meth:`scored` does."""
        for one in ended:
            rollout = self.rollouts.get(one.request_id, one.sibling)
            if rollout is None:
                continue
            if isinstance(one, Failure):
                self.counters["engine_failures"] += 1
                self._fail(rollout, one.reason)
            else:
                self._advance(rollout, rollout.dated(one))
        return self.scored()

    def _advance(self, rollout: Rollout, completion: Completion) -> None:
        """One more turn is sampled: its agent goes on, or the task has its word."""
        self.counters["tokens"] += len(completion.token_ids)
        if self._driver is not None:
            self._driver.answer(rollout, completion)
            return
        rollout.take(completion)
        self._scorer.turn(rollout, lambda: self._word(rollout))

    def _word(self, rollout: Rollout) -> Ids | dict[str, float]:
        """The environment's reply, or at the end the channels. Raises whatever the task raises; may run in a thread."""
        reply = self.rollouts.reply(rollout)
        return reply if reply is not None else self._reward(rollout)

    def _reward(self, rollout: Rollout) -> dict[str, float]:
        completions = [turn.completion.token_ids for turn in rollout.turns]
        if isinstance(self.task, MultiTurnTask):
            channels = self.task.reward_turns(rollout.item, completions)
        else:
            channels = self.task.reward(rollout.item, completions[0])
        if self.config.advantage.blocks != "off" and isinstance(self.task, BlockTask):
            rollout.blocks = self.task.blocks(rollout.item, completions, channels)
        return channels

    def scored(self) -> list[Finished]:
        """What tasks and reward models have said since: turns go on, what is whole is to be sent. Never waits."""
        finished = []
        for outcome in self._scorer.poll():
            rollout = outcome.rollout
            if self.rollouts.get(rollout.request_id, rollout.sibling) is not rollout:
                continue  # enough of its siblings have ended
            if outcome.error:
                if outcome.counted:
                    self.counters[outcome.counted] += 1
                self._fail(rollout, outcome.error)
            elif outcome.reply is not None:
                self._go_on(rollout, outcome.reply)
            else:
                finished.append(self._whole(rollout, outcome))
        self._ask_held_out()
        return [one for one in finished if one is not None]

    def _go_on(self, rollout: Rollout, reply: Ids) -> None:
        """The environment has replied: the policy's turn."""
        rollout.given = reply
        prompt_ids = np.concatenate([rollout.context, reply])
        try:
            self._ask(rollout, prompt_ids, rollout.sampled, self.config.rollout.max_tokens)
        except EngineError as error:
            self._fail(rollout, str(error))

    # ---- ending ---------------------------------------------------------------------------------

    def _whole(self, rollout: Rollout, outcome: Outcome) -> Finished | None:
        """``rollout`` is scored. None if it was an evaluation's."""
        place, spare = self.rollouts.ended(rollout)
        for sibling in spare:
            self._scorer.drop(rollout.request_id, sibling)
            if self._driver is not None:
                self._driver.drop(rollout.request_id, sibling, "enough of its siblings have ended")
            else:
                self.engine.cancel(rollout.request_id, sibling)
            self.counters["cancelled"] += 1
        if rollout.request_id >= EVALUATION_ID:
            scored = Scored(outcome.reward, outcome.channels, self._answer(rollout), rollout.sampled)
            self._evaluated(rollout, scored)
            return None
        if rollout.began:
            self._draw(rollout, place)
        return Finished(rollout.request_id, place, rollout.turns, outcome.channels, outcome.reward, rollout.blocks)

    def _draw(self, rollout: Rollout, place: int) -> None:
        """On the timeline: one that every process follows."""
        turns = [turn for turn in rollout.turns if not turn.exemplar]
        self.tracer.span(
            "rollouts", "rollout", rollout.began, self.tracer.now(),
            group=rollout.request_id, sibling=place, tokens=rollout.sampled, turns=len(turns),
            prompt_tokens=sum(len(turn.given) for turn in turns),
            version=min((int(turn.completion.versions.min(initial=1 << 30)) for turn in turns), default=-1),
        )  # fmt: skip

    def _fail(self, rollout: Rollout, reason: str) -> None:
        """``rollout`` will never be whole."""
        log.warning("rollout %d.%d: %s", rollout.request_id, rollout.sibling, reason)
        if self._driver is not None:
            self._driver.drop(rollout.request_id, rollout.sibling, reason)
        place = self.rollouts.failed(rollout)
        if rollout.request_id >= EVALUATION_ID:
            self.counters["evaluation_failures"] += 1
            self._evaluated(rollout, Scored(tokens=rollout.sampled))
        elif place is not None:
            self._send(wire.GroupFailed(rollout.request_id, reason[:REASON], place))

    def _answer(self, rollout: Rollout) -> int:
        """What the completion's votes are counted by."""
        if not isinstance(self.task, AnsweringTask):
            return wire.NO_ANSWER
        try:
            return answer_key(self.task.answer(rollout.item, rollout.turns[-1].completion.token_ids))
        except (Exception, SystemExit) as error:  # noqa: BLE001  # a task is foreign code
            self.counters["answer_failures"] += 1
            log.warning("%s: no answer read: %s", self._labels[rollout.item.task], words_of_failure(error))
            return wire.NO_ANSWER

    def _evaluated(self, rollout: Rollout, scored: Scored) -> None:
        self._evaluating -= 1
        finished = self._evaluations.take(rollout, scored)
        if finished is not None:
            self._send(finished)
