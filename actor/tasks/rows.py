"""Lines of JSONL files that users bring."""

import json
import re
from pathlib import Path
from typing import Any

from common.errors import TaskError

_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # how a line of UTF-8 may spell half a character


def read_lines(path: str, named: str) -> list[str]:
    """Lines of the file ``path``, which an error calls ``named``. Raises TaskError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        where = "" if Path(path).is_absolute() else f" in {Path.cwd()}, where this process was started"
        raise TaskError(f"{named}: no such file{where}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{named}: {error}") from error


def read_row(line: str, where: str) -> dict[str, Any]:
    """The object in ``line``. Raises TaskError, beginning with ``where``, for anything else and for half characters."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise TaskError(f"{where}: must be a JSON object")
    if _HALF.search(line):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise TaskError(
                f"{where}: holds half a character, {half!r}, which UTF-8 cannot say; take it out"
            ) from error
    return row
