"""What foreign code raised, in words that lead to it."""

import sysconfig
import traceback
from pathlib import Path

from common.errors import CroupierError

OURS = str(Path(__file__).resolve().parents[2])  # where actor/ and the other rooms are
INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
ROOMS = tuple(f"{OURS}/{room}/" for room in ("actor", "common"))


def words_of_failure(error: BaseException) -> str:
    """Type, text and the innermost line of the user's own: ``KeyError: 'answr' (agents.py:23 in play)``.

    An error of ours says all of it itself; what was raised in no file of the user's comes without a line.
    """
    if isinstance(error, CroupierError):
        return f"{type(error).__name__}: {error}"
    own = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*INSTALLED, *ROOMS, "<"))]
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno} in {own[-1].name})" if own else ""
    try:
        said = str(error)
    except Exception:  # noqa: BLE001  # that is foreign code too
        said = "it cannot say what went wrong"
    return f"{type(error).__name__}: {said}{where}"
