"""tools.bench end2end: its analysis, and that TRL is asked and judged as croupier's actors are."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from actor.tasks.base import make_task
from actor.tasks.fixed import FixedLength
from actor.tasks.sort6 import ALPHABET, Sort6, decode, encode, write_tokenizer
from common.config import load
from learner.optim import learning_rate
from tools.bench.end2end.__main__ import main
from tools.bench.end2end.analysis import Ratio, Timed, band, paired, reaches
from tools.bench.end2end.contestants import APART, LARGER, MAIN, TRL, arenas, contestants, run_config, trl_job
from tools.bench.end2end.report import lines, spread
from tools.bench.end2end.running import (
    finished,
    judged,
    of_lines,
    of_trl_lines,
    recipe_of,
    run_once,
    saved,
)
from tools.bench.end2end.shapes import write_questions, write_words
from tools.bench.end2end.study import Found, Options, rows
from tools.bench.end2end.study import study as make_study
from tools.bench.end2end.trl_env import PACKAGES, interpreter
from tools.bench.end2end.trl_grpo import correct, decay
from tools.bench.loop import loop_config
from tools.warmstart import ensure

ARENAS = arenas("2", 600, with_trl=True)
FOUR = ARENAS[MAIN].contestants


def timed(key: str, seed: int, step_s: float, steps: int = 5) -> Timed:
    at_s = [step_s * i for i in range(steps)]
    return Timed(key, seed, {}, 9.0, at_s, [256] * steps, [1800] * steps, {"lag": 0.0})


def study(speeds: dict[str, tuple[float, ...]], rewards: list[float]) -> Found:
    """Each contestant's seconds a step by seed; everybody learns the same in the same steps."""
    arena = replace(ARENAS[MAIN], contestants={key: FOUR[key] for key in speeds})
    found = Found(Options((0, 1, 2), docs=None), {MAIN: arena}, {MAIN: {key: FOUR[key].settings[0] for key in speeds}})
    found.timed[MAIN] = {key: {seed: timed(key, seed, s) for seed, s in enumerate(of)} for key, of in speeds.items()}
    found.rewards = {key: {seed: dict(enumerate(rewards)) for seed in range(len(of))} for key, of in speeds.items()}
    return found


def test_the_target_is_reached_on_the_line_between_two_evaluations() -> None:
    curve = [(0.0, 0.2), (10.0, 0.6), (20.0, 0.5), (30.0, 0.9)]
    assert reaches(curve, 0.4) == pytest.approx(5.0)
    assert reaches(curve, 0.6) == 10.0
    assert reaches(curve, 0.7) == pytest.approx(25.0)  # not where 0.6 fell back
    assert reaches(curve, 0.1) == 0.0
    assert reaches(curve, 0.95) is None
    assert reaches([], 0.5) is None


def test_a_version_is_there_when_its_step_is_done() -> None:
    run = timed("sync", 0, step_s=2.0)
    assert run.curve({0: 0.1, 1: 0.2, 3: 0.5, 5: 0.9}) == [(0.0, 0.1), (0.0, 0.2), (4.0, 0.5), (8.0, 0.9)]
    assert run.samples_per_s == pytest.approx(256 * 4 / 8.0)  # the first step is before the clock
    assert run.tokens_per_s == pytest.approx(1800 * 4 / 8.0)


def test_ratios_are_of_the_seeds_that_both_have() -> None:
    ours: dict[int, float | None] = {0: 2.0, 1: 8.0, 2: None, 3: 5.0}
    theirs: dict[int, float | None] = {0: 1.0, 1: 2.0, 2: 1.0, 4: 1.0}
    ratio = paired(ours, theirs)
    assert ratio is not None and ratio.by_seed == [2.0, 4.0]
    assert (ratio.value, ratio.reference, ratio.spread) == (5.0, 1.5, pytest.approx(math.sqrt(2)))
    assert str(ratio) == "3.33 ± 1.41"
    assert paired({0: None}, theirs) is None
    assert paired({0: 0.0}, theirs) is None  # reached before the clock began: nothing to compare
    assert (str(Ratio([(3.0, 2.0)])), Ratio([(3.0, 2.0)]).spread, spread({0: None}, 2)) == ("1.50", 0.0, "–")


def test_a_band_ends_where_the_shortest_run_does() -> None:
    x, mean, low, high = band([[(0.0, 0.0), (10.0, 1.0)], [(0.0, 0.2), (20.0, 0.2)]], points=11)
    assert (x[0], x[-1]) == (0.0, 10.0)
    assert (low[-1], mean[-1], high[-1]) == pytest.approx((0.2, 0.6, 1.0))


def test_rows_stand_beside_the_synchronous_run_and_beside_trl() -> None:
    found = study({"sync": (0.2, 0.2, 0.2), "trl": (0.4, 0.4, 0.4), "obrs": (0.1, 0.1, 0.05)}, [0.2, 0.4, 0.6, 1.0])
    by = {(row.name, row.reference): row for row in rows(found)}
    speed = by["samples/s: asynchronous, budget 2, OBRS", "synchronous"]
    assert (speed.value, speed.reference_value) == pytest.approx((256 * (10 + 10 + 20) / 3, 256 * 5))
    assert (speed.reps, speed.spread) == (3, pytest.approx(np.std([2, 2, 4], ddof=1)))
    wall = by["wall-clock to 0.8 held out: asynchronous, budget 2, OBRS", "TRL GRPOTrainer"]
    assert wall.reference_value == pytest.approx(0.4 * 1.5)  # half way between versions 2 and 3, ended at 1 and 2 steps
    assert not any(row.name.endswith("uncorrected") for row in rows(found))


def test_other_arenas_have_rows_of_their_own() -> None:
    found = study({"sync": (0.2, 0.2, 0.2), "obrs": (0.1, 0.1, 0.1)}, [0.2, 0.4, 1.0])
    assert not any("each side" in row.name for row in rows(found))
    arena = ARENAS[APART]
    found.arenas[APART] = replace(arena, contestants={key: arena.contestants[key] for key in ("sync", "obrs")})
    found.settings[APART] = {key: arena.contestants[key].settings[0] for key in ("sync", "obrs")}
    found.timed[APART] = {"sync": {0: timed("sync", 0, 0.6)}, "obrs": {0: timed("obrs", 0, 0.4)}}
    row = next(row for row in rows(found) if "each side" in row.name)
    assert (row.ratio, row.reps, row.spread) == (pytest.approx(1.5), 1, 0.0)
    asleep = "1 actor, both sides slowed 4 ×"
    assert f"| asynchronous, budget 2, OBRS | {asleep} | 4,500 | **1.50** (1.50) |" in lines(found)


def test_arenas_differ_from_the_quick_start_in_what_they_are_named_for() -> None:
    assert TRL not in ARENAS[APART].contestants
    for key, one in ARENAS[APART].contestants.items():
        config = run_config(one, one.settings[0], 0, 100, "m")
        assert (config.actor.slowdown, config.learner.slowdown, config.actor.count) == (4, 4, 1)
        assert config.staleness.budget == (0 if key == "sync" else 2)
    for one in ARENAS[LARGER].contestants.values():
        config = run_config(one, one.settings[0], 0, 24, "m")
        bar = loop_config(Path("x"), Path("m"), "tcp://127.0.0.1:1")
        assert (config.rollout, config.task) == (bar.rollout, bar.task)
        if one.key == TRL:
            job = trl_job(config, one.settings[0], "q", "o")
            assert (job.prompts, job.siblings, job.max_tokens, job.ignore_eos) == (4, 4, 128, True)


def test_who_misses_the_target_is_named_and_has_no_wall_clock() -> None:
    found = study({"sync": (0.2, 0.2, 0.2), "obrs": (0.1, 0.1, 0.1)}, [0.2, 0.4, 0.9])
    found.rewards["obrs"] = {seed: {0: 0.2, 5: 0.7} for seed in range(3)}
    assert not any("wall-clock" in row.name for row in rows(found))
    text = "\n".join(lines(found))
    assert "asynchronous, budget 2, OBRS did not reach 0.8 on seeds 0, 1, 2" in text
    assert "TRL was not installed" in text


def test_croupier_s_and_trl_s_lines_become_the_same_record() -> None:
    steps = [{"time_s": 9.0 + 2 * i, "trajectories": 256, "tokens_proposed": 1800, "lag_mean": 2.0} for i in range(3)]
    ours = of_lines(FOUR["obrs"], 0, {}, steps, before_s=1.5)
    assert (ours.startup_s, ours.at_s, ours.figures) == (10.5, [0.0, 2.0, 4.0], {"lag": 2.0})
    cumulative = [{"at_s": 100.0 + 3 * i, "samples": 256 * i, "tokens": 1800 * i} for i in range(4)]
    theirs = of_trl_lines(FOUR[TRL], 0, {}, cumulative, began=95.0)
    assert (theirs.startup_s, theirs.at_s) == (8.0, [0.0, 3.0, 6.0])
    assert (theirs.samples, theirs.tokens) == (ours.samples, ours.tokens)
    assert Timed.from_json(theirs.to_json()) == theirs


def test_only_a_run_of_the_same_recipe_need_not_be_run_again(tmp_path: Path) -> None:
    one = FOUR["obrs"]
    recipe = recipe_of(one, one.settings[0], 0, 600, Path("m"))
    assert finished(tmp_path, recipe) is None
    (tmp_path / "timed.json").write_text(Timed("obrs", 0, recipe, 9.0, [0.0, 1.0], [1, 1], [1, 1]).to_json())
    assert finished(tmp_path, recipe) is not None
    assert finished(tmp_path, recipe_of(one, one.settings[1], 0, 600, Path("m"))) is None
    assert finished(tmp_path, recipe_of(contestants("4")["obrs"], one.settings[0], 0, 600, Path("m"))) is None
    (tmp_path / "timed.json").write_text('{"contestant"')
    assert finished(tmp_path, recipe) is None
    assert judged(tmp_path) is None


@pytest.mark.parametrize("arena", [MAIN, LARGER])
def test_trl_is_asked_what_croupier_s_actors_are_asked(arena: str, tmp_path: Path) -> None:
    if arena == MAIN:
        write_tokenizer(tmp_path)
    else:
        write_words(tmp_path, 4096)
        (tmp_path / "config.json").write_text('{"vocab_size": 4096}')
    one = ARENAS[arena].contestants[TRL]
    config = run_config(one, one.settings[0], 3, 9, str(tmp_path))
    write_questions(tmp_path / "q.jsonl", config, count=20)
    tokenizer, task = (
        AutoTokenizer.from_pretrained(tmp_path),
        make_task(config.task.name, str(tmp_path), 3, config.task.params),
    )
    for index, line in enumerate((tmp_path / "q.jsonl").read_text().splitlines()):
        row, item = json.loads(line), task.prompt(index, "train")
        assert tokenizer(text=[row["prompt"]])["input_ids"] == [item.prompt_ids.tolist()]
        if item.reference is None:
            assert row["answer"] is None
        else:
            assert decode(np.array(row["answer"], np.int32)) == item.reference


def test_trl_s_verifier_is_the_task_s(tmp_path: Path) -> None:
    task = Sort6(0, {})
    item = task.prompt(0, "train")
    right = item.reference
    answers = [right, right[:-1], right + "$", right[::-1], "", "$", right[:-1] + ".", ALPHABET[:7]]
    for answer in answers:
        expected = task.reward(item, encode(answer))["correct"]
        assert correct(encode(answer).tolist(), encode(right).tolist()) == expected
    assert [correct(encode(a).tolist(), encode(right).tolist()) for a in answers].count(1.0) == 1
    (tmp_path / "config.json").write_text('{"vocab_size": 4096}')
    fixed = FixedLength(str(tmp_path), 0, {})
    for ids in ([1, 2, 3], [1, 2, 4], [4095]):
        assert correct(ids, None) == fixed.reward(fixed.prompt(0, "train"), np.array(ids, np.int32))["correct"]


def test_all_four_have_the_quick_start_s_numbers() -> None:
    base = load("configs/quickstart.yaml")
    for one in FOUR.values():
        if one.key == TRL:
            continue
        config = run_config(one, one.settings[0], 1, 600, "models/x")
        assert (config.optim, config.rollout, config.task) == (base.optim, base.rollout, base.task)
        assert (config.run.steps, config.run.seed, config.evaluation.prompts) == (600, 1, 0)
        assert config.advantage.deviation == "sample"  # as TRL divides
    assert [run_config(FOUR[k], FOUR[k].settings[0], 0, 9, "m").staleness.budget for k in ("sync", "obrs")] == [
        0,
        2,
    ]
    bare = run_config(FOUR["bare"], FOUR["bare"].settings[0], 0, 9, "m")
    assert (bare.obrs.mode, bare.loss.anchor, bare.loss.correction) == ("off", "proximal", "uncorrected")
    job = trl_job(run_config(FOUR[TRL], FOUR[TRL].settings[0], 1, 600, "m"), FOUR[TRL].settings[0], "q", "o")
    for key in ("lr", "min_lr_ratio", "beta1", "beta2", "eps", "weight_decay", "max_grad_norm"):
        assert asdict(job)[key] == getattr(base.optim, key)
    assert (job.prompts, job.siblings, job.max_tokens) == (32, 8, 8)
    assert job.router_aux_loss_coef == pytest.approx(0.005)  # transformers sums over k = 2 choices, croupier averages
    assert contestants("auto")["obrs"].overrides == ("staleness.budget=auto",)


def test_the_budget_is_the_one_that_the_sweep_recommends(capsys: pytest.CaptureFixture[str]) -> None:
    recommended = re.search(r"^recommended: staleness\.budget=(\d+)$", Path("docs/sweep.md").read_text(), re.MULTILINE)
    assert recommended and Options(seeds=(0,)).budget == recommended[1]
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"default: the {recommended[1]} " in " ".join(capsys.readouterr().out.split())


def test_the_rate_falls_alike() -> None:
    optim = load("configs/quickstart.yaml").optim
    for update in (0, 1, 300, 599, 700):
        assert optim.lr * decay(update, 600, optim.min_lr_ratio) == pytest.approx(learning_rate(optim, update, 600))


def test_a_fresh_study_forgets_its_own_runs_alone(tmp_path: Path) -> None:
    of_all = [arena.directory(key, 7) for arena in ARENAS.values() for key in arena.contestants]
    for name in (*of_all, "start-7", "larger-start-7", "tried", "docs", "trl"):
        (tmp_path / name).mkdir()
    (tmp_path / "chosen.json").write_text("{}")
    make_study(Options((), directory=tmp_path, docs=None, among=(), fresh=True))
    assert {path.name for path in tmp_path.iterdir()} == {"docs", "trl"}


def test_an_environment_of_another_recipe_is_none(tmp_path: Path) -> None:
    assert interpreter(tmp_path) is None
    (tmp_path / "croupier-trl").write_text("trl==0.1")
    assert interpreter(tmp_path) is None
    (tmp_path / "croupier-trl").write_text("\n".join(PACKAGES))
    assert interpreter(tmp_path) == tmp_path / "bin" / "python"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trl_trains_what_croupier_can_judge(tmp_path: Path) -> None:
    python = interpreter()
    if python is None:
        pytest.skip("TRL is not installed: python -m tools.bench.end2end.trl_env")
    model = ensure(load("configs/quickstart.yaml", [f"model.path={tmp_path / 'start'}", "warmstart.target_reward=0"]))
    run = run_once(FOUR[TRL], FOUR[TRL].settings[0], 0, 3, model, tmp_path / "trl", python)
    assert (len(run.at_s), run.samples) == (3, [256] * 3)
    assert all(0 < tokens <= 256 * 8 for tokens in run.tokens)
    assert run.startup_s > 0 and run.at_s[0] == 0 < run.at_s[2]
    directories = dict(saved(tmp_path / "trl", model, tmp_path))
    assert set(directories) == {0, 3}
    before, after = (load_file(path / "model.safetensors") for path in directories.values())
    assert before.keys() == after.keys()
    router = "model.layers.0.mlp.gate.weight"  # learns to balance even where no answer is right
    assert not torch.equal(before[router], after[router])
