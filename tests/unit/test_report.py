"""What a run leaves, from whole, torn and missing files."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import figure

from broker.heldout import evaluate
from common.config import RunConfig, RunSection, to_yaml
from common.mixture import mixture
from common.wire import EvaluationResult
from tests.unit.timeline import life, timelines
from tools.checked import checked
from tools.document import Document, Figure
from tools.evaluations import ROWS, evaluation_blocks, thinned
from tools.faults import fault_blocks
from tools.markdown import to_markdown
from tools.pictures import MAX_POINTS, from_floor, to_svg
from tools.pictures import plain as plain_name
from tools.pictures import thinned as thinned_steps
from tools.plots import pictures_of
from tools.report import Outcome, compose, main, summarize, write_report
from tools.run_files import read_metrics, set_aside
from tools.runs import Run, read_run
from tools.timelines import Timelines

SUMMARY_KEYS = [
    "status", "wall_s", "working_s", "steps", "final_version", "reward_first", "reward_last", "eval_first", "eval_last",
    "tokens_generated", "tokens_proposed", "tokens_accepted", "acceptance", "lag_mean", "lag_max", "staleness_budget",
    "trajectories_acked", "trajectories_trained", "trajectories_dropped", "seed",
]  # fmt: skip
STATUS = {
    "time": 130.0,
    "started_at": 100.0,
    "phase": "finished",
    "step": 20,
    "steps": 20,
    "version": 20,
    "tokens_generated": 4000,
    "tokens_proposed": 2000,
    "tokens_accepted": 1900,
    "trajectories_acked": 170,
    "trajectories_trained": 160,
    "trajectories_dropped": {"lag": 3, "invalid": 1},
    "evaluations": [{"version": 0, "reward": 0.2}, {"version": 20, "reward": 0.9}],
}


def step_record(step: int, **changes: object) -> dict[str, object]:
    record: dict[str, object] = {
        "kind": "step", "step": step, "version": step, "time_s": float(step), "reward": step / 20, "lag_mean": 1.0,
        "lag_max": 2, "lag_histogram": {"0": 10, "1": 20, "2": 10}, "acceptance": 0.95, "acceptance_low": 0.93,
        "acceptance_high": 0.97, "acceptance_expected": 0.951, "kl_before": 1e-3, "kl_after": 1e-4,
        "tokens_proposed": 100, "tokens_accepted": 95, "tokens_generated": 200 * step, "loss": 0.1, "grad_norm": 1.0,
    }  # fmt: skip
    return record | changes


def fill(run_dir: Path, records: list[dict[str, object]], tail: str = "") -> None:
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(RunConfig(run=RunSection(name="x", seed=7))))
    (run_dir / "status.json").write_text(json.dumps(STATUS))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)


def told(run_dir: Path, status: Outcome = "finished") -> str:
    """report.md without its PNGs, which take a second each; every picture is drawn all the same."""
    run = checked(read_run(run_dir))
    summary = summarize(run.config, run.status, run.records, status, 30.0)
    pictures = pictures_of(run.records, summary["staleness_budget"] or 0)
    for picture in pictures:
        picture.draw(figure.Figure().add_subplot())
    return to_markdown(compose(run, summary, {p.stem: Figure(p.name, p.title) for p in pictures}))


def test_a_whole_run_gives_summary_report_and_seven_curves(tmp_path: Path) -> None:
    run_dir = tmp_path / "x"
    evaluation = {"kind": "eval", "version": 0, "reward": 0.2, "prompts": 64, "time_s": 1.0}
    fill(run_dir, [*(step_record(step) for step in range(1, 21)), evaluation])
    summary = write_report(run_dir, "finished", 30.0)
    page = (run_dir / "report.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == [] and len(parser.ids) == len(set(parser.ids))
    assert page.count("<svg") == page.count("<figure>") == 7 and 'name="viewport"' in page
    assert len(page) < 400_000
    assert list(summary) == SUMMARY_KEYS
    assert summary == json.loads((run_dir / "summary.json").read_text())
    assert summary["reward_first"] == pytest.approx(3 / 20)
    assert summary["reward_last"] == pytest.approx(18 / 20)
    assert (summary["eval_first"], summary["eval_last"], summary["acceptance"]) == (0.2, 0.9, 0.95)
    assert (summary["lag_mean"], summary["lag_max"], summary["staleness_budget"], summary["seed"]) == (1.0, 2, 2, 7)
    names = {"reward.png", "lag.png", "lags.png", "acceptance.png", "kl.png", "throughput.png", "optimizer.png"}
    assert {file.name for file in run_dir.glob("*.png")} == names
    report = (run_dir / "report.md").read_text()
    assert all(f"({name})" in report for name in names)
    assert "0.200 → 0.900" in report
    assert "| Still queued at the end | 6 |" in report


def test_no_rejection_means_no_rejection_curves(tmp_path: Path) -> None:
    none = dict.fromkeys(("acceptance_expected", "kl_before", "kl_after"))
    fill(tmp_path / "x", [step_record(step, **none) for step in (1, 2)])
    report = told(tmp_path / "x")
    assert "(reward.png)" in report and "(acceptance.png)" not in report and "(kl.png)" not in report


def test_torn_lines_are_left_out_and_said_to_be(tmp_path: Path) -> None:
    half = '{"kind": "step", "st'
    fill(tmp_path / "x", [step_record(1)], tail=half + json.dumps(step_record(2)) + "\n" + half)
    assert [record["step"] for record in read_metrics(tmp_path / "x")] == [1, 2]
    assert "- metrics.jsonl: 2 of 3 lines torn" in told(tmp_path / "x")


def test_an_empty_directory_gives_a_report_that_says_so(tmp_path: Path) -> None:
    summary = write_report(tmp_path, "interrupted", 0.4)
    assert list(summary) == SUMMARY_KEYS
    assert (summary["steps"], summary["acceptance"], summary["eval_first"]) == (0, None, None)
    report = (tmp_path / "report.md").read_text()
    assert "Missing: config.yaml, status.json, metrics.jsonl" in report
    assert "No optimizer step was completed" in report


def test_what_was_done_again_counts_once_and_the_later_file_says_how_far_it_went() -> None:
    evaluations = [
        {"kind": "eval", "version": asked, "version_asked": asked, "reward": reward}
        for asked, reward in ((0, 0.2), (5, 0.7), (5, 0.5), (9, 0.6))
    ]
    steps = [step_record(step, reward=1.0) for step in (0, 1, 2, 3)]
    again = [step_record(step, reward=0.5) for step in (1, 2, 3, 4)]
    status = {**STATUS, "step": 3, "evaluations": [{"version": 5, "reward": 0.5}]}
    summary = summarize(None, status, [*steps, *evaluations, *again], "failed", 1.0)
    assert (summary["steps"], summary["eval_first"], summary["eval_last"]) == (5, 0.2, 0.6)
    assert summary["reward_last"] == pytest.approx((1.0 + 4 * 0.5) / 5)
    assert summarize(None, {**status, "step": 9}, again, "failed", 1.0)["steps"] == 9
    assert summarize(None, {}, again, "failed", 1.0)["steps"] == 5


def test_without_a_status_the_counts_come_from_the_steps() -> None:
    summary = summarize(None, {}, [step_record(1), step_record(2)], "failed", 1.0)
    assert (summary["tokens_proposed"], summary["tokens_accepted"], summary["tokens_generated"]) == (200, 190, 400)


def test_the_command_keeps_the_outcome_that_the_launcher_wrote(tmp_path: Path) -> None:
    fill(tmp_path / "x", [])
    write_report(tmp_path / "x", "failed", 12.5)
    assert main([str(tmp_path / "x")]) == 0
    summary = json.loads((tmp_path / "x" / "summary.json").read_text())
    assert (summary["status"], summary["wall_s"]) == ("failed", 12.5)
    assert main([str(tmp_path / "nowhere")]) == 2


def test_what_was_written_early_does_not_outlive_the_run_s_going_on(tmp_path: Path) -> None:
    fill(tmp_path / "x", [])

    def told(**status: object) -> tuple[str, float, int]:
        (tmp_path / "x" / "status.json").write_text(json.dumps(STATUS | status))
        assert main([str(tmp_path / "x")]) == 0
        summary = json.loads((tmp_path / "x" / "summary.json").read_text())
        return summary["status"], summary["wall_s"], summary["steps"]

    assert told(phase="running", step=5, time=110.0) == ("interrupted", 10.0, 5)
    assert told(phase="running", step=5, time=900.0) == ("interrupted", 10.0, 5)  # nothing was done since
    assert told(phase="running", step=20, time=128.0) == ("interrupted", 28.0, 20)
    assert told() == ("finished", 30.0, 20)


def test_a_directory_that_cannot_be_written_is_told_in_a_line(tmp_path: Path, capsys) -> None:
    fill(tmp_path / "x", [])
    (tmp_path / "x" / "summary.json").mkdir()  # as good as a read-only one, also for root
    assert main([str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/x: cannot be written (Is a directory); make it writable, or copy it")


def test_earlier_runs_are_set_aside_in_order(tmp_path: Path) -> None:
    run_dir = tmp_path / "demo"
    assert set_aside(run_dir) is None
    for number in (1, 2):
        run_dir.mkdir()
        (run_dir / "which").write_text(str(number))
        assert set_aside(run_dir) == tmp_path / f"demo.{number}"
    assert (tmp_path / "demo.1" / "which").read_text() == "1"


def evaluation_of(version: int, seed: int) -> dict[str, object]:
    """A line as the broker writes it: two tasks, four completions a prompt, one task with confidences."""
    rng = np.random.default_rng(seed)
    correct = (rng.random((24, 4)) < 0.2 + version / 60).astype(np.float32)
    confidence = np.clip(0.2 + 0.5 * correct + 0.2 * rng.random((24, 4)), 0, 1).astype(np.float32)
    answers = np.where(correct > 0, 5, rng.integers(6, 9, (24, 4)))
    result = EvaluationResult(
        0, version, version, correct.ravel(), np.ones(96, np.int32), 4, ["correct", "confidence"],
        np.stack([correct.ravel(), confidence.ravel()], axis=1), answers.ravel(),
    )  # fmt: skip
    figures = evaluate(result, (1, 4), ("sums", "words"), mixture((2.0, 1.0)))
    return {"kind": "eval", "version": version, "version_asked": version, "time_s": 1.0, **figures}


def test_evaluations_are_tabled_with_intervals_by_task_and_drawn(tmp_path: Path) -> None:
    run_dir, lines = tmp_path / "x", [evaluation_of(version, version) for version in range(0, 40, 2)]
    fill(run_dir, [step_record(1), step_record(2), *lines])
    (run_dir / "status.json").write_text(json.dumps({**STATUS, "best": {"version": 14, "reward": 0.61}}))
    report = told(run_dir)
    assert all(f"({name}.png)" in report for name in ("evaluation", "tasks", "reliability"))
    assert "| version | reward | correct, mean@4 | pass@1 | pass@4 | majority vote | vote by confidence |" in report
    last = lines[-1]
    assert f"| 38 | {last['reward']:.3f} ({last['reward_low']:.3f} to {last['reward_high']:.3f}) |" in report
    assert report.count("| **14** |") == report.count("| 38 |") == report.count("\n| 0 | 0.") == 1
    assert "The best version is 14, with a reward of 0.610: its checkpoint is kept" in report
    assert "| `sums` (16 prompts) |" in report and "| `words` (8 prompts) |" in report
    assert "AUROC 1.000, of 96 completions." in report and "![Reliability](reliability.png)" in report
    assert len(thinned(lines, 14)) <= ROWS


def test_an_evaluation_of_plain_rewards_has_its_row_and_no_more() -> None:
    plain = {"kind": "eval", "version": 0, "reward": 0.2, "prompts": 64, "time_s": 1.0}
    lines = to_markdown(Document("x", evaluation_blocks([plain], None, {})))
    assert "| 0 | 0.200 |" in lines and "64 prompts; in brackets the 95 % interval over prompts." in lines
    assert evaluation_blocks([], None, {}) == []
    first = to_markdown(Document("x", evaluation_blocks([plain], {"version": 0, "reward": 0.2}, {})))
    assert "The best version is 0, with a reward of 0.200: the starting model." in first


class Balanced(HTMLParser):
    """Every tag that is opened is closed, and nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attributes if name == "id"]
        for name, value in attributes:
            assert name not in ("src", "srcset") or (value or "").startswith("data:image/"), value
        assert tag not in ("script", "link", "iframe", "object")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


LAUNCH_LOG = """12:00:00 launch INFO started broker, learner, actor-0
12:00:05 launch WARNING actor-0 was killed by SIGKILL; restart 1 of 3
12:00:09 launch WARNING actor-0 ended with exit code 1; restart 2 of 3
"""
BROKER_LOG = """12:00:01 broker INFO actor actor-0 joined (version 0, vm pid 1)
12:00:05 broker WARNING actor actor-0 left: its connection closed; 2 groups are granted again
12:00:06 broker WARNING <script>alert("x")</script> from nobody
"""


def test_faults_alerts_moves_of_the_budget_and_receipts_are_told(tmp_path: Path) -> None:
    run_dir = tmp_path / "x"
    health = {"entropy": 0.5, "weight_ess": 0.9, "truncated": 0.1, "seconds_train": 0.1, "skipped_updates": 2.0}
    lines = [step_record(step, **health, acceptance=0.95 - step / 1000) for step in range(40)]
    text = "the policy's entropy is 0.001 nats a token, below alerts.entropy_below=0.005 since step 12; raise it"
    alert = {"kind": "alert", "sign": "entropy", "state": "raised", "step": 16, "since": 12, "value": 0.001}
    moved = {"kind": "budget", "move": 0, "step": 9, "old": 2, "value": 4, "reason": "the fleet idles <b>"}
    ended = {**alert, "state": "cleared", "step": 30}
    fill(run_dir, [*lines, alert | {"text": text}, ended | {"text": text}, moved])
    faults = {
        "receivers_late": {"replica-0": 3}, "bad_messages": {"WireError": 4}, "suspects": {"actor-9": 1.7},
        "offences": {"mallory": {"DataError": 2}}, "trajectories_refused": {"invalid": 5},
    }  # fmt: skip
    (run_dir / "status.json").write_text(json.dumps({**STATUS, **faults}))
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "launch.log").write_text(LAUNCH_LOG)
    (run_dir / "logs" / "broker.log").write_text(BROKER_LOG)
    report = told(run_dir, "failed")
    assert report.count("![") == 10
    for row in (
        "| restarts of `actor-0` | 2 | the run went on |",
        "| actors lost | 1 |",
        "| late for a new version: `replica-0` | 3 |",
        "| bad messages: WireError | 4 |",
        "| offences of `mallory` | 2 | DataError 2 |",
        "| trajectories refused: invalid | 5 |",
        "| updates skipped | 2 |",
        "| claims that cannot be true: `actor-9` |",
        f"| entropy | 12 | 30 | {text} |",
        "| 9 | 2 → 4 | the fleet idles \\<b\\> |",
        "| lowest acceptance | 39 |",
        "| `run.seed` | 7 | 0 |",
    ):
        assert row in report, row
    assert "> The run failed; what is known of it follows." in report
    assert "another croupier" in report  # a receipt with half of its figures is not told


@pytest.mark.parametrize(
    ("budgets", "label", "drawn"),
    [([], "budget 16", [16, 16]), ([2, 2, 2], "budget 2", [2, 2]), ([2, 2, 3], "budget", [2, 2, 3])],
)
def test_the_budget_that_was_in_force_is_drawn(budgets: list[int], label: str, drawn: list[int]) -> None:
    steps = [step_record(step) for step in range(3)]
    for step, budget in zip(steps, budgets, strict=False):
        step["staleness_budget"] = budget
    axes = figure.Figure().add_subplot()
    next(picture for picture in pictures_of(steps, 16) if picture.stem == "lag").draw(axes)
    assert [list(line.get_ydata()) for line in axes.lines if line.get_label() == label] == [drawn]
    many = [step_record(step, staleness_budget=2 + (step > 2000)) for step in range(2 * MAX_POINTS + 1)]
    assert {step["staleness_budget"] for step in thinned_steps(many)} <= {2, 3}


def test_a_run_without_faults_says_so_and_long_runs_are_thinned(tmp_path: Path) -> None:
    run_dir = tmp_path / "x"
    fill(run_dir, [step_record(1)])
    (run_dir / "status.json").write_text(json.dumps({**STATUS, "trajectories_dropped": {}}))
    assert "> None: no process was restarted" in told(run_dir)
    points = thinned_steps([step_record(step) for step in range(3 * MAX_POINTS + 1)])
    assert len(points) <= MAX_POINTS and points[-1]["step"] == 3 * MAX_POINTS
    assert points[0]["reward"] == pytest.approx(sum(range(len(points[:1]) * 4)) / 4 / 20)


JUNK = (None, "x", -1, 1e308, math.nan, [], {}, [1, 2], {"a": 1}, True, {"0": "x"}, "\x1b[31m", [[1]])


def mutated(value: object, rng: random.Random, share: float) -> object:
    """``value`` with so many of its parts replaced or missing."""
    if rng.random() < share:
        return rng.choice(JUNK)
    if isinstance(value, dict):
        return {key: mutated(inner, rng, share) for key, inner in value.items() if rng.random() > share / 3}
    return [mutated(inner, rng, share) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(4))
def test_figures_of_the_wrong_kind_are_left_out_and_the_rest_is_told(tmp_path: Path, seed: int) -> None:
    rng, run_dir = random.Random(seed), tmp_path / "x"
    more = {"entropy": 0.5, "weight_ess": 0.9, "truncated": 0.1, "seconds_train": 0.1, "joint_kl": 0.1}
    lines = [step_record(step, **more) for step in range(12)] + [evaluation_of(version, 1) for version in (0, 5, 10)]
    lines.append({"kind": "alert", "sign": "kl", "state": "raised", "step": 3, "since": 2, "text": "t"})
    lines.append({"kind": "budget", "step": 4, "old": 1, "value": 2, "reason": "r", "move": 0})
    share = (0.02, 0.1, 0.2, 0.5)[seed]
    fill(run_dir, [mutated(line, rng, share) for line in lines])
    (run_dir / "status.json").write_text(json.dumps(mutated(STATUS, rng, share)))
    report = told(run_dir, "failed")
    assert "figures are none and were left out: " in report or "torn or foreign" in report
    assert "## Faults survived" in report and "## Configuration" in report


def test_numbers_of_a_picture_s_words_stay_whole() -> None:
    drawn = figure.Figure()
    axes = drawn.add_subplot()
    axes.plot([0.123456, 1.0], [0.9911, 0.9999], label="0.98765 of it")
    axes.legend()
    axes.set_yticks([0.9912, 0.9954])
    svg = to_svg(drawn)
    assert all(f">{words}</text>" in svg for words in ("0.9912", "0.9954", "0.98765 of it"))
    assert re.search(r" d=\"M \d+\.\d\d? ", svg) and not re.search(r" d=\"[^\"]*\.\d{3}", svg)


@pytest.mark.parametrize("name", ["a$\\b$", "$x$", "_hidden", "it costs $5", "a_b"])
def test_a_task_s_name_is_drawn_as_it_is(name: str) -> None:
    evaluation = {"kind": "eval", "version": 0, "reward": 0.5, "tasks": {name: {"reward": 0.5}, "other": {"reward": 1}}}
    (picture,) = pictures_of([evaluation], 0)
    drawn = figure.Figure()
    axes = drawn.add_subplot()
    picture.draw(axes)
    (legend,) = drawn.legends
    assert [text.get_text().strip() for text in legend.get_texts()] == [plain_name(name).strip(), "other"]
    assert f">{name}</text>".replace(">_", "> _") in to_svg(drawn)


def test_a_chunk_of_steps_whose_last_lacks_a_figure_keeps_the_others() -> None:
    steps = [
        {"step": i, "grad_norm": None if i % 100 == 99 else 2.0, "lag_max": i % 7} for i in range(100 * MAX_POINTS)
    ]
    steps[5]["seldom"] = 3.0
    few = thinned_steps(steps)
    assert {step["grad_norm"] for step in few} == {2.0} and few[0]["seldom"] == 3.0 and few[0]["lag_max"] == 6
    assert [step["step"] for step in few[:2]] == [99, 199]


def test_divergences_below_the_floor_are_not_drawn_upside_down() -> None:
    for values, bottom in (([2e-9, 1e-9], None), ([1e-9, 1e-3], 1e-7), ([1e-4, 1e-3], None)):
        axes = figure.Figure().add_subplot()
        axes.plot(values)
        axes.set_yscale("log")
        before = axes.get_ylim()
        from_floor(axes, 1e-7)
        low, high = axes.get_ylim()
        assert low < high and low == (before[0] if bottom is None else bottom)


def test_a_run_without_a_step_shows_its_evaluations(tmp_path: Path) -> None:
    fill(
        tmp_path / "x",
        [{"kind": "eval", "version": 0, "version_asked": 0, "reward": 0.5, "tasks": {"a": {"reward": 1}}}],
    )
    assert "tasks.png" in told(tmp_path / "x")


def test_a_run_that_was_resumed_reports_no_restart_and_one_whose_actor_died_does(tmp_path: Path) -> None:
    def lives(*starts: int, process: str = "actor-0", role: str = "actor") -> list[object]:
        return [life(process, role, [("sample", 50)], start=at) for at in starts]

    resumed = timelines(*lives(0, 900, process="broker", role="broker"), *lives(10, 910))
    assert restarts(tmp_path, resumed) == ["broker 1"]
    died = timelines(*lives(0, process="broker", role="broker"), *lives(10, 100, 200))
    assert restarts(tmp_path, died) == ["actor-0 2"]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "launch.log").write_text(
        "10:00:00 launch WARNING actor-1 ended with exit code 1; restart 1 of 3\n"
    )
    assert restarts(tmp_path, resumed) == restarts(tmp_path, died) == ["actor-1 1"]


def restarts(run_dir: Path, found: Timelines) -> list[str]:
    report = to_markdown(Document("x", fault_blocks(Run(run_dir, None, {}, [], found))))
    rows = [line.split("|") for line in report.splitlines() if "restarts of" in line]
    return [f"{row[1].split('`')[1]} {row[2].strip()}" for row in rows]
