"""One colour for every state, in the terminal and on the page; waiting is warm, work is cool.

Each stands out by 3:1 or more from white and from the page's dark ground (WCAG 2.1, 1.4.11), and no two kinds
of work of one role look alike; tests measure both.
"""

from common.trace import IDLE, STATES

WORK = (
    "#3b82f6", "#16a34a", "#8b5cf6", "#0891b2", "#c026d3", "#4d7c0f", "#6366f1", "#0d9488", "#0284c7", "#a855f7",
    "#0e7490", "#64748b",
)  # fmt: skip
WAITING = {
    "credits": "#d97706",
    "weights": "#e11d48",
    "server": "#db2777",
    "scoring": "#ea580c",
    "agents": "#a16207",
    "broker": "#be185d",
    "requests": "#d97706",
    "shard": "#d97706",
    "shard:rollouts": "#d97706",
    "shard:scoring": "#ea580c",
    "shard:packing": "#a16207",
    "shard:publish": "#e11d48",
    "receivers": "#e11d48",
    "ranks": "#db2777",
}
GREY = "#78818c"  # the start, the end, and messages that nobody sent
ENDS = ("start", "end")
OLDER = {"train": "backward", "publish": "send"}  # of runs whose learner told no more


def _assign() -> dict[str, str]:
    """Each kind of work gets the first colour that no other one beside it in any role has."""
    found: dict[str, str] = {}
    working = {role: [s for s in states if not s.startswith(IDLE) and s not in ENDS] for role, states in STATES.items()}
    for states in working.values():
        for state in states:
            beside = {
                found.get(other) for near in working.values() if state in near for other in near if other != state
            }
            found.setdefault(state, next((one for one in WORK if one not in beside), WORK[-1]))
    return found


_OF_WORK = _assign()


def colour(state: str) -> str:
    """``#rrggbb``."""
    if state.startswith(IDLE):
        return WAITING.get(state.removeprefix(IDLE), GREY)
    return _OF_WORK.get(OLDER.get(state, state), GREY)
