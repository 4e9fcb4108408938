"""Questions that take several look-ups: the policy searches a corpus, reads what it finds, and answers.

::

    question -> <search>words</search> -> passages -> ... -> <answer>a name</answer> -> correct, format, searches

``params.corpus`` is a JSONL file of passages and ``params.questions`` one of questions; without them a
world is made up from the run's seed, with questions of ``params.hops`` look-ups. The first of the two
tags in a turn counts. Answers are compared as normalised text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actor.tasks.answers import normalised
from actor.tasks.base import PromptItem, Split, refuse_params
from actor.tasks.chat import Chat
from actor.tasks.finite import Questions
from actor.tasks.params import read_number
from actor.tasks.passages import Index, Passage, index_of, open_index
from actor.tasks.questionfile import Line, read_split, read_text
from actor.tasks.world import FEWEST_HOPS, MOST_HOPS, make_questions, make_world
from common.config import RolloutSection
from common.errors import TaskError

PARAMS = (
    "corpus", "questions", "heldout", "question", "answer", "system", "top_k", "people", "hops", "count"
)  # fmt: skip
OF_WORLD, OF_FILES = ("people", "hops", "count"), ("questions", "question", "answer")
ASK = (
    "Answer the question. To look something up write <search>words</search> and end your turn; you are then shown "
    "passages. When you know the answer write <answer>answer</answer>.\n\nQuestion: {question}"
)
NEITHER = "That holds neither <search>words</search> nor <answer>answer</answer>."
NOTHING = "No passage holds any of these words."
DEFAULT_TOP_K, DEFAULT_PEOPLE, DEFAULT_QUESTIONS, DEFAULT_HELD_OUT = 3, 300, 2000, 200
READ = 20_000  # characters of a turn that are looked at
_TAGS = {
    kind: (re.compile(f"<{kind}>", re.IGNORECASE), re.compile(f"</{kind}>", re.IGNORECASE))
    for kind in ("search", "answer")
}

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Turn:
    """What the policy did."""

    search: str | None = None
    answer: str | None = None


class SearchTask:
    """See the module. ``correct``: the answer is right; ``format``: every turn held a tag and the last an answer.

    ``searches`` counts look-ups. Raises TaskError for files and parameters that cannot be used.
    """

    channels = ("correct", "format", "searches")
    slow = True  # a search in a large corpus takes milliseconds

    def __init__(self, model_dir: str, seed: int, params: dict[str, Any]) -> None:
        refuse_params("search", params, PARAMS)
        self._system = read_text(params, "system", "")
        self._top_k = int(read_number(params, "top_k", DEFAULT_TOP_K, 1, 100))
        self._index: Index
        if "corpus" in params:
            self._refuse(params, OF_WORLD, "belongs to a world that is made up; remove it, or task.params.corpus")
            self._index = open_index(Path(read_text(params, "corpus", "")))
            train, heldout = read_split(params, ("questions",))
        else:
            self._refuse(params, OF_FILES, "needs task.params.corpus, a JSONL file of passages")
            self._index, train, heldout = _make_up(seed, params)
        self._questions = Questions(seed, train, heldout)
        self._chat = Chat(model_dir)
        self._room = 0  # tokens of a reply

    def _refuse(self, params: dict[str, Any], names: tuple[str, ...], reason: str) -> None:
        for name in names:
            if name in params:
                raise TaskError(f"task.params.{name}={params[name]!r}: {reason}")

    @property
    def questions(self) -> int:
        """Those to train on."""
        return len(self._questions.train)

    @property
    def held_out(self) -> int:
        """Those for evaluation alone."""
        return len(self._questions.heldout)

    def fit(self, rollout: RolloutSection) -> None:
        """Keep replies within ``rollout.max_reply_tokens``. Raises ConfigError if that has no room for any."""
        needs = "search needs {} for its shortest replies and more for passages"
        self._room = self._chat.room(rollout, NEITHER, needs=needs, times=4 * self._top_k)

    def prompt(self, index: int, split: Split) -> PromptItem:
        """Question ``index``; training goes through all of them in another order each time."""
        line = self._questions.at(index, split)
        return PromptItem(self._chat.prompt(ASK.format(question=line.question), self._system), line)

    def question_text(self, item: PromptItem) -> str:
        """The question, without what is said about look-ups."""
        line: Line = item.reference
        return line.question

    def reply(self, item: PromptItem, completions: Sequence[Ids]) -> Ids | None:
        """The passages for the last turn's search, cut to what a reply may hold; None behind an answer."""
        turn = self._read(completions[-1])
        if turn.answer is not None:
            return None
        said = NEITHER if turn.search is None else show(self._index.search(turn.search, self._top_k))
        return self._chat.reply(said, completions[-1], self._room)

    def reward_turns(self, item: PromptItem, completions: Sequence[Ids]) -> dict[str, float]:
        """Of the first answer that was given."""
        turns = [self._read(completion) for completion in completions]
        answer = next((turn.answer for turn in turns if turn.answer is not None), None)
        line: Line = item.reference
        right = answer is not None and normalised(answer) in map(normalised, line.answers)
        in_form = answer is not None and all(turn != Turn() for turn in turns)
        searches = sum(turn.search is not None for turn in turns)
        return {"correct": float(right), "format": float(in_form), "searches": float(searches)}

    def reward(self, item: PromptItem, completion_ids: Ids) -> dict[str, float]:
        """That of a conversation of one turn."""
        return self.reward_turns(item, [completion_ids])

    def answer(self, item: PromptItem, completion_ids: Ids) -> str | None:
        """The answer of the last turn, normalised; None if it has none."""
        found = self._read(completion_ids).answer
        return None if found is None else normalised(found)

    def _read(self, completion: Ids) -> Turn:
        return read_turn(self._chat.text(completion)[:READ])


def read_turn(text: str) -> Turn:
    """The first tag in ``text`` that is closed."""
    found: dict[int, Turn] = {}
    for kind, (opens, closes) in _TAGS.items():
        begin = opens.search(text)
        end = closes.search(text, begin.end()) if begin else None
        if begin and end:
            found[begin.start()] = Turn(**{kind: text[begin.end() : end.start()].strip()})
    return found[min(found)] if found else Turn()


def show(passages: Sequence[Passage]) -> str:
    """Passages as the policy reads them."""
    if not passages:
        return NOTHING
    return "\n".join(f"[{number}] {p.title}: {p.text}" for number, p in enumerate(passages, 1))


def _make_up(seed: int, params: dict[str, Any]) -> tuple[Index, list[Line], list[Line]]:
    """(passages, questions to train on, held-out ones) of a world from the run's seed."""
    people = int(read_number(params, "people", DEFAULT_PEOPLE, 10, 100_000))
    count = int(read_number(params, "count", DEFAULT_QUESTIONS, 1, 1_000_000))
    held_out = int(read_number(params, "heldout", DEFAULT_HELD_OUT, 0, 100_000))
    hops = params.get("hops", [FEWEST_HOPS, MOST_HOPS])
    ordered = isinstance(hops, list) and len(hops) == 2 and all(isinstance(hop, int) for hop in hops)
    if not ordered or not FEWEST_HOPS <= hops[0] <= hops[1] <= MOST_HOPS:
        raise TaskError(f"task.params.hops={hops!r}: must be two numbers in [{FEWEST_HOPS}, {MOST_HOPS}], in order")
    world = make_world(seed, people)
    try:
        questions = make_questions(world, seed, count + held_out, (hops[0], hops[1]))
    except ValueError as error:
        raise TaskError(f"task.params.people={people}: {error}; ask for fewer (count, heldout) or raise it") from error
    lines = [Line(q.text, q.answers, f"question {number}") for number, q in enumerate(questions)]
    return index_of(world.passages()), lines[held_out:], lines[:held_out]
