"""One run of TRL's GRPOTrainer on the questions of a croupier run; a script for the interpreter of ``.trl``.

::

    python trl_grpo.py JOB.json      job: see Job; writes <out>/lines.jsonl and <out>/model-<step>/

Nothing of croupier is imported here: questions and their right answers come in the job's files, as
croupier's task words them. A line is a step: ``{"at_s", "step", "samples", "tokens", "reward"}``,
``at_s`` on the system's monotonic clock without what saving models took; the first line is step 0,
written when the trainer is built.
"""

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What to train; every number is that of the croupier run beside it."""

    model: str  # Hugging Face directory with a tokenizer
    questions: str  # JSON lines {"prompt": text, "answer": ids or null}, in the order in which they are asked
    out: str
    seed: int
    steps: int
    save_every: int  # steps between two saved models; 0: none
    prompts: int  # of a step
    siblings: int  # completions of a prompt
    max_tokens: int
    temperature: float
    lr: float
    min_lr_ratio: float  # the rate falls linearly to this part of it
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_grad_norm: float
    clip_low: float
    clip_high: float
    router_aux_loss_coef: float  # transformers' balance loss is experts-per-token times croupier's
    threads: int
    experts: str = "grouped_mm"  # transformers' way to compute the experts
    ignore_eos: bool = False  # sample max_tokens always


def correct(completion_ids: Sequence[int], answer: Sequence[int] | None) -> float:
    """The verifier of sort6, 1 for exactly the right ids, end token included; without an answer that of fixed."""
    if answer is None:
        return float(sum(completion_ids) % 2)
    return float(list(completion_ids) == list(answer))


def decay(update: int, steps: int, min_lr_ratio: float) -> float:
    """The rate of update ``update`` (from 0), in parts of the first: croupier's linear schedule."""
    progress = min(1.0, update / max(1, steps - 1))
    return min_lr_ratio + (1.0 - min_lr_ratio) * (1.0 - progress)


def train(job: Job) -> None:
    """The whole run."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(job.threads)
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in Path(job.questions).read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=torch.float32, experts_implementation=job.experts or None
    )
    counts = {"samples": 0, "tokens": 0, "right": 0.0}
    saving_s = 0.0

    def reward(completion_ids: list[list[int]], answer: list[list[int] | None], **_: Any) -> list[float]:
        values = [correct(ids, wanted) for ids, wanted in zip(completion_ids, answer, strict=True)]
        counts["samples"] += len(values)
        counts["tokens"] += sum(map(len, completion_ids))
        counts["right"] = sum(values) / len(values)
        return values

    with (out / "lines.jsonl").open("w") as lines:

        def note(step: int) -> None:
            line = {
                "at_s": time.monotonic() - saving_s,
                "step": step,
                "samples": counts["samples"],
                "tokens": counts["tokens"],
                "reward": counts["right"],
            }
            lines.write(json.dumps(line) + "\n")

        class Note(TrainerCallback):  # type: ignore[misc]  # trl is not there when types are checked
            """A line a step, a model every so many."""

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                nonlocal saving_s
                step = state.global_step
                note(step)
                if job.save_every and (step % job.save_every == 0 or step == job.steps):
                    began = time.monotonic()
                    lines.flush()
                    model.save_pretrained(out / f"model-{step}")
                    saving_s += time.monotonic() - began

        optimizer = torch.optim.AdamW(
            model.parameters(), lr=job.lr, betas=(job.beta1, job.beta2), eps=job.eps,
            weight_decay=job.weight_decay, fused=True,
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda u: decay(u, job.steps, job.min_lr_ratio))
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=str(out / "trainer"),
                seed=job.seed,
                max_steps=job.steps,
                per_device_train_batch_size=job.prompts * job.siblings,
                gradient_accumulation_steps=1,
                num_generations=job.siblings,
                max_completion_length=job.max_tokens,
                temperature=job.temperature,
                generation_kwargs={"min_new_tokens": job.max_tokens} if job.ignore_eos else None,
                beta=0.0,
                epsilon=job.clip_low,
                epsilon_high=job.clip_high,
                loss_type="dapo",  # the mean over the batch's tokens, croupier's default
                scale_rewards="group",
                learning_rate=job.lr,
                max_grad_norm=job.max_grad_norm,
                router_aux_loss_coef=job.router_aux_loss_coef,
                shuffle_dataset=False,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]),
            processing_class=AutoTokenizer.from_pretrained(job.model),
            callbacks=[Note()],
            optimizers=(optimizer, schedule),
        )
        for callback in (PrinterCallback, ProgressCallback):
            with contextlib.suppress(ValueError):
                trainer.remove_callback(callback)
        note(0)
        trainer.train()


def main(arguments: list[str]) -> int:
    """Entry point."""
    train(Job(**json.loads(Path(arguments[0]).read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
