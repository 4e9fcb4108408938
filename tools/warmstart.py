"""``python -m tools.warmstart RUN.yaml [key=value ...]``: the tiny mixture-of-experts of the quick start.

::

    training prompts + answers -> Qwen3MoeForCausalLM, supervised -> sampled held-out reward >= target -> HF directory

One thread, one seed, deterministic kernels: the same seed gives the same bytes. The directory is
written beside its place and renamed into it, so a half-written model is never seen.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging as transformers_logging

from actor.tasks.base import DemonstratedTask, PromptItem, make_task
from actor.tasks.sort6 import write_tokenizer
from common.config import RunConfig, load
from common.errors import ConfigError, CroupierError, DeadlineError, ModelError
from common.locks import lock_within
from common.process import die_with_parent
from tools.outputs import writing
from tools.stamp import ModelState, model_state, models_of, write_stamp

CHECK_EVERY = 4  # steps between two looks at the held-out reward: it rises from .1 to .3 in about 20
CHECK_PROMPTS = 512  # one standard error is .018 at a reward of .2
CHECK_LOSS = 0.9  # nats a token, above which no answer can be right and sampling is not worth its time
BALANCE = 0.01  # coefficient of the load-balancing loss, as in training
MAX_POSITIONS = 64
ROPE_THETA = 10_000.0
LIMIT_S = 120.0


def ensure(config: RunConfig) -> Path:
    """Make the model that ``config`` wants unless it lies at ``model.path`` already; returns the path."""
    path = Path(config.model.path)
    if not config.task.in_small_alphabet:
        raise ConfigError(
            f"task.name={', '.join(config.task.labels)}: the warm start knows sort6 and its kin; "
            "set model.path to a real model"
        )
    state = model_state(config)
    if state is ModelState.CURRENT:
        print(f"{path}: already made by this warm start", flush=True)
        return path
    if state is ModelState.FOREIGN:
        raise ModelError(
            f"model.path={str(path)!r}: holds files that the warm start did not make and will not overwrite; "
            "use it as it is, or set model.path to another directory"
        )
    if state is ModelState.STALE:
        print(f"{path}: made with another seed, task or shape; making it again", flush=True)
    with writing(path, "set model.path to another directory"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path.parent):
            if model_state(config) is ModelState.CURRENT:
                print(f"{path}: made meanwhile by another process", flush=True)
            else:
                _replace(config, path)
    return path


def _replace(config: RunConfig, path: Path) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        make(config, part)
        if path.exists():
            shutil.rmtree(path)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def alone(directory: Path, wait_s: float = 2 * LIMIT_S) -> Iterator[None]:
    """One warm start at a time in ``directory``: what two make at once would be made twice and swapped under a reader.

    Raises :class:`DeadlineError` if another holds it for ``wait_s``.
    """
    held = os.open(directory, os.O_RDONLY)
    try:
        waiting = f"{directory}: waiting for another warm start there"
        if not lock_within(held, wait_s, lambda: print(waiting, flush=True)):
            raise DeadlineError(
                f"{directory}: another warm start has been at work there for {wait_s:.0f} s; stop it, or set "
                "model.path to another directory"
            )
        yield
    finally:
        os.close(held)


def make(config: RunConfig, directory: Path) -> None:
    """Train and save into the empty ``directory``."""
    write_tokenizer(directory)
    sorting = config.task.sorting
    task = make_task(sorting.name, str(directory), config.run.seed, sorting.params)
    assert isinstance(task, DemonstratedTask)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.run.seed)
    model = build(config, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    steps, reward = train(config, model, task)
    save(model, directory, config)
    write_stamp(directory, config, steps, reward)


def build(config: RunConfig, vocab_size: int, eos_id: int, pad_id: int) -> Qwen3MoeForCausalLM:
    """A randomly initialised Qwen3-MoE of the configured shape."""
    shape = config.warmstart
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=vocab_size,
            hidden_size=shape.hidden,
            intermediate_size=shape.expert_width,
            moe_intermediate_size=shape.expert_width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.hidden // shape.heads,
            num_experts=shape.experts,
            num_experts_per_tok=shape.experts_per_token,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            max_position_embeddings=MAX_POSITIONS,
            rope_theta=ROPE_THETA,
            tie_word_embeddings=False,
            router_aux_loss_coef=BALANCE,
            output_router_logits=True,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
            bos_token_id=None,
        )
    )
    # transformers starts the padding row at zero, where a norm's gradient is a thousandfold; the policy may sample it
    torch.nn.init.normal_(model.model.embed_tokens.weight.data[pad_id], std=model.config.initializer_range)
    return model


def train(config: RunConfig, model: Qwen3MoeForCausalLM, task: DemonstratedTask) -> tuple[int, float]:
    """Supervised steps until the sampled held-out reward reaches its target; returns steps and reward."""
    shape, started, shown = config.warmstart, time.monotonic(), 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.lr, weight_decay=0.0)
    sampling = torch.Generator().manual_seed(config.run.seed + 1)
    held_out = [task.prompt(index, "heldout") for index in range(CHECK_PROMPTS)]
    reward = 0.0
    for step in range(1, shape.max_steps + 1):
        first = (step - 1) * shape.batch
        items = [task.prompt(index, "train") for index in range(first, first + shape.batch)]
        loss = supervised_loss(model, task, items, first)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % CHECK_EVERY == 0 and loss.item() < CHECK_LOSS:
            reward = sampled_reward(model, task, held_out, sampling)
        elapsed = time.monotonic() - started
        if reward >= shape.target_reward or elapsed - shown > 1.0:
            shown = elapsed
            print(f"step {step}: loss {loss.item():.3f}, held-out reward {reward:.3f}, {elapsed:.0f} s", flush=True)
        if reward >= shape.target_reward:
            return step, reward
        if elapsed > LIMIT_S:
            raise DeadlineError(
                f"warm start: held-out reward {reward:.3f} after {step} steps and {elapsed:.0f} s, "
                f"warmstart.target_reward={shape.target_reward}; lower it, or use a smaller model"
            )
    raise ModelError(
        f"warm start: held-out reward {reward:.3f} after warmstart.max_steps={shape.max_steps}, "
        f"warmstart.target_reward={shape.target_reward}; raise the first or lower the second"
    )


def supervised_loss(model: Qwen3MoeForCausalLM, task: DemonstratedTask, items: list[PromptItem], first: int) -> Tensor:
    """Mean cross-entropy of the right answers, load-balancing loss included; ``first`` counts what came before."""
    rows = [
        np.concatenate([item.prompt_ids, task.demonstration(item, _draw(first + n))]) for n, item in enumerate(items)
    ]
    ids_BT = torch.from_numpy(np.stack(rows).astype(np.int64))
    labels_BT = ids_BT.clone()
    labels_BT[:, : len(items[0].prompt_ids)] = -100  # the prompt is given, not learned
    loss: Tensor = model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
    return loss


@torch.no_grad()
def sampled_reward(
    model: Qwen3MoeForCausalLM, task: DemonstratedTask, items: list[PromptItem], generator: torch.Generator
) -> float:
    """Mean reward of one answer a prompt, sampled at temperature 1 and judged by the task's own verifier."""
    ids_BT = torch.tensor([[int(token) for token in item.prompt_ids] for item in items])
    start = ids_BT.shape[1]
    for _ in range(len(task.demonstration(items[0], 0))):
        logits_BV = model(input_ids=ids_BT, use_cache=False, output_router_logits=False).logits[:, -1]
        next_B1 = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)
        ids_BT = torch.cat([ids_BT, next_B1], dim=1)
    answers = [_ended(row, model.config.eos_token_id) for row in ids_BT[:, start:].numpy().astype(np.int32)]
    return float(np.mean([task.reward(item, row)["correct"] for item, row in zip(items, answers, strict=True)]))


def _ended(row: NDArray[np.int32], eos_id: int) -> NDArray[np.int32]:
    """Up to the first end token, it included."""
    ends = np.flatnonzero(row == eos_id)
    return row[: ends[0] + 1] if len(ends) else row


def _draw(number: int) -> int:
    """Numbers without a pattern, the same every time (Knuth's multiplicative hash)."""
    return ((number * 2654435761) & 0xFFFFFFFF) >> 16


def save(model: Qwen3MoeForCausalLM, directory: Path, config: RunConfig) -> None:
    """Write weights under their Hugging Face names, one tensor an expert, and config.json."""
    model.to(getattr(torch, config.model.dtype)).save_pretrained(directory)
    file = directory / "config.json"
    written = json.loads(file.read_text())
    # transformers 5 renamed these; every published Qwen3-MoE directory, and so every reader, has the older names.
    written |= {"num_experts": config.warmstart.experts, "rope_theta": ROPE_THETA, "output_router_logits": False}
    file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Make the model of one run file."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tools.warmstart", description="Make the quick start's tiny model."
    )
    parser.add_argument("config", help="the run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args(arguments)
    die_with_parent()
    signal.signal(
        signal.SIGTERM, lambda number, _frame: sys.exit(128 + number)
    )  # so that the half-made model is removed
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        models = models_of(load(given.config, given.overrides))
        ours = [one for one in models if model_state(one) is not ModelState.FOREIGN]
        for one in ours or models:
            ensure(one)
    except CroupierError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
