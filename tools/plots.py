"""What is drawn of a run, one picture a question."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tools import document
from tools.lived import Lived
from tools.pictures import (
    BLUE,
    DPI,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    RED,
    SERIES,
    SIZE,
    SMOOTH,
    Picture,
    dress,
    from_floor,
    legend,
    noisy,
    place,
    plain,
    running_mean,
    series,
    thinned,
)
from tools.run_files import Record, of_kind

KL_FLOOR = 1e-7  # nats; below it a divergence is a rounding error


def plot_all(run_dir: Path, records: list[Record], budget: int) -> dict[str, document.Figure]:
    """Draw every picture that the records can fill, into ``run_dir`` and for its page; by name without ``.png``."""
    return {picture.stem: place(picture, run_dir) for picture in pictures_of(records, budget)}


def pictures_of(records: list[Record], budget: int) -> list[Picture]:
    """What there is to draw; ``budget``: that of steps that do not say theirs."""
    every, evaluations, alerts = (of_kind(records, kind) for kind in ("step", "eval", "alert"))
    if not every:
        return _of_evaluations(evaluations)
    steps, lags = thinned(every), lag_shares(every)

    def any_has(key: str) -> bool:
        return any(step.get(key) is not None for step in steps)

    drawn: list[tuple[bool, str, str, Callable[[Axes], None]]] = [
        (True, "reward", "Reward", lambda axes: _reward(axes, steps, evaluations)),
        (True, "lag", "Staleness", lambda axes: _lag(axes, steps, budget)),
        (bool(lags), "lags", "Lag of the trained tokens", lambda axes: _lags(axes, lags)),
        (any_has("acceptance_expected"), "acceptance", "Acceptance", lambda axes: _acceptance(axes, steps)),
        (any_has("kl_before"), "kl", "Divergence from the learner", lambda axes: _kl(axes, steps)),
        (any_has("entropy"), "entropy", "Entropy", lambda axes: _entropy(axes, steps, alerts)),
        (any_has("weight_ess"), "signs", "Effective sample size, truncation", lambda axes: _signs(axes, steps, alerts)),
        (True, "throughput", "Throughput", lambda axes: _throughput(axes, steps)),
        (any_has("seconds_train"), "seconds", "Where the learner's time goes", lambda axes: _seconds(axes, steps)),
        (True, "optimizer", "Loss and gradient norm", lambda axes: _optimizer(axes, steps)),
        (any_has("joint_kl"), "joint", "Rollout model to policy", lambda axes: _joint(axes, steps)),
    ]
    of_run = [Picture(f"{name}.png", title, draw) for wanted, name, title, draw in drawn if wanted]
    return of_run + _of_evaluations(evaluations)


def lag_shares(steps: Sequence[Record]) -> dict[int, float]:
    """The share of the trained tokens at each lag, in versions."""
    total: Counter[int] = Counter()
    for step in steps:
        for lag, count in (step.get("lag_histogram") or {}).items():
            total[int(lag)] += int(count)
    tokens = sum(total.values())
    return {lag: total[lag] / tokens for lag in sorted(total)} if tokens else {}


def _reward(axes: Axes, steps: Sequence[Record], evaluations: Sequence[Record]) -> None:
    noisy(axes, steps, "reward", BLUE, "sampled batches")
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
    drawn = [*series(steps, "reward")[1], *(line["reward"] for line in evaluations)]
    low, high = min([0.0, *drawn]), max([1.0, *drawn])
    axes.set_ylim(low - 0.02 * (high - low), high + 0.04 * (high - low))
    axes.set_ylabel("mean reward", color=MUTED)
    legend(axes)


def _of_evaluations(evaluations: Sequence[Record]) -> list[Picture]:
    """Pictures of held-out evaluations, as far as they have the numbers."""
    found: list[Picture] = []
    judged = [line for line in evaluations if "correct" in line]
    if judged:
        found.append(Picture("evaluation.png", "Held-out accuracy", lambda axes: _accuracy(axes, judged)))
    mixed = [line for line in evaluations if line.get("tasks")]
    if mixed:
        found.append(Picture("tasks.png", "Held-out reward by task", lambda axes: _tasks(axes, mixed)))
    stated = [line for line in evaluations if line.get("calibration")]
    if stated:
        found.append(Picture("reliability.png", "Reliability", lambda axes: _reliability(axes, stated[-1])))
    return found


def _band(axes: Axes, lines: Sequence[Record], key: str, color: str) -> None:
    """The 95 % interval of ``key``, where it is known."""
    rows = [(line["version"], line.get(f"{key}_low"), line.get(f"{key}_high")) for line in lines]
    known = [row for row in rows if None not in row]
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
    legend(axes)


def _tasks(axes: Axes, lines: Sequence[Record]) -> None:
    labels = list(dict.fromkeys(label for line in lines for label in line["tasks"]))
    for index, label in enumerate(labels):
        color = SERIES[index % len(SERIES)]
        own = [{"version": line["version"], **line["tasks"][label]} for line in lines if label in line["tasks"]]
        _band(axes, own, "reward", color)
        x, y = [line["version"] for line in own], [line["reward"] for line in own]
        axes.plot(x, y, color=color, linewidth=1.6, marker="o", markersize=4, label=plain(label))
    axes.set_xlabel("version", color=MUTED)
    axes.set_ylabel("mean reward", color=MUTED)
    legend(axes)


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
    legend(axes)


def _lag(axes: Axes, steps: Sequence[Record], budget: int) -> None:
    """Steps say which budget was in force; ``budget`` is drawn where they do not."""
    known = [step for step in steps if step.get("lag_mean") is not None and step.get("lag_max") is not None]
    x, mean = series(known, "lag_mean")
    largest = series(known, "lag_max")[1]
    axes.fill_between(x, mean, largest, color=BLUE, alpha=0.12, linewidth=0, step="mid", label="up to the oldest token")
    axes.plot(x, mean, color=BLUE, linewidth=1.8, label="mean")
    dashed: dict[str, Any] = {"color": RED, "linewidth": 1.4, "linestyle": (0, (5, 3))}
    at, budgets = series(steps, "staleness_budget")
    most = max(budgets, default=budget)
    if min(budgets, default=budget) < most:
        axes.step(at, budgets, where="post", label="budget", **dashed)
    else:
        axes.axhline(most, label=f"budget {most:g}", **dashed)
    axes.set_ylim(-0.05 * max(1, most), max(most, *largest, 1) * 1.1)
    axes.set_ylabel("versions", color=MUTED)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes)


def _lags(axes: Axes, shares: dict[int, float]) -> None:
    bars = axes.bar(list(shares), list(shares.values()), color=BLUE, width=0.7)
    if len(shares) <= 12:
        axes.bar_label(bars, [f"{share:.1%}" for share in shares.values()], fontsize=9, color=INK, padding=2)
    axes.set_xlabel("lag, versions", color=MUTED)
    axes.set_ylabel("share of the trained tokens", color=MUTED)
    axes.set_ylim(0, 1.12 * max(shares.values()))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _raised(axes: Axes, alerts: Sequence[Record], signs: Sequence[str]) -> None:
    """A line where an alert of one of ``signs`` was raised."""
    label = "alert"
    for alert in alerts:
        if alert.get("sign") in signs and alert.get("state") == "raised":
            axes.axvline(alert["since"], color=RED, linewidth=1.2, linestyle=(0, (2, 2)), label=label)
            label = "_nolegend_"


def _entropy(axes: Axes, steps: Sequence[Record], alerts: Sequence[Record]) -> None:
    noisy(axes, steps, "entropy", BLUE, "policy")
    _raised(axes, alerts, ("entropy",))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("nats a token", color=MUTED)
    legend(axes)


def _signs(axes: Axes, steps: Sequence[Record], alerts: Sequence[Record]) -> None:
    noisy(axes, steps, "weight_ess", GREEN, "ESS of the weights")
    noisy(axes, steps, "truncated", ORANGE, "cut at the limit")
    _raised(axes, alerts, ("ess", "truncated"))
    axes.set_ylim(-0.02, 1.04)
    axes.set_ylabel("share of the batch", color=MUTED)
    legend(axes)


def _seconds(axes: Axes, steps: Sequence[Record]) -> None:
    """Stacked: what each step of rank 0 took."""
    x = [step["step"] for step in steps]
    parts = (("seconds_train", "training", BLUE), ("seconds_publish", "publishing", GREEN))
    stacked = [[float(step.get(key) or 0.0) for step in steps] for key in (*(p[0] for p in parts), "seconds_fetch")]
    if len(x) >= 2 * SMOOTH:
        stacked = [running_mean(values) for values in stacked]
    labels = [*(part[1] for part in parts), "waiting for data"]
    axes.stackplot(x, stacked, labels=labels, colors=[*(part[2] for part in parts), ORANGE], alpha=0.75)
    whole = sorted(map(sum, zip(*stacked, strict=True)))
    axes.set_ylim(0, 1.3 * whole[int(0.98 * (len(whole) - 1))] or 1.0)  # the first wait may be for processes to start
    axes.set_ylabel(f"seconds a step (mean of {SMOOTH})", color=MUTED)
    legend(axes)


def _acceptance(axes: Axes, steps: Sequence[Record]) -> None:
    x, y = series(steps, "acceptance")
    lows, highs = series(steps, "acceptance_low")[1], series(steps, "acceptance_high")[1]
    if len(lows) == len(highs) == len(x):
        axes.fill_between(x, lows, highs, color=GREEN, alpha=0.18, linewidth=0, label="95 % interval")
    axes.plot(x, y, color=GREEN, linewidth=1.5, label="accepted / proposed")
    expected_x, expected = series(steps, "acceptance_expected")
    if expected:
        axes.plot(
            expected_x, expected, color=INK, linewidth=1.0, linestyle=(0, (1, 1.5)), label="expected, without coins"
        )
    axes.set_ylim(top=min(1.005, max([*highs, *y], default=1.0) + 0.01))
    axes.set_ylabel("share of trainable tokens", color=MUTED)
    legend(axes)


def _kl(axes: Axes, steps: Sequence[Record]) -> None:
    for key, color, label in (("kl_before", RED, "before rejection"), ("kl_after", GREEN, "after rejection")):
        positive = [step for step in steps if (step.get(key) or 0) > 0]
        if positive:
            noisy(axes, positive, key, color, label)
    if axes.lines:
        axes.set_yscale("log")
        from_floor(axes, KL_FLOOR)
        legend(axes)
    else:
        axes.text(
            0.5, 0.5, "zero at every step: strictly on policy", transform=axes.transAxes, ha="center", color=MUTED
        )
    axes.set_ylabel("KL, nats a token", color=MUTED)


def _joint(axes: Axes, steps: Sequence[Record]) -> None:
    noisy(axes, steps, "joint_kl", BLUE, "before the step")
    after = [
        {"step": step["step"], "after": step["joint_kl"] - step["joint_kl_drop"]}
        for step in steps
        if step.get("joint_kl") is not None and step.get("joint_kl_drop") is not None
    ]
    noisy(axes, after, "after", GREEN, "after it")
    axes.set_yscale("log")
    axes.set_ylabel("KL on what was sampled, nats a token", color=MUTED)
    legend(axes)


def _throughput(axes: Axes, steps: Sequence[Record]) -> None:
    lived = Lived()  # a run that was paused was no slower for that
    pairs = [(step["step"], lived.take(step), step.get("tokens_generated")) for step in steps]
    known = [(step, time, tokens) for step, time, tokens in pairs if tokens is not None and time is not None]
    window = max(1, min(SMOOTH, len(known) // 3))
    x, y = [], []
    for (_, time_0, tokens_0), (step, time_1, tokens_1) in zip(known, known[window:], strict=False):
        if time_1 > time_0 and tokens_1 >= tokens_0:
            x.append(step)
            y.append((tokens_1 - tokens_0) / (time_1 - time_0))
    axes.plot(x, y, color=BLUE, linewidth=1.8, label=f"generated, mean of {window} step(s)")
    axes.set_ylim(bottom=0, top=max(y, default=1.0) * 1.15 or 1.0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("completion tokens / s", color=MUTED)
    legend(axes)


def _optimizer(axes: Axes, steps: Sequence[Record]) -> None:
    noisy(axes, steps, "grad_norm", BLUE, "gradient norm")
    axes.set_ylabel("gradient norm", color=BLUE)
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    for side in ("top", "left", "right", "bottom"):
        other.spines[side].set_visible(False)
    other.tick_params(which="both", colors=MUTED, length=0)
    noisy(other, steps, "loss", ORANGE, "loss")
    other.set_ylabel("loss", color=ORANGE)
    legend(axes, other)


def plot_replay(run_dir: Path, rows: Sequence[Record]) -> Path:
    """``replay.png``: acceptance and remaining divergence, then and under the other settings."""
    figure = Figure(figsize=(SIZE[0], 2 * SIZE[1]), dpi=DPI, layout="constrained")
    upper, lower = (part.add_subplot() for part in figure.subfigures(2, 1, squeeze=False).ravel())
    x = [row["step"] for row in rows]
    dress(upper, "Accepted share")
    for key, color, label in (("acceptance_then", BLUE, "as it was"), ("acceptance", ORANGE, "other settings")):
        upper.plot(x, [row[key] for row in rows], color=color, linewidth=1.6, label=label)
    legend(upper)
    dress(lower, "Divergence from the learner")
    drawn = (
        ("kl_before", RED, "before"),
        ("kl_then", BLUE, "after, as it was"),
        ("kl", ORANGE, "after, other settings"),
    )
    for key, color, label in drawn:
        positive = [(row["step"], row[key]) for row in rows if row[key] > 0]
        lower.plot([p[0] for p in positive], [p[1] for p in positive], color=color, linewidth=1.2, label=label)
    lower.set_yscale("log")
    from_floor(lower, KL_FLOOR)
    lower.set_ylabel("KL, nats a token", color=MUTED)
    legend(lower)
    path = run_dir / "replay.png"
    figure.savefig(path)
    return path
