"""A whole model, forward and backward with its loss, beside transformers' model on the same sequences.

Qwen3-MoE, 4 layers, hidden 256, 8 experts, 2 a token, one thread. Lengths are lognormal, as rollouts
are: transformers pads them to the longest, ours are packed. Tokens/s count real tokens only.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from learner.device import keep_freed_memory
from learner.hf import load_hf
from learner.logprobs import Head, by_autograd, loss_through_head
from learner.model.config import ModelConfig
from learner.model.decoder import Decoder
from tools.bench.harness import Row, interleave, rate

SEQUENCES, MEDIAN, SIGMA, LONGEST = 16, 160, 0.6, 640
CONFIG = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 256, "norm_topk_prob": True, "max_position_embeddings": 2 * LONGEST,
}  # fmt: skip


def run(reps: int) -> list[Row]:
    """Ours and both of transformers' expert implementations, padded; memory kept, as the learner does."""
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lengths = np.random.default_rng(0).lognormal(np.log(MEDIAN), SIGMA, SEQUENCES).clip(8, LONGEST).astype(int)
    sequences = [torch.randint(CONFIG["vocab_size"], (int(n),)) for n in lengths]
    with tempfile.TemporaryDirectory() as directory:
        theirs = _theirs(Path(directory), "eager")
        theirs.save_pretrained(directory)
        grouped = Qwen3MoeForCausalLM.from_pretrained(directory, experts_implementation="grouped_mm")
        ours = Decoder(ModelConfig.from_hf_dir(directory))
        load_hf(directory, ours)
    total = int(lengths.sum())
    contestants = {
        "ours, packed": lambda: rate(lambda: _packed(ours, sequences), total),
        "transformers eager, padded": lambda: rate(lambda: _padded(theirs, sequences), total),
        "transformers grouped_mm, padded": lambda: rate(lambda: _padded(grouped, sequences), total),
    }
    interleave(contestants, 1)
    found = interleave(contestants, reps)
    reference = max((k for k in found if "transformers" in k), key=found.__getitem__)
    padding = 1 - total / (SEQUENCES * int(lengths.max()))
    label = f"model, {total} tokens ({padding:.0%} padding saved)"
    return [Row("learner", f"{label}: {k}", v, "tokens/s", reference, found[reference], reps) for k, v in found.items()]


def _theirs(_directory: Path, implementation: str) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(**CONFIG, pad_token_id=None)
    config._experts_implementation = implementation
    return Qwen3MoeForCausalLM(config)


def _packed(model: Decoder, sequences: list[torch.Tensor]) -> None:
    tokens = torch.cat(sequences)
    offsets = np.concatenate(([0], np.cumsum([len(s) for s in sequences])))
    at = torch.from_numpy(np.setdiff1d(np.arange(len(tokens)), offsets))
    hidden = model.hidden(tokens, offsets)
    loss, _, _ = loss_through_head(
        hidden[at - 1], Head(model.head), tokens[at], by_autograd(lambda logp, _: -logp.sum())
    )
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def _padded(model: Qwen3MoeForCausalLM, sequences: list[torch.Tensor]) -> None:
    longest = max(len(s) for s in sequences)
    tokens = torch.zeros((len(sequences), longest), dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    labels = tokens.masked_fill(mask == 0, -100)
    model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
