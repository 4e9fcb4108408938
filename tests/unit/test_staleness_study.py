"""The study's sampler and trainer against what they stand for; its report on made-up results."""

import numpy as np
import torch

from actor.tasks.sort6 import EOS
from learner.mesh import single
from learner.model.config import ModelConfig
from tests.unit.test_mesh import model_of
from tools.bench.staleness.methods import METHODS, RATES, REGIMES
from tools.bench.staleness.report import interval, write_report
from tools.bench.staleness.sampler import sample
from tools.bench.staleness.study import TUNING_SEED, Job, Result, Results, final_rewards

MODEL = ModelConfig(
    vocab_size=16, hidden_size=16, intermediate_size=0, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, tie_word_embeddings=False,
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
)  # fmt: skip


def test_what_is_sampled_has_the_densities_that_the_whole_sequence_gives():
    model = model_of(MODEL, single())
    prompts = torch.randint(0, 16, (5, 7), generator=torch.Generator().manual_seed(1))
    found = sample(model, prompts, 6, EOS, torch.Generator().manual_seed(2))
    whole = torch.cat((prompts, found.ids), dim=1)
    width = whole.shape[1]
    hidden = model.hidden(whole.reshape(-1), np.arange(0, 5 * width + 1, width)).unflatten(0, (5, width))
    expected = (hidden[:, 6:-1] @ model.head.T).log_softmax(dim=2)
    assert torch.allclose(found.log_q, expected, atol=1e-4)
    ends = [[*row.tolist(), EOS].index(EOS) + 1 for row in found.ids]
    assert found.lengths.tolist() == [min(end, found.ids.shape[1]) for end in ends]


def test_sampled_tokens_are_as_frequent_as_their_densities_say():
    model = model_of(MODEL, single())
    prompts = torch.arange(7).expand(4000, 7)
    found = sample(model, prompts, 1, EOS, torch.Generator().manual_seed(3))
    frequency = torch.bincount(found.ids[:, 0], minlength=16) / 4000
    assert torch.allclose(frequency, found.log_q[0, 0].exp(), atol=0.035)


def made_up(tmp_path, seeds):
    results = Results(tmp_path / "results.jsonl")
    rng = np.random.default_rng(0)
    for r, regime in enumerate(REGIMES):
        for m, method in enumerate(METHODS):
            for lr in RATES:
                for seed in (*seeds, TUNING_SEED):
                    level = 0.5 + 0.03 * m - 0.02 * r + (0.1 if lr == RATES[m % 3] else 0.0) + 0.001 * rng.random()
                    curve = [(u, level) for u in (0, 25, 50)]
                    results.add(Result(Job(method, regime, lr, seed), curve, {"acceptance": 0.9}))
    return results


def test_the_report_says_what_made_up_results_support_and_they_survive_a_torn_line(tmp_path):
    seeds = [0, 1, 2]
    made_up(tmp_path, seeds)
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text() + '{"job": {"meth')
    results = Results(path)
    assert [results.rate(m, "lag4") for m in METHODS] == [RATES[i % 3] for i in range(len(METHODS))]
    rewards = final_rewards(results, seeds)
    assert np.mean(rewards["jackpot", "lag0"]) > np.mean(rewards["tis", "lag0"])
    write_report(results, seeds, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "- Jackpot as in the paper − TIS, C = 2: is above 0 over the stale regimes" in text
    assert "lag 64: the greatest mean is that of OBRS + clip at the behaviour" in text
    assert (tmp_path / "results" / "staleness.png").stat().st_size > 10_000


def test_an_interval_is_students():
    mean, half = interval(np.array([1.0, 2.0, 3.0]))
    assert mean == 2.0
    assert abs(half - 4.303 / np.sqrt(3)) < 1e-9
