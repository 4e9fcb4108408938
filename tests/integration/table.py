"""An actor's play without a broker: what agents cause, from their requests to finished rollouts."""

import queue
import threading
import time
from collections import Counter

from actor.engine.local import LocalEngine
from actor.play import Play, open_task
from common.config import AdvantageSection, EvaluationSection, ModelSection, RolloutSection, RunConfig, TaskSection
from common.errors import TaskError
from tests.integration import agents


class Watched(LocalEngine):
    """Remembers what it was asked and what it sampled."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked, self.sampled = [], []

    def add(self, request):
        super().add(request)
        self.asked.append(request)

    def step(self, wait_s=0.0):
        ended = super().step(wait_s)
        self.sampled += ended
        return ended

    def pairs(self):
        """(request, completion), by what a completion keeps of its request."""
        waiting = {}
        for request in self.asked:
            waiting.setdefault((request.request_id, request.first_sibling), []).append(request)
        return [(waiting[c.request_id, c.sibling].pop(0), c) for c in self.sampled]


class Table:
    """An actor's play without a broker, in a thread."""

    def __init__(self, model, questions, params, evaluation=0, **rollout):
        limits = {"max_turns": 4, "max_tokens": 12, "max_prompt_tokens": 60, "max_reply_tokens": 60, "group_size": 1}
        params = {"questions": questions, "heldout": 2, **params}
        self.config = RunConfig(
            model=ModelSection(path=str(model)),
            task=TaskSection(name="agent", params=params),
            rollout=RolloutSection(top_logprobs=2, **{**limits, **rollout}),
            evaluation=EvaluationSection(prompts=evaluation, temperature=0.5),
            advantage=AdvantageSection(kind="batch_mean"),  # groups of one
        )
        self.engine = Watched(model, 16, self.config.rollout.max_length)
        self.messages, self.finished, self.counters = [], [], Counter()
        self.play = Play(self.config, open_task(self.config), self.engine, self.counters, self.messages.append)
        self.commands = queue.SimpleQueue()
        self.error = None
        self.paused = False
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        try:
            while True:
                while not self.commands.empty():
                    command = self.commands.get()
                    if command is None:
                        return
                    command()
                self.play.follow_agents()
                if self.engine.busy and not self.paused:
                    self.finished += self.play.collect(self.engine.step())
                else:
                    self.finished += self.play.scored()
                    time.sleep(0.001)
        except TaskError as error:
            self.error = error
        finally:
            self.play.close()

    def start(self, group=0, prompt=0):
        self.commands.put(lambda: self.play.start_group(group, prompt))

    def sit(self, group=0):
        """A rollout that the test plays: (session, where to put its channels)."""
        self.start(group)
        return agents.SESSIONS.get(timeout=10)

    def wait(self, condition, seconds=10):
        deadline = time.monotonic() + seconds
        while not condition(self):
            assert time.monotonic() < deadline, (self.messages, self.counters)
            time.sleep(0.002)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.commands.put(None)
        self.thread.join(10)
        assert not self.thread.is_alive()
