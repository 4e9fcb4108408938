"""metrics.jsonl into TensorBoard's files and W&B: what is written is what their own readers read, each step once."""

import json
import struct
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event

from common.errors import DataError
from tests.unit.test_report import STATUS, evaluation_of, step_record
from tools.follow.__main__ import main
from tools.follow.events import MASK, EventFile, Histogram, Scalar, Words, masked_crc
from tools.follow.follower import Background, Follower, following
from tools.follow.points import heading, points_of
from tools.follow.sinks import Wandb, read_place

RUN = {"run_id": "abc", "generation": 0, "started_at": 1_700_000_000.0}


def begin(run_dir: Path, lines: list[dict[str, object]] = [], phase: str = "finished") -> Path:  # noqa: B006
    run_dir.mkdir()
    (run_dir / "run.json").write_text(json.dumps(RUN))
    (run_dir / "config.yaml").write_text("run:\n  name: x\n")
    (run_dir / "status.json").write_text(json.dumps({**STATUS, "phase": phase}))
    append(run_dir, lines)
    return run_dir


def append(run_dir: Path, lines: list[dict[str, object]], tail: str = "") -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines) + tail)


def events_of(path: Path) -> list[Event]:
    """By TensorBoard's own messages, checksums checked by somebody else's arithmetic."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        for part, at in ((data[:8], 8), (data[12 : 12 + length], 12 + length)):
            crc = crc32c(bytearray(part))
            assert struct.unpack("<I", data[at : at + 4])[0] == ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def events_in(run_dir: Path) -> list[Event]:
    return [event for path in sorted((run_dir / "tensorboard").glob("events*")) for event in events_of(path)]


def steps_in(run_dir: Path, tag: str) -> list[int]:
    return [event.step for event in events_in(run_dir) for value in event.summary.value if value.tag == tag]


def test_events_are_read_by_tensorboards_own_messages(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "events", 5.0)
    histogram = Histogram("h", (-0.5, 0.5, 1.5, 2.5), (10.0, 0.0, 30.0))
    file.write(7.25, 300, [Scalar("a/b", 0.5), histogram, Words("w", "*é*")])
    file.write(8.0, -1, [Scalar("a", -1e39)])
    size = file.flush()
    file.close()
    assert size == (tmp_path / "events").stat().st_size
    head, event, last = events_of(tmp_path / "events")
    assert (head.file_version, head.wall_time, event.wall_time, event.step, last.step) == (
        "brain.Event:2", 5.0, 7.25, 300, -1,
    )  # fmt: skip
    assert last.summary.value[0].simple_value < -3.4e38
    scalar, histo, words = event.summary.value
    assert (scalar.tag, scalar.simple_value) == ("a/b", 0.5)
    assert list(histo.histo.bucket_limit) == [-0.5, 0.5, 1.5, 2.5] and list(histo.histo.bucket) == [0, 10, 0, 30]
    figures = histo.histo
    assert (figures.min, figures.max, figures.num, figures.sum, figures.sum_squares) == (0, 2, 40, 60, 120)
    assert words.metadata.plugin_data.plugin_name == "text" and words.tensor.string_val == ["*é*".encode()]
    assert words.tensor.dtype == 7 and words.tensor.tensor_shape.dim[0].size == 1
    assert masked_crc(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + MASK) & 0xFFFFFFFF  # RFC 3720, B.4


def test_every_line_becomes_points_under_its_heading() -> None:
    states = {"actor": {"sample": 1.5}, "learner": {"forward": 2.0}}
    more = {"reward_channels": {"correct": 0.25}, "states": states, "kl_to_behaviour": 0.5, "entropy": float("nan")}
    points = points_of(step_record(3, **more, novel=4, tasks=None, pass_rates={"0": 1, "0.5": 2, "1": 3}))
    assert points is not None and (points.kind, points.step, points.time_s) == ("step", 3, 3.0)
    scalars = {value.tag: value.value for value in points.values if isinstance(value, Scalar)}
    assert scalars["reward/reward"] == 3 / 20 and scalars["rejection/acceptance"] == 0.95
    assert scalars["learner/kl_to_behaviour"] == 0.5 and scalars["rejection/kl_after"] == 1e-4
    assert scalars["reward/reward_channels/correct"] == 0.25 and scalars["other/novel"] == 4
    assert scalars["seconds/states/actor/sample"] == 1.5
    assert not any("entropy" in tag or "time_s" in tag for tag in scalars)
    lags, rates = (value for value in points.values if isinstance(value, Histogram))
    assert (lags.tag, list(lags.edges), list(lags.counts)) == (
        "staleness/lag_histogram",
        [-0.5, 0.5, 1.5, 2.5],
        [10, 20, 10],
    )
    assert rates.tag == "reward/pass_rates" and list(rates.counts) == [1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3]
    assert heading("lr") == "learner" and heading("ess") == "rejection" and heading("weight_ess") == "learner"
    evaluation = points_of(evaluation_of(8, 1))
    assert evaluation is not None and evaluation.step == 8
    tags = {value.tag for value in evaluation.values}
    assert {"eval/reward", "eval/correct", "eval/pass_at/4", "eval/votes/majority", "eval/calibration/ece"} <= tags
    assert "eval/tasks/sums/reward" in tags
    (alert,) = points_of({"kind": "alert", "sign": "kl", "state": "raised", "step": 4, "text": "t"}).values
    assert alert == Words("alerts/kl", "**raised**: t")
    assert points_of({"kind": "budget", "step": 4, "value": 3}).values == (Scalar("staleness/budget", 3.0),)
    assert points_of({"kind": "publish", "version": 1, "seconds": 0.5}).values == (Scalar("publish/seconds", 0.5),)
    assert points_of({"kind": "what", "step": 1}) is None and points_of({"kind": "step"}) is None


def test_the_command_takes_what_is_there_and_goes_on_where_it_was(tmp_path: Path) -> None:
    run_dir = begin(tmp_path / "x", [step_record(step) for step in range(5)])
    append(run_dir, [], tail='{"kind": "step", "step": 5, "time_s"')  # still being written
    assert main([str(run_dir), "--once"]) == 0
    assert steps_in(run_dir, "reward/reward") == list(range(5))
    append(run_dir, [], tail=': 5.0, "reward": 0.5}\n')
    append(run_dir, [step_record(6)])
    assert main([str(run_dir)]) == 0  # ends by itself: the broker has said that the run is over
    assert main([str(run_dir), "--once"]) == 0
    assert steps_in(run_dir, "reward/reward") == list(range(7))
    assert len(steps_in(run_dir, "config")) == 1
    assert [event.wall_time for event in events_in(run_dir) if event.step == 6] == [RUN["started_at"] + 6.0]


def test_what_a_killed_follower_had_written_beyond_its_place_is_written_once(tmp_path: Path) -> None:
    run_dir = begin(tmp_path / "x", [step_record(step) for step in range(3)])
    assert main([str(run_dir), "--once"]) == 0
    append(run_dir, [step_record(step) for step in range(3, 6)])
    place = (run_dir / "tensorboard" / "place.json").read_text()
    assert main([str(run_dir), "--once"]) == 0
    (run_dir / "tensorboard" / "place.json").write_text(place)  # as if it had been killed before it said where it is
    newest = max((run_dir / "tensorboard").glob("events*"))
    newest.write_bytes(newest.read_bytes()[:-7])
    assert main([str(run_dir), "--once"]) == 0
    assert steps_in(run_dir, "reward/reward") == list(range(6))


def test_another_run_in_the_directory_begins_anew(tmp_path: Path) -> None:
    run_dir = begin(tmp_path / "x", [step_record(0)])
    assert main([str(run_dir), "--once"]) == 0
    (run_dir / "run.json").write_text(json.dumps({**RUN, "run_id": "other"}))
    (run_dir / "metrics.jsonl").unlink()
    append(run_dir, [step_record(0), step_record(1)])
    assert main([str(run_dir), "--once"]) == 0
    assert steps_in(run_dir, "reward/reward") == [0, 1]
    assert read_place(run_dir / "tensorboard", "other")["lines"] == 2


def test_a_file_that_is_replaced_under_a_follower_ends_it(tmp_path: Path) -> None:
    run_dir = begin(tmp_path / "x", [step_record(0), step_record(1)])
    with following(run_dir, True, "") as follower:
        assert follower.look() == 2
        (run_dir / "run.json").write_text(json.dumps({**RUN, "run_id": "other"}))
        (run_dir / "metrics.jsonl").write_text(json.dumps(step_record(9)) + "\n")
        with pytest.raises(DataError, match="another run has begun"):
            follower.look()


def test_nothing_to_follow_and_two_followers_are_refused_with_the_reason(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path)]) == 2
    assert "name a run directory whose broker has started" in capsys.readouterr().out
    run_dir = begin(tmp_path / "x")
    with following(run_dir, True, ""):
        assert main([str(run_dir)]) == 2
    assert "somebody else follows this run" in capsys.readouterr().out
    (run_dir / "run.json").write_text("{")
    assert main([str(run_dir)]) == 2
    assert "run.json: cannot be read" in capsys.readouterr().out


def test_a_run_that_cannot_be_written_is_told_in_a_line(tmp_path: Path, capsys) -> None:
    run_dir = begin(tmp_path / "x")
    (run_dir / "tensorboard").touch()
    assert main([str(run_dir), "--once"]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "cannot be written (File exists); make it writable, or copy the run and follow the copy" in said


def test_lines_that_are_cut_and_written_again_are_told_once(tmp_path: Path) -> None:
    run_dir = begin(tmp_path / "x", [step_record(step) for step in range(4)])
    with following(run_dir, True, "") as follower:
        follower.look()
        (run_dir / "cut").write_text("".join(json.dumps(step_record(step)) + "\n" for step in range(2)))
        (run_dir / "cut").replace(run_dir / "metrics.jsonl")
        follower.look()
        append(run_dir, [step_record(step) for step in range(2, 6)])
        follower.look()
    assert steps_in(run_dir, "reward/reward") == [0, 1, 2, 3, 2, 3, 4, 5]


@pytest.mark.parametrize("phase", ["running", "finished"])  # finished: by an earlier launch, whose run goes on
def test_in_the_background_it_waits_for_the_broker_and_its_failure_is_only_said(tmp_path: Path, phase: str) -> None:
    run_dir, said = tmp_path / "x", []
    follower = Background(run_dir, True, "", said.append)
    begin(run_dir, [step_record(0)], phase=phase)
    deadline = threading.Event()
    for _ in range(600):
        if steps_in(run_dir, "reward/reward") if (run_dir / "tensorboard").exists() else []:
            break
        deadline.wait(0.05)
    append(run_dir, [step_record(1)])
    follower.close(30.0)
    assert steps_in(run_dir, "reward/reward") == [0, 1] and said == []
    (run_dir / "tensorboard" / "place.json").unlink()
    (run_dir / "tensorboard" / "place.json").mkdir()  # cannot be written
    Background(run_dir, True, "", said.append).close(30.0)
    assert len(said) == 1 and said[0].startswith("nothing more goes to tensorboard: ")


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_not_installed_is_named_with_the_remedy(tmp_path: Path, capsys) -> None:
    run_dir = begin(tmp_path / "x")
    assert main([str(run_dir), "--wandb", "p", "--once"]) == 2
    assert "pip install wandb" in capsys.readouterr().out
    assert not (run_dir / "tensorboard").exists()


class FakeWandb:
    """What docs.wandb.ai says of ``wandb.init`` and a ``Run``, as far as it is used; tried against wandb 0.31.0."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self.said: list[tuple[str, str]] = []
        self.axes: dict[str, str | None] = {}
        self.values: dict[str, object] = {}
        self.config, self.finished = self, False

    Settings = dict

    def init(self, *, project: str, name: str, id: str, resume: str, dir: str, settings: object) -> "FakeWandb":
        assert settings == {"console": "off", "silent": True}
        assert (project, name, id, resume) == ("p", "x", "abc", "allow") and Path(dir).is_dir()
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def update(self, values: dict[str, object], allow_val_change: bool) -> None:
        self.values |= values

    def log(self, row: dict[str, object]) -> None:
        self.rows.append(row)

    def alert(self, *, title: str, text: str) -> None:
        self.said.append((title, text))

    def finish(self) -> None:
        self.finished = True

    @staticmethod
    def Histogram(*, np_histogram: tuple[list[float], list[float]]) -> tuple[list[float], list[float]]:
        return np_histogram


def test_wandb_is_told_rows_over_steps_and_versions_alerts_and_the_configuration(tmp_path: Path) -> None:
    alert = {"kind": "alert", "sign": "kl", "state": "raised", "step": 1, "text": "far away", "time_s": 1.0}
    run_dir = begin(tmp_path / "x", [step_record(1), evaluation_of(2, 1), alert])
    package = FakeWandb()
    for _ in range(2):  # the second has nothing to add
        sink = Wandb(run_dir / "wandb", "p", "x", "abc", package)
        while Follower(run_dir, "abc", [sink]).look() and read_place(run_dir / "wandb", "abc")["lines"] < 3:
            pass
        sink.close()
    step, evaluation, of_alert = package.rows
    assert (step["step"], step["reward/reward"]) == (1, 1 / 20) and evaluation["version"] == 2
    assert step["staleness/lag_histogram"] == ([10, 20, 10], [-0.5, 0.5, 1.5, 2.5])
    assert package.axes == {"step": None, "*": "step", "version": None, "eval/*": "version", "publish/*": "version"}
    assert package.said == [("alerts/kl, step 1", "**raised**: far away")] and of_alert["step"] == 1
    assert package.values == {"run": {"name": "x"}} and package.finished
