"""The receipt's reader: a step, the audit and drops by length, from a run directory."""

import json

import pytest

from tools import receipt
from tools.console import make_console
from tools.drops import drop_rows
from tools.receipt import drop_table


def status(trained, dropped):
    return {"trajectories_by_length": {"trained": trained, "dropped": dropped}}


def test_a_length_that_is_dropped_more_than_chance_stands_out():
    rows = drop_rows(status({"8": 900, "16": 450, "32": 40}, {"8": 9, "32": 60}))
    assert [(int(r.value), r.trained, r.dropped) for r in rows] == [(8, 900, 9), (16, 450, 0), (32, 40, 60)]
    assert [r.stands_out for r in rows] == [True, True, True]
    assert rows[2].drop_rate == 0.6


def test_drops_are_told_apart_by_reward_lag_and_task_too():
    found = drop_rows(
        {
            "trajectories_by_task": {"trained": {"b": 5, "a": 7}, "dropped": {"a": 1}},
            "trajectories_by_lag": {"trained": {"10": 4, "2": 9}},
            "trajectories_by_reward": {"trained": {"0": 900, "1": 900}, "dropped": {"-1": 3, "1": 90}},
        }
    )
    assert [(row.words, row.trained, row.dropped, row.stands_out) for row in found] == [
        ("reward -1", 0, 3, False), ("reward 0", 900, 0, True), ("reward 1", 900, 90, True),
        ("lag 2", 9, 0, False), ("lag 10", 4, 0, False),
        ("task a", 7, 1, False), ("task b", 5, 0, False),
    ]  # fmt: skip


def test_noise_and_small_numbers_do_not_stand_out():
    assert not any(r.stands_out for r in drop_rows(status({"8": 900, "16": 460}, {"8": 9, "16": 6})))
    assert not any(r.stands_out for r in drop_rows(status({"8": 900, "16": 3}, {"16": 3})))
    assert drop_rows({}) == []


def test_the_command_reads_a_run_directory(tmp_path, capsys):
    assert receipt.main([str(tmp_path)]) == 2
    assert "no run directory" in capsys.readouterr().out.replace("\n", " ")
    strata = {"strata": {"lag": {"0": [100, 0.9, 0.1], "2": [300, 0.7, 5.0]}}, "warnings": ["lag 2: acceptance 0.7"]}
    step = {
        "kind": "step", "time_s": 1.0, "step": 0, "audit": strata, "acceptance": 0.75, "lag_histogram": {"0": 1},
    }  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    (tmp_path / "status.json").write_text(json.dumps(status({"8": 100}, {"16": 100})))
    assert receipt.main([str(tmp_path), "--audit"]) == 0
    shown = capsys.readouterr().out
    assert "100.00%" in shown and "differs from the rest" in shown and "-0.2000" in shown
    assert receipt.main([str(tmp_path), "--step", "7"]) == 2


FULL = {
    "kind": "step", "time_s": 1.0, "step": 0, "trajectories": 8, "tokens": 80, "tokens_proposed": 40, "reward": 0.5,
    "reward_std": 0.1, "groups_without_signal": 1, "lag_mean": 0.0, "lag_max": 0, "lag_histogram": {"0": 40},
    "length_mean": 5.0, "length_max": 6, "truncated": 0.0, "pass_rates": {"0.5": 2}, "questions_retired": 7,
    "questions_skipped": 9, "reward_channels": {"a": 0.5, "b": 0.25}, "reward_mixed": 0.4, "reward_mixed_std": 0.1,
    "channels_missing": {"a": 1}, "channels_gated": {"b": 2}, "exemplars": 1, "scored_by_version": 3,
    "threshold": 1.0, "threshold_next": 1.1, "budget_feasible": True, "rethinned_by_version": 2, "rethinned_tokens": 3,
    "tokens_accepted": 39, "acceptance": 0.97, "acceptance_low": 0.9, "acceptance_high": 1.0,
    "acceptance_expected": 0.96, "kl_before": 1e-3, "kl_after": 1e-4, "kl_before_se": 1e-5, "kl_after_se": 1e-6,
    "ess": 0.9, "z_lower": 0.9, "z_upper": 1.0, "z_theta": 1.0, "z_kappa": 0.5, "topk_missing_mass": 0.01,
    "unscorable": 1, "dropped": {"stale": 2}, "kl_reference": 0.25, "reference_unscorable": 2,
    "tasks": {"t": {"trajectories": 8, "reward": 0.5, "reward_std": 0.1, "length_mean": 5.0,
                    "groups_without_signal": 1, "groups": 2}},
    "teachers": {"one": {"gap": None, "tokens": 1200, "clipped": 3, "unscorable": 0}},
    "audit": {"strata": {"lag": {"0": [40, 0.9, 0.1]}}, "warnings": []},
}  # fmt: skip


@pytest.mark.parametrize("odd", [[1, 2], "x", {"a": []}, {"²": 3, "-": {"b": "c"}}, None, 1e300], ids=str)
def test_a_figure_of_the_wrong_kind_is_left_out_or_told(tmp_path, capsys, odd):
    """Every field in turn; the receipt is whole, or what it lacks is named."""
    whole = dict(receipt.receipt_rows(FULL))
    assert len(whole) == 20
    for name in FULL.keys() - {"kind", "step"}:
        (tmp_path / "metrics.jsonl").write_text(json.dumps(FULL | {name: odd}))
        code, said = receipt.main([str(tmp_path)]), capsys.readouterr().out.replace("\n", " ")
        assert code in (0, 2) and (code == 0 or name in said or name == "time_s"), (name, said)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(FULL | {"audit": odd}))
    assert receipt.main([str(tmp_path), "--audit"]) == 0


def test_pass_rates_retired_questions_and_drops_are_shown_without_rejection_too():
    line = {
        "step": 3, "trajectories": 8, "tokens": 80, "tokens_proposed": 40, "reward": 0.5, "reward_std": 0.1,
        "groups_without_signal": 1, "lag_mean": 0.0, "lag_max": 0, "lag_histogram": {"0": 40}, "length_mean": 5.0,
        "length_max": 6, "truncated": 0.0, "pass_rates": {"0": 3, "0.5": 2}, "questions_retired": 7,
        "questions_skipped": 9,
    }  # fmt: skip
    rows = dict(receipt.receipt_rows(line | {"dropped": {"stale": 2, "lag": 3}}))
    assert rows["rejection"].startswith("off") and rows["dropped so far"] == "stale: 2, lag: 3"
    rows = dict(receipt.receipt_rows(line))
    assert rows["dropped so far"] == "nothing"
    assert rows["passed of a group"] == "0: 3, 0.5: 2 groups, before any filter; 7 questions retired, 9 skipped"
    del line["questions_retired"]
    assert dict(receipt.receipt_rows(line))["passed of a group"] == "0: 3, 0.5: 2 groups, before any filter"


def test_what_frozen_models_said_is_shown():
    line = {
        "step": 3, "trajectories": 8, "tokens": 80, "tokens_proposed": 40, "reward": 0.5, "reward_std": 0.1,
        "groups_without_signal": 1, "lag_mean": 0.0, "lag_max": 0, "lag_histogram": {"0": 40}, "length_mean": 5.0,
        "length_max": 6, "truncated": 0.0, "kl_reference": 0.25, "reference_unscorable": 2, "teachers": {
            "one": {"gap": -0.5, "tokens": 1200, "clipped": 3, "unscorable": 0},
            "two": {"gap": None, "tokens": 0, "clipped": 0, "unscorable": 9},
        },
    }  # fmt: skip
    rows = dict(receipt.receipt_rows(line))
    assert rows["KL to the reference"] == "2.500e-01 nats a token, of the behaviour; 2 tokens without a score"
    assert rows["teacher one"].startswith("-0.5000 nats a token beside the behaviour, over 1,200 tokens; 3 cut")
    assert rows["teacher two"].startswith("–") and rows["teacher two"].endswith("9 without a score")


def test_names_with_brackets_and_digits_of_other_scripts_stay_what_they_are():
    status = {"trajectories_by_task": {"trained": {"sort[easy]": 5, "[/x]": 1, "²": 3, ":smile:": 2}, "dropped": {}}}
    console = make_console()
    with console.capture() as told:
        console.print(drop_table(drop_rows(status)))
    assert all(f"task {name} " in told.get() for name in status["trajectories_by_task"]["trained"])
