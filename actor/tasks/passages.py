"""A corpus of passages and its index: SQLite's FTS5, ranked by BM25.

::

    corpus.jsonl -> Index: built once, next to the corpus or in a temporary directory -> search("words", 3)

The index is written aside and renamed, by one process at a time, and only read from then on, by any
number of processes and threads. What it was built from stands in it; a corpus that changed is
indexed again.
"""

import os
import re
import shutil
import sqlite3
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from actor.tasks.reading import MARKS
from actor.tasks.rows import read_row
from common.errors import TaskError, passing
from common.locks import lock_within

FORMAT = "1"
TOKENIZER = "porter unicode61 remove_diacritics 2"
BUILD_S = 3600.0  # to wait for another process that builds the same index
MOST_WORDS = 32  # of a query; what comes behind them is not looked for
TITLE_WEIGHT = 2.0  # of a word in a title, beside one in the text
TITLE_KEYS, TEXT_KEYS = ("title", "name"), ("text", "contents", "passage")
COMMON = frozenset(
    [
        "a", "an", "and", "are", "as", "at", "be", "by", "did", "do", "does", "for", "from", "in", "is", "it", "of",
        "on", "or", "that", "the", "to", "was", "were", "what", "when", "where", "which", "who", "whose", "with",
    ]
)  # fmt: skip
_WORD, _PIECE = re.compile(rf"\w[\w{MARKS}]*"), re.compile(r"\w+")  # FTS5's tokenizer cuts words at their marks


@dataclass(frozen=True)
class Passage:
    """What is found."""

    title: str
    text: str


def read_corpus(path: Path) -> Iterator[Passage]:
    """Passages of a JSONL file: ``text`` and perhaps a ``title``. Raises TaskError by file and line."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _read_passage(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"task.params.corpus={path}: {error}") from error


def _read_passage(line: str, where: str) -> Passage:
    row = read_row(line, where)
    text = next((row[key] for key in TEXT_KEYS if isinstance(row.get(key), str)), None)
    if text is None:
        raise TaskError(f"{where}: no text under {' or '.join(map(repr, TEXT_KEYS))}")
    return Passage(next((str(row[key]) for key in TITLE_KEYS if row.get(key)), ""), text)


def as_query(text: str) -> str:
    """Any of the words of ``text``, in FTS5's syntax and with nothing of it left to the writer; "" for no words."""
    text = text[:4096]
    words = list(dict.fromkeys(word.casefold() for word in _WORD.findall(text) + _PIECE.findall(text)))
    rare = [word for word in words if word not in COMMON] or words
    return " OR ".join(f'"{word}"' for word in rare[:MOST_WORDS])


class Index:
    """Read only; thread-safe. Raises TaskError for a corpus that cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()

    def search(self, text: str, most: int) -> list[Passage]:
        """The ``most`` best passages for the words of ``text``, the best first; ties in the corpus's order."""
        query = as_query(text)
        if not query:
            return []
        rows = self._connection().execute(
            "SELECT title, text FROM passages WHERE passages MATCH ? ORDER BY bm25(passages, ?, 1.0), rowid LIMIT ?",
            (query, TITLE_WEIGHT, most),
        )
        return [Passage(*row) for row in rows]

    def __len__(self) -> int:
        (count,) = self._connection().execute("SELECT value FROM built WHERE name = 'passages'").fetchone()
        return int(count)

    def _connection(self) -> sqlite3.Connection:
        found: _Held | None = getattr(self._local, "held", None)
        if found is None:
            found = self._local.held = _Held(_open(self.path))
        return found.connection


class _Held:
    """A thread's connection: closed when the thread or its index ends, whichever is first."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        weakref.finalize(self, connection.close)


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(os.fsencode(path))}?mode=ro&immutable=1", uri=True, check_same_thread=False)


def open_index(corpus: Path) -> Index:
    """The index of a JSONL file, built if it is not there, or is not this file's any more."""
    try:
        status = corpus.stat()
    except OSError as error:
        raise TaskError(f"task.params.corpus={corpus}: {error}") from error
    source = f"{FORMAT} {status.st_size} {status.st_mtime_ns}"
    path = corpus.with_name(f"{corpus.name}.fts5")
    if not os.access(corpus.parent, os.W_OK) and not _is_built(path, source):
        temporary = temporary_directory()
        index = Index(temporary / path.name)
        _build(index.path, source, read_corpus(corpus))
        weakref.finalize(index, shutil.rmtree, temporary, ignore_errors=True)
        return index
    if not _is_built(path, source):
        with _alone(path.with_name(f"{path.name}.lock")):
            if not _is_built(path, source):
                _build(path, source, read_corpus(corpus))
    return Index(path)


def index_of(passages: Iterable[Passage]) -> Index:
    """An index in a temporary directory, which goes with it."""
    temporary = temporary_directory()
    index = Index(temporary / "passages.fts5")
    weakref.finalize(index, shutil.rmtree, temporary, ignore_errors=True)
    _build(index.path, FORMAT, passages)
    return index


def temporary_directory() -> Path:
    """One of our own."""
    return Path(tempfile.mkdtemp(prefix="croupier-search-"))


def _is_built(path: Path, source: str) -> bool:
    if not path.is_file():
        return False
    try:
        connection = _open(path)
        try:
            row = connection.execute("SELECT value FROM built WHERE name = 'source'").fetchone()
        finally:
            connection.close()
    except sqlite3.DatabaseError:
        return False
    return row is not None and row[0] == source


def _build(path: Path, source: str, passages: Iterable[Passage]) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    aside.unlink(missing_ok=True)
    try:
        connection = sqlite3.connect(aside)
        try:
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(f"CREATE VIRTUAL TABLE passages USING fts5(title, text, tokenize = '{TOKENIZER}')")
            connection.executemany("INSERT INTO passages VALUES (?, ?)", ((p.title, p.text) for p in passages))
            connection.execute("INSERT INTO passages(passages) VALUES ('optimize')")
            (count,) = connection.execute("SELECT count(*) FROM passages").fetchone()
            if not count:
                raise TaskError(f"{path}: its corpus holds no passages")
            connection.execute("CREATE TABLE built (name TEXT, value TEXT)")
            connection.executemany("INSERT INTO built VALUES (?, ?)", [("source", source), ("passages", str(count))])
            connection.commit()
        finally:
            connection.close()
        os.replace(aside, path)
    except sqlite3.Error as error:
        raise passing(TaskError(f"{path}: the index cannot be built: {error}")) from error  # a full disk, say
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """While no other process is in here with the same ``lock``."""
    with lock.open("w") as file:
        if not lock_within(file, BUILD_S):
            raise passing(TaskError(f"{lock}: another process builds the index for {BUILD_S:g} s now; end it"))
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()
