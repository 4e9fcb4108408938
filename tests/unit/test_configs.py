"""Every YAML in configs/ can be run."""

from pathlib import Path

import pytest

from common.config import load, to_yaml
from tools.processes import processes_of

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_the_promised_files_are_there() -> None:
    assert {file.stem for file in CONFIGS} >= {"quickstart", "sync", "stale", "smoke", "qwen3-30b-a3b"}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_it_loads_names_itself_and_survives_a_round_trip(file: Path, tmp_path: Path) -> None:
    config = load(file)
    assert config.run.name == file.stem
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "again.yaml") == config


def test_modes_differ_from_the_quick_start_in_what_they_say_only() -> None:
    by_name = {file.stem: load(file) for file in CONFIGS}
    quick, sync, stale = by_name["quickstart"], by_name["sync"], by_name["stale"]
    for other in (sync, stale):
        assert (other.rollout, other.optim, other.loss, other.warmstart) == (
            quick.rollout, quick.optim, quick.loss, quick.warmstart,
        )  # fmt: skip
    assert (sync.staleness.budget, quick.staleness.budget, stale.staleness.budget) == (0, 2, 16)
    assert sync.obrs.mode == "off"


def test_keys_are_made_for_every_process_that_the_example_for_gpus_starts() -> None:
    (file,) = (file for file in CONFIGS if file.stem == "qwen3-30b-a3b")
    asked = [words.split()[0] for words in file.read_text().split("--client ")[1:]]
    config = load(file)
    actors = [f"actor-{number}" for number in range(config.actor.count)]
    assert asked == ["learner", *(f"replica-{number}" for number in range(config.replica.count)), *actors]


def test_rejection_off_starts_no_replica() -> None:
    by_name = {file.stem: load(file) for file in CONFIGS}
    names = {
        key: [process.name for process in processes_of(by_name[key], Path("c.yaml"))] for key in ("quickstart", "sync")
    }
    assert names["quickstart"] == ["broker", "learner", "replica-0", "actor-0", "actor-1"]
    assert names["sync"] == ["broker", "learner", "actor-0", "actor-1"]
