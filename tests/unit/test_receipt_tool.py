"""The receipt's reader: a step, the audit and drops by length, from a run directory."""

import json

from tools import receipt
from tools.lengths import length_rows


def status(trained, dropped):
    return {"trajectories_by_length": {"trained": trained, "dropped": dropped}}


def test_a_length_that_is_dropped_more_than_chance_stands_out():
    rows = length_rows(status({"8": 900, "16": 450, "32": 40}, {"8": 9, "32": 60}))
    assert [(r.longest, r.trained, r.dropped) for r in rows] == [(8, 900, 9), (16, 450, 0), (32, 40, 60)]
    assert [r.stands_out for r in rows] == [True, True, True]
    assert rows[2].drop_rate == 0.6


def test_noise_and_small_numbers_do_not_stand_out():
    assert not any(r.stands_out for r in length_rows(status({"8": 900, "16": 460}, {"8": 9, "16": 6})))
    assert not any(r.stands_out for r in length_rows(status({"8": 900, "16": 3}, {"16": 3})))
    assert length_rows({}) == []


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


def test_pass_rates_and_retired_questions_are_shown():
    line = {
        "step": 3, "trajectories": 8, "tokens": 80, "tokens_proposed": 40, "reward": 0.5, "reward_std": 0.1,
        "groups_without_signal": 1, "lag_mean": 0.0, "lag_max": 0, "lag_histogram": {"0": 40}, "length_mean": 5.0,
        "length_max": 6, "truncated": 0.0, "pass_rates": {"0": 3, "0.5": 2}, "questions_retired": 7,
        "questions_skipped": 9,
    }  # fmt: skip
    rows = dict(receipt.receipt_rows(line))
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
