"""Timelines made by hand, whose verdict is known by construction: milliseconds in, nanoseconds out."""

from tools.timelines import Instant, Life, Slice, Timelines

MS = 1_000_000


def life(process, role, moves, instants=(), start=0, every=1000, cores=64, cpu=1.0):
    """``moves``: (state, milliseconds[, step]); ``instants``: (milestone, step, at in ms).

    Work has a core ``cpu`` of the time, waiting never.
    """
    header = {"process": process, "role": role, "clock_ns": start * MS, "host": "here", "rank": 0, "cores": cores}
    made = Life(header)
    at, due, totals = start, start + every, {}
    for state, lasts, *step in moves:
        made.slices.append(Slice(state, at * MS, (at + lasts) * MS, step[0] if step else -1))
        at += lasts
        total = totals.setdefault(state, [0, 0, 0])
        total[0] += lasts * MS
        total[1] += 0 if state.startswith("idle.") else int(cpu * lasts * MS)
        total[2] += 1
        if at >= due:
            made.totals.append((at * MS, {s: list(t) for s, t in totals.items()}))
            due = at + every
    made.totals.append((at * MS, {s: list(t) for s, t in totals.items()}))
    made.instants += [Instant("step", when * MS, {"step": step, "what": what}) for what, step, when in instants]
    return made


def timelines(*lives):
    return Timelines(list(lives))


def step_lines(count, step_ms, tokens=1000, lag=1.0, **more):
    """Lines of metrics.jsonl, a step every ``step_ms``."""
    return [
        {
            "kind": "step", "step": step, "time_s": (step + 1) * step_ms / 1000, "tokens_proposed": tokens,
            "tokens_accepted": tokens - 10, "tokens_generated": tokens * (step + 2), "tokens_dropped": 5 * step,
            "lag_mean": lag, "lag_max": 2, "lag_histogram": {"0": tokens // 4, "1": tokens // 2, "2": tokens // 4},
            "kl_before": 2e-3, "kl_after": 1e-3, "ess": 0.9, "dropped": {"actor_lost": 3}, **more,
        }
        for step in range(count)
    ]  # fmt: skip
