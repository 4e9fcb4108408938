"""The whole loop's completion tokens/s, beside bare generation and bare training of the same model.

::

    transformers.generate, 16 × (32 + 128) tokens   \\
    forward + backward + AdamW of the same batch     }  each alone on the machine, 1 and all threads
    tools.launch: actor, broker, replica, learner   /   all at once

The limit is the harmonic combination 1 / (1/generate + 1/train): both share the cores. The bar is
0.6 of it. The model is a randomly initialised Qwen3-MoE, 4 layers, hidden 256, 8 experts top-2.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging as transformers_logging

from common.config import (
    ActorSection,
    BrokerSection,
    EvaluationSection,
    ModelSection,
    RolloutSection,
    RunConfig,
    RunSection,
    StalenessSection,
    TaskSection,
)
from common.process import free_port
from tools.bench.harness import Row, interleave
from tools.bench.launching import launch, loop_figures

GROUPS, SIBLINGS, PROMPT, COMPLETION = 4, 4, 32, 128
SEQUENCES = GROUPS * SIBLINGS
TOKENS = SEQUENCES * COMPLETION  # completion tokens a step
VOCABULARY = 4096
STEPS = 12
BAR = 0.6


def run(reps: int) -> list[Row]:
    """Interleave the limits and the loop; rows for each, and the share of each room."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="croupier-bench-") as folder:
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(bar_shape())
        model.save_pretrained(Path(folder) / "model")
        shares: dict[str, list[float]] = {}

        def whole_loop() -> float:
            speed, found = loop_speed(Path(folder))
            for room, share in found.items():
                shares.setdefault(room, []).append(share)
            return speed

        contestants: dict[str, Callable[[], float]] = {}
        for threads in sorted({1, cores}):
            contestants[f"generate/{threads}"] = partial(generate_speed, model, threads)
            contestants[f"train/{threads}"] = partial(train_speed, model, threads)
        speed = interleave(contestants | {"loop": whole_loop}, reps)
    generate = max(value for name, value in speed.items() if name.startswith("generate/"))
    train = max(value for name, value in speed.items() if name.startswith("train/"))
    limit = harmonic(generate, train)
    rows = [
        Row("loop", f"bare {name.replace('/', ', ')} thread(s)", value, "tok/s", "harmonic limit", limit, reps)
        for name, value in speed.items()
        if name != "loop"
    ]
    rows.append(Row("loop", "whole loop", speed["loop"], "tok/s", "harmonic limit", limit, reps))
    rows.append(Row("loop", "whole loop", speed["loop"], "tok/s", f"bar: {BAR} of the limit", BAR * limit, reps))
    for room, values in sorted(shares.items()):
        mean = sum(values) / len(values)
        rows.append(Row("loop", f"share of the loop in {room}", mean, "of wall time", "whole loop", 1.0, reps))
    return rows


def harmonic(generate: float, train: float) -> float:
    """Tokens/s of doing one after the other."""
    return 1.0 / (1.0 / generate + 1.0 / train)


def bar_shape() -> Qwen3MoeConfig:
    """The model that whole loops are compared at: 4 layers of 256, 8 experts, two a token."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def generate_speed(model: Qwen3MoeForCausalLM, threads: int) -> float:
    """Bare ``transformers.generate``, sampled from the full distribution, in completion tokens/s."""
    ids_BT = torch.randint(2, VOCABULARY, (SEQUENCES, PROMPT))
    how = GenerationConfig(
        max_new_tokens=COMPLETION, min_new_tokens=COMPLETION, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        pad_token_id=0, eos_token_id=None, use_cache=True,
    )  # fmt: skip
    model.eval()
    with _threads(threads):
        model.generate(ids_BT[:, :4], attention_mask=torch.ones_like(ids_BT[:, :4]), max_new_tokens=2)  # warm up
        start = time.perf_counter()
        model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=how)
        return TOKENS / (time.perf_counter() - start)


def train_speed(model: Qwen3MoeForCausalLM, threads: int, rounds: int = 3) -> float:
    """Bare forward, backward and AdamW of one batch, in completion tokens/s."""
    ids_BT = torch.randint(2, VOCABULARY, (SEQUENCES, PROMPT + COMPLETION))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.train()
    with _threads(threads):
        for round_ in range(rounds + 1):
            if round_ == 1:  # the first one warms up
                start = time.perf_counter()
            model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return TOKENS * rounds / (time.perf_counter() - start)


def loop_config(folder: Path, model: Path, address: str) -> RunConfig:
    """The run that is measured: the quick start's processes on the bar's model and shape."""
    return RunConfig(
        run=RunSection(name="loop", dir=str(folder / "runs"), steps=STEPS),
        model=ModelSection(path=str(model)),
        task=TaskSection(name="fixed", params={"prompt_tokens": PROMPT}),
        rollout=RolloutSection(
            groups_per_step=GROUPS,
            group_size=SIBLINGS,
            max_prompt_tokens=PROMPT,
            max_tokens=COMPLETION,
            ignore_eos=True,
        ),
        staleness=StalenessSection(budget=2),
        actor=ActorSection(count=1),
        evaluation=EvaluationSection(prompts=0),
        broker=BrokerSection(address=address),
    )


def loop_speed(folder: Path) -> tuple[float, dict[str, float]]:
    """Launch the real loop once; completion tokens/s in its steady state and the share of each room."""
    config = loop_config(folder, folder / "model", f"tcp://127.0.0.1:{free_port()}")
    return loop_figures(launch(config, folder), TOKENS)
