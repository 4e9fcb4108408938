"""What a misspelt name may have been meant to be."""

import difflib
from collections.abc import Iterable


def suggest(name: str, known: Iterable[str], what: str = "known", else_say: str = "") -> str:
    """The near name as a question, else ``what`` there is, or ``else_say``: the end of an error message."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else else_say or f"{what}: {', '.join(names) or 'none'}"
