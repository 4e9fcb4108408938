"""Lines of JSONL files that users bring."""

import json
import re
from typing import Any

from common.errors import TaskError

_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # how a line of UTF-8 may spell half a character


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
