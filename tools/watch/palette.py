"""One colour for every state, in the terminal and on the page; waiting is warm, work is cool.

Each stands out by 3:1 or more from white and from the page's dark ground (WCAG 2.1, 1.4.11); a test measures it.
"""

from common.trace import IDLE

WORK = ("#3b82f6", "#0d9488", "#8b5cf6", "#0891b2", "#6366f1", "#16a34a", "#a855f7", "#0284c7")
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
OTHER_WAITING = "#78818c"  # for the start, the end, and messages that nobody sent
# States of all roles that work, in an order that keeps those of one role apart.
WORKING = (
    "sample", "score", "forward", "receive", "play", "backward", "admit", "send", "optimizer", "collate",
    "swap", "gather", "thin", "train", "publish", "pack", "load", "reduce", "grant", "joint", "journal",
    "checkpoint", "export", "status",
)  # fmt: skip


def colour(state: str) -> str:
    """``#rrggbb``."""
    if state.startswith(IDLE):
        return WAITING.get(state.removeprefix(IDLE), OTHER_WAITING)
    place = WORKING.index(state) if state in WORKING else len(WORKING)
    return WORK[place % len(WORK)]
