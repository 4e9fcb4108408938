"""Goals about files that a shell reaches: FAMILIES, each made from a random generator and a difficulty. Pure.

A goal is data: files to begin with, what a person would be asked, and files wanted in the end.
Difficulty 1 to MOST_DIFFICULT is the number of files and lines.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from actor.sandbox.box import Entry, Tree, directory

MOST_DIFFICULT = 8
WORDS = (
    "amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "heron", "indigo", "jasper", "kelp", "lotus",
    "maple", "nectar", "onyx", "pearl", "quartz", "raven", "sage", "tulip", "umber", "violet",
    "willow", "yarrow", "zephyr",
)  # fmt: skip
LEVELS = ("DEBUG", "INFO", "WARN", "ERROR")
ENDINGS = ("txt", "log", "csv", "md", "cfg", "dat")


@dataclass(frozen=True)
class Goal:
    """One question of the terminal."""

    text: str
    files: Tree  # to begin with
    wanted: Mapping[str, bytes | None]  # path -> contents in the end; None: nothing may be there
    solution: str  # one command that reaches it
    modes: Mapping[str, int] = field(default_factory=dict)  # path -> permission bits that must all be set


def check(goal: Goal, files: Tree | None) -> tuple[bool, float]:
    """(whether everything is as wanted, share of what had to change that has). White space at ends does not count."""
    if files is None:
        return False, 0.0
    before, after = _met(goal, goal.files), _met(goal, files)
    to_do = [name for name, done in before.items() if not done]
    assert to_do, f"nothing is to be done for {goal.text!r}"
    return all(after.values()), sum(after[name] for name in to_do) / len(to_do)


def _met(goal: Goal, files: Tree) -> dict[str, bool]:
    met = {path: _holds(files.get(path), data) for path, data in goal.wanted.items()}
    for path, bits in goal.modes.items():
        entry = files.get(path)
        met[f"mode of {path}"] = entry is not None and entry.kind == "file" and entry.mode & bits == bits
    return met


def _holds(entry: Entry | None, wanted: bytes | None) -> bool:
    if wanted is None or entry is None:
        return wanted is None and entry is None
    return entry.kind == "file" and entry.data.strip() == wanted.strip()


# ---- what they are made of ---------------------------------------------------------------------------


def _text(lines: list[str]) -> Entry:
    return Entry(data="".join(line + "\n" for line in lines).encode())


def _names(rng: Random, count: int, ending: str = "txt") -> list[str]:
    return [f"{word}.{ending}" for word in rng.sample(WORDS, count)]


def _table(rng: Random, difficulty: int) -> tuple[str, list[str], list[list[str]]]:
    """(name of a CSV file, its columns, its rows): a word first, numbers behind it."""
    columns = ["name", *rng.sample(("price", "count", "weight", "score", "year"), 3)]
    rows = [[rng.choice(WORDS), *(str(rng.randrange(1, 100)) for _ in range(3))] for _ in range(4 + 4 * difficulty)]
    return f"{rng.choice(WORDS)}.csv", columns, rows


def _csv(columns: list[str], rows: list[list[str]]) -> Entry:
    return _text([",".join(row) for row in [columns, *rows]])


# ---- families ----------------------------------------------------------------------------------------


def count_lines(rng: Random, difficulty: int) -> Goal:
    """Lines of a log with a level."""
    lines = [f"{rng.choice(LEVELS)} {rng.choice(WORDS)} {rng.randrange(100)}" for _ in range(6 + 8 * difficulty)]
    level, name = rng.choice(LEVELS), rng.choice(_names(rng, 3, "log"))
    count = sum(line.startswith(level) for line in lines)
    return Goal(
        f"Write the number of lines of {name} that begin with {level} to answer.txt.",
        {name: _text(lines)}, {"answer.txt": str(count).encode()}, f"grep -c '^{level}' {name} > answer.txt",
    )  # fmt: skip


def sort_unique(rng: Random, difficulty: int) -> Goal:
    """A list sorted, without repetitions."""
    lines = [rng.choice(WORDS) for _ in range(5 + 5 * difficulty)]
    name, reverse = rng.choice(_names(rng, 3)), rng.random() < 0.5
    wanted = sorted(set(lines), reverse=reverse)
    order = "in reverse alphabetical order" if reverse else "in alphabetical order"
    return Goal(
        f"Write the lines of {name} {order}, each once, to sorted.txt.",
        {name: _text(lines)}, {"sorted.txt": _text(wanted).data}, f"sort -u{'r' * reverse} {name} > sorted.txt",
    )  # fmt: skip


def largest_file(rng: Random, difficulty: int) -> Goal:
    """The largest or smallest file of a directory."""
    names, largest = _names(rng, 3 + difficulty, "dat"), rng.random() < 0.5
    sizes = rng.sample(range(10, 400), len(names))
    files: Tree = {"data": directory()}
    for name, size in zip(names, sizes, strict=True):
        files[f"data/{name}"] = Entry(data=b"x" * size)
    found = (max if largest else min)(zip(sizes, names, strict=True))[1]
    flag, kind = ("-S", "largest") if largest else ("-Sr", "smallest")
    return Goal(
        f"Write the name of the {kind} file in the directory data to answer.txt.",
        files, {"answer.txt": found.encode()}, f"ls {flag} data | head -n 1 > answer.txt",
    )  # fmt: skip


def rename_endings(rng: Random, difficulty: int) -> Goal:
    """Files renamed by a pattern, others left alone."""
    old, new, other = rng.sample(ENDINGS, 3)
    names = rng.sample(WORDS, 3 + difficulty)
    files = {f"{name}.{old if i < 1 + difficulty else other}": _text([f"{name} {i}"]) for i, name in enumerate(names)}
    wanted: dict[str, bytes | None] = {}
    for name, entry in files.items():
        if name.endswith(old):
            wanted |= {name: None, name.removesuffix(old) + new: entry.data}
        else:
            wanted[name] = entry.data
    return Goal(
        f"Rename every file that ends in .{old} so that it ends in .{new}; leave the others as they are.",
        files, wanted, f'for f in *.{old}; do mv "$f" "${{f%.{old}}}.{new}"; done',
    )  # fmt: skip


def column_sum(rng: Random, difficulty: int) -> Goal:
    """The sum of one column."""
    name, columns, rows = _table(rng, difficulty)
    number = rng.randrange(1, 4)
    total = sum(int(row[number]) for row in rows)
    return Goal(
        f"Write the sum of the column {columns[number]} of {name} to answer.txt; its first line names the columns.",
        {name: _csv(columns, rows)}, {"answer.txt": str(total).encode()},
        f"awk -F, 'NR > 1 {{s += ${number + 1}}} END {{print s}}' {name} > answer.txt",
    )  # fmt: skip


def filter_rows(rng: Random, difficulty: int) -> Goal:
    """Rows of a table beyond a threshold, its header kept."""
    name, columns, rows = _table(rng, difficulty)
    number, limit = rng.randrange(1, 4), rng.randrange(20, 80)
    kept = [row for row in rows if int(row[number]) > limit]
    return Goal(
        f"Write {name} without the rows whose {columns[number]} is {limit} or less to kept.csv; "
        "its first line names the columns and stays.",
        {name: _csv(columns, rows)}, {"kept.csv": _csv(columns, kept).data},
        f"awk -F, 'NR == 1 || ${number + 1} > {limit}' {name} > kept.csv",
    )  # fmt: skip


def take_column(rng: Random, difficulty: int) -> Goal:
    """One column of a table, as a list."""
    name, columns, rows = _table(rng, difficulty)
    number = rng.randrange(4)
    return Goal(
        f"Write the values of the column {columns[number]} of {name}, without the line that names the columns, to "
        f"{columns[number]}.txt, one a line in the order of the table.",
        {name: _csv(columns, rows)}, {f"{columns[number]}.txt": _text([row[number] for row in rows]).data},
        f"tail -n +2 {name} | cut -d, -f{number + 1} > {columns[number]}.txt",
    )  # fmt: skip


def join_parts(rng: Random, difficulty: int) -> Goal:
    """Numbered parts put together in the order of their numbers, which is not that of their names."""
    numbers = sorted(rng.sample(range(1, 30), 3 + difficulty))
    parts = {f"part-{number}.txt": _text([f"{rng.choice(WORDS)} {number}"]) for number in numbers}
    whole = b"".join(parts[f"part-{number}.txt"].data for number in numbers)
    shuffled = list(parts.items())
    rng.shuffle(shuffled)
    return Goal(
        "Put the files part-*.txt together in the order of their numbers, the lowest first, as whole.txt.",
        dict(shuffled), {"whole.txt": whole}, "cat $(ls part-*.txt | sort -t- -k2 -n) > whole.txt",
    )  # fmt: skip


def replace_word(rng: Random, difficulty: int) -> Goal:
    """A word replaced in every file of one kind."""
    old, new, *others = rng.sample(WORDS, 6)
    names = _names(rng, 2 + difficulty, "cfg")
    files: Tree = {"conf": directory()}
    wanted: dict[str, bytes | None] = {}
    for i, name in enumerate(names):
        lines = [f"{rng.choice(others)}={rng.choice([old, *others])}" for _ in range(3)]
        files[f"conf/{name}"] = _text([*lines, f"{others[0]}={old}"] if i == 0 else lines)
        wanted[f"conf/{name}"] = files[f"conf/{name}"].data.replace(old.encode(), new.encode())
    files["notes.txt"] = _text([f"{old} stays here"])
    wanted["notes.txt"] = files["notes.txt"].data
    return Goal(
        f"Replace {old} by {new} everywhere in the files of the directory conf, and nowhere else.",
        files, wanted, f"sed -i 's/{old}/{new}/g' conf/*",
    )  # fmt: skip


def delete_empty(rng: Random, difficulty: int) -> Goal:
    """Empty files removed from a tree."""
    folders = rng.sample(WORDS, 1 + difficulty // 2)
    files: Tree = {folder: directory() for folder in folders}
    wanted: dict[str, bytes | None] = {}
    for i, name in enumerate(_names(rng, 3 + difficulty)):
        path = f"{rng.choice(folders)}/{name}"
        files[path] = Entry() if i % 2 == 0 else _text([rng.choice(WORDS)])
        wanted[path] = files[path].data or None
    return Goal(
        "Delete every empty file here and in all directories below; keep the others.",
        files, wanted, "find . -type f -empty -delete",
    )  # fmt: skip


def sort_by_kind(rng: Random, difficulty: int) -> Goal:
    """Files moved into a directory for each ending."""
    endings = rng.sample(ENDINGS, 2 + difficulty // 4)
    files = {f"{word}.{rng.choice(endings)}": _text([word]) for word in rng.sample(WORDS, 3 + difficulty)}
    wanted: dict[str, bytes | None] = {}
    for name, entry in files.items():
        wanted |= {name: None, f"{name.rpartition('.')[2]}/{name}": entry.data}
    return Goal(
        "Move every file into a directory named after its ending: a.txt to txt/a.txt, for example.",
        files, wanted, 'for f in *.*; do mkdir -p "${f##*.}" && mv "$f" "${f##*.}/"; done',
    )  # fmt: skip


def most_frequent(rng: Random, difficulty: int) -> Goal:
    """The word that comes most often."""
    pool = rng.sample(WORDS, 5)
    words = [rng.choice(pool[1:]) for _ in range(8 + 8 * difficulty)]
    most = max(Counter(words).values())
    words += [pool[0]] * (most + 1)
    rng.shuffle(words)
    lines = [" ".join(words[at : at + 6]) for at in range(0, len(words), 6)]
    name = rng.choice(_names(rng, 3))
    return Goal(
        f"Write the word that comes most often in {name} to answer.txt.",
        {name: _text(lines)}, {"answer.txt": pool[0].encode()},
        f"tr ' ' '\\n' < {name} | sort | uniq -c | sort -rn | awk 'NR == 1 {{print $2}}' > answer.txt",
    )  # fmt: skip


def take_lines(rng: Random, difficulty: int) -> Goal:
    """A range of a file's lines."""
    lines = [f"{number} {rng.choice(WORDS)}" for number in rng.sample(range(1000), 8 + 8 * difficulty)]
    first = rng.randrange(2, len(lines) - 3)
    last = rng.randrange(first + 1, len(lines))
    name = rng.choice(_names(rng, 3))
    return Goal(
        f"Write lines {first} to {last} of {name} (the first line is 1, both ends belong) to excerpt.txt.",
        {name: _text(lines)}, {"excerpt.txt": _text(lines[first - 1 : last]).data},
        f"sed -n {first},{last}p {name} > excerpt.txt",
    )  # fmt: skip


def make_executable(rng: Random, difficulty: int) -> Goal:
    """Scripts in a tree made executable."""
    folders = ["", *(f"{word}/" for word in rng.sample(WORDS, 1 + difficulty // 2))]
    files: Tree = {folder.rstrip("/"): directory() for folder in folders[1:]}
    modes = {}
    for i, word in enumerate(rng.sample(WORDS, 3 + difficulty)):
        script = i % 3 != 2
        path = f"{rng.choice(folders)}{word}.{'sh' if script else 'txt'}"
        files[path] = _text(["#!/bin/sh", f"echo {word}"] if script else [word])
        if script:
            modes[path] = 0o100
    return Goal(
        "Make every file that ends in .sh, here and in all directories below, executable for its owner.",
        files, {path: files[path].data for path in modes}, "find . -name '*.sh' -exec chmod u+x {} +", modes,
    )  # fmt: skip


Family = Callable[[Random, int], Goal]
FAMILIES: dict[str, Family] = {
    family.__name__: family
    for family in (
        count_lines, sort_unique, largest_file, rename_endings, column_sum, filter_rows, take_column, join_parts,
        replace_word, delete_empty, sort_by_kind, most_frequent, take_lines, make_executable,
    )
}  # fmt: skip
