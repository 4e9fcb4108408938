"""Answers written by people in the place of sampled ones: a group's last siblings (``rollout.exemplars``)."""

import logging
from collections import Counter

import numpy as np

from actor.engine.base import Completion
from actor.rollout import Ids
from actor.scoring.exemplars import Exemplars
from actor.scoring.texts import Texts
from actor.tasks.agent import AgentTask
from actor.tasks.base import PromptItem, Task, count_questions
from actor.tasks.mixed import parts_of
from common.config import RunConfig
from common.errors import ConfigError
from common.questions import question_of
from common.routing import read_routing
from common.wire import UNROUTED

NO_VERSION = -1

log = logging.getLogger("actor.scoring")


class Members:
    """Which exemplars belong into a group. Raises ConfigError or TaskError for what cannot be used."""

    def __init__(self, config: RunConfig, task: Task, counters: Counter[str]) -> None:
        self._config, self._parts, self._counters = config, parts_of(task), counters
        self.exemplars: Exemplars | None = None
        self._texts: Texts | None = None
        self._too_long: set[str] = set()
        if config.reward.exemplars:
            labels = config.task.labels
            self.exemplars = Exemplars(config.reward.exemplars, config.rollout_path, labels)
            self._texts = Texts(task, config.rollout_path)
        routing = read_routing(config)
        self._routed = routing.width if routing is not None else 0
        if config.rollout.exemplars:
            self._check(task)

    def _check(self, task: Task) -> None:
        key = f"rollout.exemplars={self._config.rollout.exemplars}"
        if isinstance(task, AgentTask):
            raise ConfigError(
                f"{key}: an agent writes its prompts itself, so nobody can answer them beforehand; set it to 0"
            )
        if self.exemplars is None or not self.exemplars.has_questions:
            raise ConfigError(
                f"{key}: no line of reward.exemplars={self._config.reward.exemplars} names its question; name them, "
                "or set it to 0"
            )

    def question(self, prompt: int) -> int:
        """The number that the question of training prompt ``prompt`` has in its task."""
        number, own = self._config.task.mixture.place(prompt)
        part = self._parts[number]
        size = count_questions(part)
        return question_of(self._config.run.seed, own, size) if size else own

    def of(self, prompt: int, item: PromptItem) -> list[tuple[str, Completion]]:
        """At most ``rollout.exemplars`` answers to the question of ``prompt``, in the file's order."""
        most = self._config.rollout.exemplars
        if not most or self.exemplars is None or self._texts is None:
            return []
        text = self._texts.question(item, item.prompt_ids)
        answers = self.exemplars.of(self._config.task.labels[item.task], self.question(prompt), text)
        found: list[tuple[str, Completion]] = []
        for answer in answers:
            ids = self.exemplars.ids(answer)
            if len(item.prompt_ids) + len(ids) > self._config.rollout.max_length:
                self._leave_out(answer, len(ids))
            elif len(found) < most:
                found.append((answer, self._completion(len(item.prompt_ids), ids)))
        return found

    def _leave_out(self, answer: str, tokens: int) -> None:
        self._counters["exemplars_too_long"] += 1
        if answer not in self._too_long:
            self._too_long.add(answer)
            longest = self._config.rollout.max_length
            log.warning("an exemplar of %d tokens leaves no room for its prompt in %d: %.60r", tokens, longest, answer)

    def _completion(self, prompt: int, ids: Ids) -> Completion:
        """As if it had been sampled, by no version and with no density."""
        alternatives = self._config.rollout.top_logprobs
        n = len(ids)
        return Completion(
            request_id=-1,
            sibling=-1,
            token_ids=ids,
            logprobs=np.zeros(n, np.float32),
            versions=np.full(n, NO_VERSION, np.int32),
            topk_ids=np.zeros((n, alternatives), np.int32),
            topk_logprobs=np.zeros((n, alternatives), np.float32),
            experts=np.full((prompt + n, self._routed), UNROUTED, np.uint16),
            finish_reason="stop",
        )
