"""Who is compared: four ways to train the quick start's task, each with settings to choose from.

All of them see the same questions in the same order, the same verifier, model, temperature, rate
and its decay, AdamW, gradient clip, clip range and balance loss, and make the same number of steps
of 32 × 8 completions. Advantages divide by the sample's deviation everywhere, as TRL does it.
"""

from dataclasses import dataclass, replace

from common.config import RunConfig, load
from tools.bench.end2end.trl_grpo import Job

CONFIG = "configs/quickstart.yaml"
SAVE_EVERY = 25  # steps between two versions that are judged
HELD_OUT, ANSWERS = 512, 4  # questions, and answers to each: one standard error is about .01
SYNCHRONOUS, TRL = "sync", "trl"
SLOWDOWN = 4  # of decoding and of training, where each is to have a machine of its own: three quarters are sleep
UNCORRECTED = ("obrs.mode=off", "loss.anchor=proximal", "loss.correction=uncorrected")


@dataclass(frozen=True)
class Setting:
    """One of the ways in which a contestant may be run here; the fastest is chosen by a short run."""

    title: str
    overrides: tuple[str, ...] = ()  # croupier's
    threads: int = 1  # TRL's
    experts: str = ""  # TRL's: transformers' way to compute the experts


@dataclass(frozen=True)
class Contestant:
    """One of the four."""

    key: str
    title: str
    settings: tuple[Setting, ...]
    overrides: tuple[str, ...] = ()  # croupier's, beside those that all share


ACTORS = tuple(Setting(f"{n} actor{'s' * (n > 1)}", (f"actor.count={n}",)) for n in (1, 2))
IN_TURNS = (*ACTORS, Setting("2 actors, 2 threads for the learner", ("actor.count=2", "learner.threads=2")))
TRL_SETTINGS = tuple(
    Setting(f"{threads} thread{'s' * (threads > 1)}, experts {experts}", threads=threads, experts=experts)
    for threads in (1, 2)
    for experts in ("eager", "grouped_mm")  # batched_mm takes twelve times as long here
)


def contestants(budget: str) -> dict[str, Contestant]:
    """The four, the references first; ``budget`` is that of the asynchronous ones: a number, or auto."""
    asynchronous = f"staleness.budget={budget}"
    found = (
        Contestant(SYNCHRONOUS, "synchronous", IN_TURNS, ("staleness.budget=0", "obrs.mode=off")),
        Contestant(TRL, "TRL GRPOTrainer", TRL_SETTINGS),
        Contestant("obrs", f"asynchronous, budget {budget}, OBRS", ACTORS, (asynchronous,)),
        Contestant("bare", f"asynchronous, budget {budget}, uncorrected", ACTORS, (asynchronous, *UNCORRECTED)),
    )
    return {one.key: one for one in found}


def apart(budget: str) -> dict[str, Contestant]:
    """Croupier's three as if actor and learner had a machine each: both sleep so much that the cores are not short."""
    slow = (f"actor.slowdown={SLOWDOWN}", f"learner.slowdown={SLOWDOWN}", "learner.checkpoint_every=0")
    setting = Setting(f"1 actor, both sides slowed {SLOWDOWN} ×", ("actor.count=1", *slow))
    return {key: replace(one, settings=(setting,)) for key, one in contestants(budget).items() if key != TRL}


def shared(seed: int, steps: int, model: str) -> tuple[str, ...]:
    """Overrides of the quick start that all of croupier's contestants take."""
    return (
        f"run.seed={seed}",
        f"run.steps={steps}",
        f"model.path={model}",
        "advantage.deviation=sample",
        "evaluation.prompts=0",  # saved versions are judged off the clock
        f"learner.checkpoint_every={SAVE_EVERY}",
        "learner.checkpoint_keep=100000",
    )


def croupier_config(one: Contestant, setting: Setting, seed: int, steps: int, model: str) -> RunConfig:
    """The run of ``one``, without its name, directory and address."""
    return load(CONFIG, [*shared(seed, steps, model), *one.overrides, *setting.overrides])


def trl_job(setting: Setting, seed: int, steps: int, model: str, questions: str, out: str) -> Job:
    """The same run for TRL's script: every number is read from croupier's configuration."""
    config = load(CONFIG, list(shared(seed, steps, model)))
    optim, rollout, loss = config.optim, config.rollout, config.loss
    return Job(
        model=model,
        questions=questions,
        out=out,
        seed=seed,
        steps=steps,
        save_every=SAVE_EVERY,
        prompts=rollout.groups_per_step,
        siblings=rollout.group_size,
        max_tokens=rollout.max_tokens,
        temperature=rollout.temperature,
        lr=optim.lr,
        min_lr_ratio=optim.min_lr_ratio,
        beta1=optim.beta1,
        beta2=optim.beta2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        router_aux_loss_coef=loss.balance / config.warmstart.experts_per_token,
        threads=setting.threads,
        experts=setting.experts,
    )


def judge_config(seed: int) -> RunConfig:
    """How saved versions of anybody are judged."""
    return load(CONFIG, [f"run.seed={seed}", f"evaluation.prompts={HELD_OUT}", f"evaluation.samples={ANSWERS}"])
