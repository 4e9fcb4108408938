"""What the contestants begin from and are asked: starting models, and questions as TRL's script reads them."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import Qwen3MoeForCausalLM

from actor.tasks.base import make_task
from common.config import RunConfig, load
from tools.bench.end2end.contestants import CONFIG, LARGER, Arena
from tools.bench.loop import bar_shape
from tools.warmstart import ensure


def start_model(root: Path, arena: Arena, seed: int) -> Path:
    """The model that every contestant of ``seed`` begins from, a Hugging Face directory; made if it is not there."""
    path = root / f"{'larger-' if arena.name == LARGER else ''}start-{seed}"
    if not (path / "config.json").exists():
        if arena.name == LARGER:
            torch.manual_seed(seed)
            Qwen3MoeForCausalLM(bar_shape()).save_pretrained(path)
            write_words(path, bar_shape().vocab_size)
        else:
            ensure(load(CONFIG, [f"model.path={path}", f"run.seed={seed}"]))
    return path


def write_words(directory: Path, vocabulary: int) -> None:
    """A tokenizer of ``vocabulary`` words with spaces between them, none of which begins another: ``<0> <1>``."""
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {f"<{i}>": i for i in range(vocabulary)}, "unk_token": "<0>"},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer) + "\n")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<0>", "eos_token": "<1>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")


def write_questions(path: Path, config: RunConfig, count: int) -> None:
    """The first ``count`` training questions of the run as its actors are given them; the answer where there is one."""
    model, task_of = config.model.path, config.task
    task = make_task(task_of.name, model, config.run.seed, task_of.params)
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    between = "" if task_of.in_small_alphabet else " "
    with path.open("w") as file:
        for index in range(count):
            item = task.prompt(index, "train")
            prompt = between.join(str(tokenizer.id_to_token(i)) for i in item.prompt_ids.tolist())
            answer = tokenizer.encode(item.reference).ids if item.reference is not None else None
            file.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
