"""The run's curves as PNG files, one figure a question."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed or opened

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.run_files import Record, of_kind

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN, RED = "#2563eb", "#ea7317", "#0e9f6e", "#d64545"
TASK_COLORS = (BLUE, ORANGE, GREEN, RED, "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
SIZE = (8.0, 4.2)  # inches
DPI = 130
SMOOTH = 9  # steps in the running mean drawn over a noisy curve
KL_FLOOR = 1e-7  # nats; below it a divergence is a rounding error


def plot_all(run_dir: Path, records: list[Record], budget: int) -> list[str]:
    """Draw every figure that the records can fill; returns the file names."""
    steps = of_kind(records, "step")
    if not steps:
        return []
    figures: list[tuple[str, str, Callable[[Axes], None]]] = [
        ("reward.png", "Reward", lambda axes: _reward(axes, steps, of_kind(records, "eval"))),
        ("lag.png", "Staleness", lambda axes: _lag(axes, steps, budget)),
        ("throughput.png", "Throughput", lambda axes: _throughput(axes, steps)),
        ("optimizer.png", "Loss and gradient norm", lambda axes: _optimizer(axes, steps)),
    ]
    if any(step.get("acceptance_expected") is not None for step in steps):
        figures.insert(2, ("acceptance.png", "Acceptance", lambda axes: _acceptance(axes, steps)))
    if any(step.get("kl_before") is not None for step in steps):
        figures.insert(3, ("kl.png", "Divergence from the learner", lambda axes: _kl(axes, steps)))
    if any(step.get("joint_kl") is not None for step in steps):
        figures.append(("joint.png", "Rollout model to policy", lambda axes: _joint(axes, steps)))
    figures += _of_evaluations(of_kind(records, "eval"))
    for name, title, draw in figures:
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        _dress(axes, title)
        draw(axes)
        figure.savefig(run_dir / name)
    return [name for name, _, _ in figures]


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=12)
    axes.set_xlabel("optimizer step", color=MUTED)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=MUTED, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _series(steps: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    found = [(step["step"], step[key]) for step in steps if step.get(key) is not None]
    return [x for x, _ in found], [y for _, y in found]


def _running_mean(values: Sequence[float]) -> list[float]:
    half = SMOOTH // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _noisy(axes: Axes, steps: Sequence[Record], key: str, color: str, label: str) -> None:
    x, y = _series(steps, key)
    if len(x) < 2 * SMOOTH:
        axes.plot(x, y, color=color, linewidth=1.8, marker="o", markersize=3.5, label=label)
        return
    axes.plot(x, y, color=color, linewidth=0.8, alpha=0.3)
    axes.plot(x, _running_mean(y), color=color, linewidth=2.0, label=f"{label} (mean of {SMOOTH})")


def _legend(axes: Axes, *others: Axes) -> None:
    """On the title's line, where no curve runs."""
    lines, labels = axes.get_legend_handles_labels()
    for other in others:
        more, names = other.get_legend_handles_labels()
        lines, labels = [*lines, *more], [*labels, *names]
    axes.legend(
        lines,
        labels,
        frameon=False,
        labelcolor=INK,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(labels),
        fontsize=9,
        handlelength=1.6,
        columnspacing=1.4,
    )


def _reward(axes: Axes, steps: Sequence[Record], evaluations: Sequence[Record]) -> None:
    _noisy(axes, steps, "reward", BLUE, "sampled batches")
    if evaluations:
        x = [evaluation["version"] for evaluation in evaluations]
        y = [evaluation["reward"] for evaluation in evaluations]
        _band(axes, evaluations, "reward", ORANGE)
        axes.plot(x, y, color=ORANGE, linewidth=1.4, marker="o", markersize=6, label="held-out prompts")
        ends = {0: "bottom", len(x) - 1: "bottom"}
        for index, side in ends.items():
            axes.annotate(
                f"{y[index]:.2f}", (x[index], y[index]), xytext=(0, 7), textcoords="offset points",
                ha="center", va=side, fontsize=9, color=ORANGE, fontweight="bold",
            )  # fmt: skip
    low = min([0.0, *_series(steps, "reward")[1]])
    high = max([1.0, *_series(steps, "reward")[1]])
    axes.set_ylim(low - 0.02 * (high - low), high + 0.04 * (high - low))
    axes.set_ylabel("mean reward", color=MUTED)
    _legend(axes)


def _of_evaluations(evaluations: Sequence[Record]) -> list[tuple[str, str, Callable[[Axes], None]]]:
    """Figures of held-out evaluations, as far as they have the numbers."""
    found: list[tuple[str, str, Callable[[Axes], None]]] = []
    judged = [line for line in evaluations if "correct" in line]
    if judged:
        found.append(("evaluation.png", "Held-out accuracy", lambda axes: _accuracy(axes, judged)))
    mixed = [line for line in evaluations if line.get("tasks")]
    if mixed:
        found.append(("tasks.png", "Held-out reward by task", lambda axes: _tasks(axes, mixed)))
    stated = [line for line in evaluations if line.get("calibration")]
    if stated:
        found.append(("reliability.png", "Reliability", lambda axes: _reliability(axes, stated[-1])))
    return found


def _band(axes: Axes, lines: Sequence[Record], key: str, color: str) -> None:
    """The 95 % interval of ``key``, where it is known."""
    known = [(x["version"], x[f"{key}_low"], x[f"{key}_high"]) for x in lines if x.get(f"{key}_low") is not None]
    if len(known) > 1:
        x, low, high = zip(*known, strict=True)
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def _accuracy(axes: Axes, lines: Sequence[Record]) -> None:
    """mean@k with its band, pass@k and votes."""
    x = [line["version"] for line in lines]
    _band(axes, lines, "correct", BLUE)
    mean = [line["correct"] for line in lines]
    axes.plot(x, mean, color=BLUE, linewidth=1.8, marker="o", markersize=4, label=f"mean@{lines[-1]['samples']}")
    for k in lines[-1].get("pass_at") or {}:
        drawn = [(line["version"], line["pass_at"][k][0]) for line in lines if k in (line.get("pass_at") or {})]
        if k != "1":  # which is the mean
            axes.plot(*zip(*drawn, strict=True), color=GREEN, linewidth=1.2)
            axes.annotate(f"pass@{k}", drawn[-1], xytext=(6, -3), textcoords="offset points", fontsize=9, color=GREEN)
    for kind, color in (("majority", ORANGE), ("weighted", RED)):
        drawn = [(line["version"], line["votes"][kind][0]) for line in lines if kind in (line.get("votes") or {})]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), color=color, linewidth=1.4, label=f"{kind} vote")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("version", color=MUTED)
    axes.set_ylabel("share of held-out prompts", color=MUTED)
    _legend(axes)


def _tasks(axes: Axes, lines: Sequence[Record]) -> None:
    labels = list(dict.fromkeys(label for line in lines for label in line["tasks"]))
    for index, label in enumerate(labels):
        color = TASK_COLORS[index % len(TASK_COLORS)]
        own = [{"version": line["version"], **line["tasks"][label]} for line in lines if label in line["tasks"]]
        _band(axes, own, "reward", color)
        x, y = [line["version"] for line in own], [line["reward"] for line in own]
        axes.plot(x, y, color=color, linewidth=1.6, marker="o", markersize=4, label=label)
    axes.set_xlabel("version", color=MUTED)
    axes.set_ylabel("mean reward", color=MUTED)
    _legend(axes)


def _reliability(axes: Axes, line: Record) -> None:
    """Accuracy over stated confidence, a point a bin, its area the share of completions."""
    bins = [row for row in line["calibration"]["bins"] if row[0]]
    most = max(count for count, _, _ in bins)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.0, linestyle=(0, (5, 3)), label="calibrated")
    for count, confidence, accuracy in bins:
        axes.plot([confidence, confidence], [confidence, accuracy], color=RED, linewidth=1.2, alpha=0.5)
        axes.scatter(confidence, accuracy, s=20 + 180 * count / most, color=BLUE, zorder=3)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(f"stated confidence, version {line['version']}", color=MUTED)
    axes.set_ylabel("accuracy", color=MUTED)
    _legend(axes)


def _lag(axes: Axes, steps: Sequence[Record], budget: int) -> None:
    x, mean = _series(steps, "lag_mean")
    _, largest = _series(steps, "lag_max")
    axes.fill_between(x, mean, largest, color=BLUE, alpha=0.12, linewidth=0, step="mid", label="up to the oldest token")
    axes.plot(x, mean, color=BLUE, linewidth=1.8, label="mean")
    axes.axhline(budget, color=RED, linewidth=1.4, linestyle=(0, (5, 3)), label=f"budget {budget}")
    axes.set_ylim(-0.05 * max(1, budget), max(budget, *largest, 1) * 1.1)
    axes.set_ylabel("versions", color=MUTED)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)


def _acceptance(axes: Axes, steps: Sequence[Record]) -> None:
    x, y = _series(steps, "acceptance")
    lows, highs = _series(steps, "acceptance_low")[1], _series(steps, "acceptance_high")[1]
    if len(lows) == len(highs) == len(x):
        axes.fill_between(x, lows, highs, color=GREEN, alpha=0.18, linewidth=0, label="95 % interval")
    axes.plot(x, y, color=GREEN, linewidth=1.5, label="accepted / proposed")
    expected_x, expected = _series(steps, "acceptance_expected")
    if expected:
        axes.plot(
            expected_x, expected, color=INK, linewidth=1.0, linestyle=(0, (1, 1.5)), label="expected, without coins"
        )
    axes.set_ylim(top=min(1.005, max([*highs, *y]) + 0.01))
    axes.set_ylabel("share of trainable tokens", color=MUTED)
    _legend(axes)


def _kl(axes: Axes, steps: Sequence[Record]) -> None:
    for key, color, label in (("kl_before", RED, "before rejection"), ("kl_after", GREEN, "after rejection")):
        positive = [step for step in steps if (step.get(key) or 0) > 0]
        if positive:
            _noisy(axes, positive, key, color, label)
    if axes.lines:
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(KL_FLOOR, axes.get_ylim()[0]))
        _legend(axes)
    else:
        axes.text(
            0.5, 0.5, "zero at every step: strictly on policy", transform=axes.transAxes, ha="center", color=MUTED
        )
    axes.set_ylabel("KL, nats a token", color=MUTED)


def _joint(axes: Axes, steps: Sequence[Record]) -> None:
    _noisy(axes, steps, "joint_kl", BLUE, "before the step")
    after = [
        {"step": step["step"], "after": step["joint_kl"] - step["joint_kl_drop"]}
        for step in steps
        if step.get("joint_kl") is not None
    ]
    _noisy(axes, after, "after", GREEN, "after it")
    axes.set_yscale("log")
    axes.set_ylabel("KL on what was sampled, nats a token", color=MUTED)
    _legend(axes)


def _throughput(axes: Axes, steps: Sequence[Record]) -> None:
    pairs = [(step["step"], step["time_s"], step.get("tokens_generated")) for step in steps]
    known = [(step, time, tokens) for step, time, tokens in pairs if tokens is not None and time is not None]
    window = max(1, min(SMOOTH, len(known) // 3))
    x, y = [], []
    for (_, time_0, tokens_0), (step, time_1, tokens_1) in zip(known, known[window:], strict=False):
        if time_1 > time_0:
            x.append(step)
            y.append((tokens_1 - tokens_0) / (time_1 - time_0))
    axes.plot(x, y, color=BLUE, linewidth=1.8, label=f"generated, mean of {window} step(s)")
    axes.set_ylim(bottom=0, top=max(y, default=1.0) * 1.15)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("completion tokens / s", color=MUTED)
    _legend(axes)


def _optimizer(axes: Axes, steps: Sequence[Record]) -> None:
    _noisy(axes, steps, "grad_norm", BLUE, "gradient norm")
    axes.set_ylabel("gradient norm", color=BLUE)
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    for side in ("top", "left", "right", "bottom"):
        other.spines[side].set_visible(False)
    other.tick_params(which="both", colors=MUTED, length=0)
    _noisy(other, steps, "loss", ORANGE, "loss")
    other.set_ylabel("loss", color=ORANGE)
    _legend(axes, other)


def plot_replay(run_dir: Path, rows: Sequence[Record]) -> Path:
    """``replay.png``: acceptance and remaining divergence, then and under the other settings."""
    figure = Figure(figsize=(SIZE[0], 1.6 * SIZE[1]), dpi=DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1)
    x = [row["step"] for row in rows]
    _dress(upper, "Accepted share")
    for key, color, label in (("acceptance_then", BLUE, "as it was"), ("acceptance", ORANGE, "other settings")):
        upper.plot(x, [row[key] for row in rows], color=color, linewidth=1.6, label=label)
    _legend(upper)
    _dress(lower, "Divergence from the learner")
    drawn = (
        ("kl_before", RED, "before"),
        ("kl_then", BLUE, "after, as it was"),
        ("kl", ORANGE, "after, other settings"),
    )
    for key, color, label in drawn:
        positive = [(row["step"], row[key]) for row in rows if row[key] > 0]
        lower.plot([p[0] for p in positive], [p[1] for p in positive], color=color, linewidth=1.2, label=label)
    lower.set_yscale("log")
    lower.set_ylim(bottom=max(KL_FLOOR, lower.get_ylim()[0]))
    lower.set_ylabel("KL, nats a token", color=MUTED)
    _legend(lower)
    path = run_dir / "replay.png"
    figure.savefig(path)
    return path
