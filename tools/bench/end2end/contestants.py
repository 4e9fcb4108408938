"""Who is compared: four ways to train the quick start's task, each with settings to choose from.

All of them see the same questions in the same order, the same verifier, model, temperature, rate
and its decay, AdamW, gradient clip, clip range and balance loss, and make the same number of steps
of 32 × 8 completions. Advantages divide by the sample's deviation everywhere, as TRL does it.
"""

from dataclasses import dataclass, replace

from common.config import RunConfig, load
from tools.bench.end2end.trl_grpo import Job
from tools.bench.loop import COMPLETION, GROUPS, PROMPT, SIBLINGS

CONFIG = "configs/quickstart.yaml"
SAVE_EVERY = 25  # steps between two versions that are judged
HELD_OUT, ANSWERS = 512, 4  # questions, and answers to each: one standard error is about .01
SYNCHRONOUS, TRL = "sync", "trl"
MAIN, APART, LARGER = "main", "apart", "larger"  # arenas
SLOWDOWN = 4  # of decoding and of training, where each is to have a machine of its own: three quarters are sleep
LARGER_SHAPE = (  # that of tools.bench loop
    "task.name=fixed", f"task.params={{prompt_tokens: {PROMPT}}}", "rollout.ignore_eos=true",
    f"rollout.groups_per_step={GROUPS}", f"rollout.group_size={SIBLINGS}", f"rollout.max_prompt_tokens={PROMPT}",
    f"rollout.max_tokens={COMPLETION}", "learner.checkpoint_every=0",
)  # fmt: skip
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
    overrides: tuple[str, ...] = ()  # beside those that all share


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


@dataclass(frozen=True)
class Arena:
    """Where contestants meet: a task and its model, and how many steps they make."""

    name: str
    steps: int
    try_steps: int  # of the runs that settings are chosen by
    contestants: dict[str, Contestant]

    def kind(self, key: str) -> str:
        """Name of a contestant's runs, whatever their seed."""
        return key if self.name == MAIN else f"{self.name}-{key}"

    def directory(self, key: str, seed: int) -> str:
        """Name of a contestant's run."""
        return f"{self.kind(key)}-{seed}"


def arenas(budget: str, steps: int, with_trl: bool) -> dict[str, Arena]:
    """The quick start, the same with a machine for each side, and a larger shape, both for their speed alone.

    Where each side has a machine, actor and learner sleep so much that the cores are not short.
    """
    four = {key: one for key, one in contestants(budget).items() if with_trl or key != TRL}
    slow = (f"actor.slowdown={SLOWDOWN}", f"learner.slowdown={SLOWDOWN}", "learner.checkpoint_every=0")
    asleep = (Setting(f"1 actor, both sides slowed {SLOWDOWN} ×", ("actor.count=1", *slow)),)
    apart = {key: replace(one, settings=asleep) for key, one in four.items() if key != TRL}
    larger = {key: replace(one, overrides=(*LARGER_SHAPE, *one.overrides)) for key, one in four.items()}
    found = (Arena(MAIN, steps, 40, four), Arena(APART, 100, 0, apart), Arena(LARGER, 24, 6, larger))
    return {arena.name: arena for arena in found}


def shared(seed: int, steps: int, model: str) -> tuple[str, ...]:
    """Overrides of the quick start that all contestants take."""
    return (
        f"run.seed={seed}",
        f"run.steps={steps}",
        f"model.path={model}",
        "advantage.deviation=sample",
        "evaluation.prompts=0",  # saved versions are judged off the clock
        f"learner.checkpoint_every={SAVE_EVERY}",
        "learner.checkpoint_keep=100000",
    )


def overrides_of(one: Contestant, setting: Setting, seed: int, steps: int, model: str) -> list[str]:
    """All that decides the run of ``one`` beside the quick start's file."""
    return [*shared(seed, steps, model), *one.overrides, *setting.overrides]


def run_config(one: Contestant, setting: Setting, seed: int, steps: int, model: str) -> RunConfig:
    """The run of ``one``, without its name, directory and address; TRL's job is read from it too."""
    return load(CONFIG, overrides_of(one, setting, seed, steps, model))


def trl_job(config: RunConfig, setting: Setting, questions: str, out: str) -> Job:
    """The same run for TRL's script: every number is read from croupier's configuration."""
    optim, rollout, loss = config.optim, config.rollout, config.loss
    return Job(
        model=config.model.path,
        questions=questions,
        out=out,
        seed=config.run.seed,
        steps=config.run.steps,
        save_every=config.learner.checkpoint_every,
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
        router_aux_loss_coef=loss.balance / config.warmstart.experts_per_token,  # two in both shapes
        threads=setting.threads,
        experts=setting.experts,
        ignore_eos=rollout.ignore_eos,
    )


def judge_config(seed: int) -> RunConfig:
    """How saved versions of anybody are judged."""
    return load(CONFIG, [f"run.seed={seed}", f"evaluation.prompts={HELD_OUT}", f"evaluation.samples={ANSWERS}"])
