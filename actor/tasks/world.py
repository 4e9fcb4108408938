"""A made-up world of people, places, works and companies: passages about them, questions over several. Pure.

::

    seed -> entities, each with relations to others -> a passage each
    start, 2 to 4 relations -> "Who is the mayor of the birthplace of the creator of Salt River?" -> a name

Everything follows from the seed by Philox, so every actor has the same world.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from actor.tasks.passages import Passage
from common.philox import STREAM_PROMPTS, philox4x32

T = TypeVar("T")

FEWEST_HOPS, MOST_HOPS = 2, 4
DRAWN = 1 << 14  # words at once
ATTEMPTS = 20  # at a question, for each that is wanted
FIRST_YEAR, YEARS = 1700, 300
_ONSETS = ("b", "br", "c", "d", "dr", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v")
_VOWELS = ("a", "e", "i", "o", "u", "ae", "ei", "ia")
_CODAS = ("", "l", "n", "r", "s", "th", "nd", "m")
_CITY_ENDS = ("ford", "burg", "haven", "stad", "mouth", "wick")
_COUNTRY_ENDS = ("ia", "land", "mark", "esia")
_COMPANY_ENDS = ("Works", "Press", "Instruments", "Shipping", "Foundry")
_ADJECTIVES = (
    "Silent", "Golden", "Broken", "Distant", "Hollow", "Crimson", "Patient", "Winter", "Second", "Salt", "Paper",
    "Northern",
)  # fmt: skip
_NOUNS = (
    "Harbour", "Orchard", "Lantern", "Bridge", "Archive", "River", "Garden", "Compass", "Mirror", "Station", "Meadow",
    "Letter",
)  # fmt: skip
_FORMS = ("novel", "symphony", "film", "painting")


@dataclass(frozen=True)
class Relation:
    """From one kind of thing to another, by exactly one each."""

    source: str  # kind
    target: str  # kind; "" for a plain fact
    phrase: str  # of the target, with {} for the source: "the birthplace of {}"
    sentence: str  # in the source's passage: "{} was born in {}."


RELATIONS: dict[str, Relation] = {
    "birthplace": Relation("person", "city", "the birthplace of {}", "{} was born in {}."),
    "mentor": Relation("person", "person", "the mentor of {}", "{}'s mentor was {}."),
    "spouse": Relation("person", "person", "the spouse of {}", "{} married {}."),
    "employer": Relation("person", "company", "the employer of {}", "For many years {} was employed by {}."),
    "mayor": Relation("city", "person", "the mayor of {}", "The mayor of {} is {}."),
    "country": Relation("city", "country", "the country of {}", "{} lies in {}."),
    "twin": Relation("city", "city", "the twin town of {}", "The twin town of {} is {}."),
    "capital": Relation("country", "city", "the capital of {}", "The capital of {} is {}."),
    "anthem": Relation("country", "person", "the composer of the anthem of {}", "The anthem of {} was composed by {}."),
    "author": Relation("work", "person", "the creator of {}", "{} was created by {}."),
    "setting": Relation("work", "city", "the city that is depicted in {}", "{} is about the city of {}."),
    "founder": Relation("company", "person", "the founder of {}", "{} was founded by {}."),
    "seat": Relation("company", "city", "the seat of {}", "{} has its seat in {}."),
}
FACTS: dict[str, Relation] = {
    "born": Relation("person", "", "the birth year of {}", "{} was born in the year {}."),
    "chartered": Relation("city", "", "the founding year of {}", "{} became a city in the year {}."),
    "made": Relation("work", "", "the year of completion of {}", "{} was finished in the year {}."),
    "registered": Relation("company", "", "the registration year of {}", "{} was registered in the year {}."),
}
_KINDS = {"person": "a person", "city": "a city", "country": "a country", "company": "a company"}


class Draws:
    """Whole numbers from Philox, one after another."""

    def __init__(self, seed: int, purpose: int) -> None:
        self._key, self._purpose, self._block = (seed, STREAM_PROMPTS), purpose, 0
        self._words: list[int] = []

    def below(self, limit: int) -> int:
        """Uniform in [0, limit)."""
        if not self._words:
            words = philox4x32(self._key, np.arange(DRAWN), self._block, self._purpose, 1)
            self._words = words[0].tolist()
            self._block += 1
        return self._words.pop() * limit >> 32

    def choice(self, values: Sequence[T]) -> T:
        """One of them."""
        return values[self.below(len(values))]


@dataclass(frozen=True)
class Question:
    """What is asked, and what is right."""

    text: str
    answers: tuple[str, ...]
    path: tuple[str, ...]  # names on the way, from the first to the answer


@dataclass
class World:
    """Names by kind, and what each is related to."""

    names: dict[str, list[str]] = field(default_factory=dict)
    links: dict[tuple[str, str], str] = field(default_factory=dict)  # (name, relation or fact) -> name or year
    forms: dict[str, str] = field(default_factory=dict)  # of works
    kinds: dict[str, str] = field(default_factory=dict)  # of names

    def passages(self) -> list[Passage]:
        """One about each name, in an order that gives nothing away."""
        return [Passage(name, self._tell(name)) for name in sorted(self.kinds)]

    def _tell(self, name: str) -> str:
        kind = self.kinds[name]
        told = [f"{name} is {_KINDS[kind] if kind in _KINDS else 'a ' + self.forms[name]}."]
        for key, relation in {**FACTS, **RELATIONS}.items():
            if relation.source == kind:
                told.append(relation.sentence.format(name, self.links[name, key]))
        return " ".join(told)


def make_world(seed: int, people: int) -> World:
    """``people`` people, and other things in proportion."""
    draws, world = Draws(seed, 1), World()
    counts = {
        "person": people, "city": max(8, people // 4), "country": max(3, people // 20), "company": max(4, people // 6),
        "work": max(8, people // 2),
    }  # fmt: skip
    for kind, count in counts.items():
        world.names[kind] = []
        while len(world.names[kind]) < count:
            name = _name(draws, kind)
            if name not in world.kinds:
                world.names[kind].append(name)
                world.kinds[name] = kind
                if kind == "work":
                    world.forms[name] = draws.choice(_FORMS)
    for key, relation in RELATIONS.items():
        for name in world.names[relation.source]:
            others = world.names[relation.target]
            target = draws.choice(others)
            while target == name:
                target = draws.choice(others)
            world.links[name, key] = target
    for key, fact in FACTS.items():
        for name in world.names[fact.source]:
            world.links[name, key] = str(FIRST_YEAR + draws.below(YEARS))
    return world


def _name(draws: Draws, kind: str) -> str:
    if kind == "work":
        return f"The {draws.choice(_ADJECTIVES)} {draws.choice(_NOUNS)} of {_word(draws, 2)}"
    if kind == "person":
        return f"{_word(draws, 2)} {_word(draws, 3)}"
    if kind == "company":
        return f"{_word(draws, 2)} {draws.choice(_COMPANY_ENDS)}"
    return _word(draws, 2) + draws.choice(_CITY_ENDS if kind == "city" else _COUNTRY_ENDS)


def _word(draws: Draws, syllables: int) -> str:
    parts = [draws.choice(_ONSETS) + draws.choice(_VOWELS) + draws.choice(_CODAS) for _ in range(syllables)]
    return "".join(parts).capitalize()


def make_questions(world: World, seed: int, count: int, hops: tuple[int, int]) -> list[Question]:
    """``count`` different questions. Raises ValueError if the world is too small for so many."""
    draws = Draws(seed, 2)
    found: dict[str, Question] = {}
    for _ in range(ATTEMPTS * count):
        if len(found) == count:
            break
        question = _ask(world, draws, hops[0] + draws.below(hops[1] - hops[0] + 1))
        if question is not None:
            found.setdefault(question.text, question)
    else:
        if len(found) < count:
            raise ValueError(f"{len(found)} different questions are all that there are, not {count}")
    return list(found.values())


def _ask(world: World, draws: Draws, hops: int) -> Question | None:
    """A chain of relations that meets nothing twice, and ends with a fact now and then."""
    start = draws.choice(world.names[draws.choice(("person", "work", "company", "city"))])
    name, phrase, path = start, start, [start]
    for hop in range(hops):
        last = hop == hops - 1
        kind = world.kinds[name]
        keys = [key for key, relation in RELATIONS.items() if relation.source == kind]
        if last and draws.below(4) == 0:
            keys = [key for key, fact in FACTS.items() if fact.source == kind] or keys
        key = draws.choice(keys)
        relation = RELATIONS.get(key) or FACTS[key]
        name, phrase = world.links[name, key], relation.phrase.format(phrase)
        if name in path:
            return None
        path.append(name)
    asks = "Who is" if world.kinds.get(name) == "person" else "What is"
    return Question(f"{asks} {phrase}?", (name,), tuple(path))
