"""How far a run is, in words for people; the screen itself is tools.watch."""

from tools.run_files import Record


def number(value: object, form: str = ".2f") -> str:
    """A figure, or a dash where there is none yet."""
    return format(value, form) if isinstance(value, int | float) else "–"


def duration(seconds: float | None) -> str:
    """``m:ss``, or ``h:mm:ss``, or a dash."""
    if seconds is None or seconds < 0:
        return "–"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def remaining_s(status: Record, first: tuple[float, int] | None) -> float | None:
    """Seconds to go at the pace since ``first`` = (time, step), which leaves the start-up out."""
    step, steps, now = status.get("step"), status.get("steps"), status.get("time")
    if first is None or not step or not steps or not now or step <= first[1]:
        return None
    return float((steps - step) * (now - first[0]) / (step - first[1]))
