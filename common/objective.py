"""What a run optimises: how advantages are taken, which loss is minimised, and what goes with what.

``ALGORITHMS`` names the field's recipes, so that one line of YAML chooses one: ``algorithm: dapo``.
A recipe is nothing but values for keys of the sections ``advantage``, ``loss``, ``obrs`` and
``optim``; a file or an override that sets one of them itself wins. The rules of stacking are those
of algorithms.md 9; docs/algorithms.md shows them as a table.
"""

from dataclasses import dataclass
from typing import Any, Literal

from common.errors import ConfigError


def require(condition: bool, key: str, value: object, rule: str) -> None:
    """Raise :class:`ConfigError` naming key, value and rule unless ``condition``."""
    if not condition:
        raise ConfigError(f"{key}={value!r}: {rule}")


AdvantageKind = Literal[
    "grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "batch_mean", "scalerl", "none"
]
LossKind = Literal["ppo", "gspo", "cispo", "reinforce", "double_sided", "m2po", "dppo_tv"]
Anchor = Literal["behaviour", "broker", "proximal", "none"]
Correction = Literal["none", "uncorrected", "icepop", "mask_sequence", "mask_geometric", "cap_sequence", "k2", "k3"]
Aggregate = Literal["token_mean", "sequence_mean", "constant", "prompt_mean"]
BlockBaseline = Literal["off", "none", "batch", "group", "ocb"]

GROUP_BASELINES = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "scalerl")  # equal rewards teach nothing
OF_BEHAVIOUR = ("double_sided", "m2po", "dppo_tv")  # their ratio is that of the trained policy to the behaviour
BY_SEQUENCE = ("mask_sequence", "mask_geometric", "cap_sequence", "k2", "k3")


@dataclass(frozen=True)
class AdvantageSection:
    """Advantages from whole groups, before any rejection (algorithms.md 2 and 4)."""

    kind: AdvantageKind = "grpo"
    deviation: Literal["population", "sample"] = "population"  # papers write the first, verl computes the second
    epsilon: float = 1e-6  # added to a standard deviation
    zero_signal: Literal["keep", "mask", "resample"] = "keep"  # groups of equal rewards; resample: DAPO's
    skip_passed: float = 0.0  # a question passed in this share of its attempts is not asked again (ScaleRL); 0: off
    overlong_buffer: int = 0  # tokens before the limit over which the reward falls by 1 (DAPO); 0: off
    overlong_filter: bool = False  # truncated trajectories keep their reward in the group and leave the loss
    blocks: BlockBaseline = "off"  # advantages of blocks; the baseline of a block's reward (ocb: by outcome)
    leave_one_out: bool = True  # of a block's baseline
    shrinkage: float = 0.0  # of ocb towards the group's mean: alpha of algorithms.md 2.2
    block_weights: tuple[float, ...] = ()  # of each block's loss; those not named weigh 1

    @property
    def chooses(self) -> bool:
        """Whether a trajectory's outcome decides if it is trained."""
        return self.zero_signal != "keep" or self.overlong_filter

    def __post_init__(self) -> None:
        """Validate."""
        require(
            0 <= self.skip_passed <= 1,
            "advantage.skip_passed",
            self.skip_passed,
            "is a share of the attempts at a question: must lie in [0, 1], and 0 skips none",
        )
        require(self.overlong_buffer >= 0, "advantage.overlong_buffer", self.overlong_buffer, "must not be negative")
        require(self.shrinkage >= 0, "advantage.shrinkage", self.shrinkage, "must not be negative")
        require(
            self.shrinkage == 0 or self.blocks == "ocb",
            "advantage.shrinkage",
            self.shrinkage,
            "shrinks the outcome-conditioned baseline; set advantage.blocks=ocb or 0",
        )
        require(
            all(weight >= 0 for weight in self.block_weights),
            "advantage.block_weights",
            self.block_weights,
            "must not be negative",
        )


@dataclass(frozen=True)
class LossSection:
    """The policy loss (algorithms.md 1.4, 3, 5 and 6) and what is added to it."""

    kind: LossKind = "ppo"
    anchor: Anchor = "behaviour"  # the policy that the ratio and its clip start from; none: no clip
    clip_low: float = 0.2
    clip_high: float = 0.2
    weight_cap: float | None = None  # C of truncated importance sampling, the paper's c1; none is exact
    target: Literal["anchor", "policy"] = "anchor"  # p_tgt of Jackpot's weight: p_ref, or the trained policy
    anchor_cap: float | None = None  # the paper's c2: cap of p_ref / p_new where the target is the policy
    ratio_cap: float | None = None  # CISPO's absolute cap (eps_max); 1 + clip_high where none
    correction: Correction = "none"  # of anchor against behaviour, beside the weight; uncorrected: not even that
    correction_low: float = 0.5  # bounds of the ratio, of its product or of its geometric mean
    correction_high: float = 2.0  # ... and what cap_sequence, k2 and k3 may not exceed
    veto: float = 0.0  # a sequence with a token whose ratio of anchor to behaviour is less leaves the loss
    opsm: float | None = None  # a sequence with negative advantage this far from its behaviour, a token, leaves it
    m2_threshold: float = 0.04  # M2PO: mean squared log-ratio that harmful tokens may have
    tv_threshold: float = 0.2  # DPPO: change of a probability beyond which a token leaves the loss
    ratio_penalty: float = 0.0  # of the squared log-ratio to the behaviour (DPPO: 1e-3)
    entropy: float = 0.0  # bonus for the entropy of the policy, full vocabulary
    kl: float = 0.0  # penalty for the divergence from the reference model
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # k1 goes into the advantage: as a loss it has no gradient
    distill: float = 0.0  # of log teacher - log policy in the advantage (algorithms.md 3.6)
    distill_clip: float = 10.0  # bound of that difference
    exemplar_shape: float = 0.1  # gamma of pi / (pi + gamma), the weight of exemplars' tokens (2504.14945)
    aggregate: Aggregate = "token_mean"  # the loss's denominator (algorithms.md 0.3)
    balance: float = 0.01  # coefficient of the load-balancing loss
    router_z: float = 0.0  # coefficient of the router's z-loss
    expert_bias_rate: float = 0.0  # balances experts without a loss: their bias moves so much a step; 0: no bias

    def __post_init__(self) -> None:
        """Validate ranges, then what cannot stand together within the loss."""
        require(0 <= self.clip_low <= 1, "loss.clip_low", self.clip_low, "must lie in [0, 1]; 1 has no lower bound")
        require(self.clip_high >= 0, "loss.clip_high", self.clip_high, "must not be negative")
        for name in ("weight_cap", "anchor_cap", "ratio_cap", "opsm"):
            value = getattr(self, name)
            require(value is None or value > 0, f"loss.{name}", value, "must be positive or null")
        for name in ("balance", "entropy", "kl", "distill", "ratio_penalty", "veto", "m2_threshold", "tv_threshold"):
            require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "must not be negative")
        require(self.exemplar_shape > 0, "loss.exemplar_shape", self.exemplar_shape, "must be positive")
        require(self.distill_clip > 0, "loss.distill_clip", self.distill_clip, "must be positive")
        require(
            0 <= self.correction_low <= self.correction_high or self.correction in ("cap_sequence", "k2", "k3"),
            "loss.correction_low",
            self.correction_low,
            f"must lie between 0 and loss.correction_high={self.correction_high}",
        )
        self._check_anchor()
        self._check_sequences()

    def _check_anchor(self) -> None:
        """One correction for each gap between two policies (algorithms.md 9, rules 1, 3 and 5)."""
        require(
            self.kind not in OF_BEHAVIOUR or self.anchor == "behaviour",
            "loss.anchor",
            self.anchor,
            f"loss.kind={self.kind} takes the ratio to the behaviour policy itself: a second one would correct the "
            "same gap twice (algorithms.md 9); set it to behaviour",
        )
        require(
            self.kind != "reinforce" or self.anchor == "none",
            "loss.anchor",
            self.anchor,
            "loss.kind=reinforce has one weight from behaviour to policy and no ratio to clip; set it to none",
        )
        require(
            self.anchor != "none" or self.kind in ("reinforce", "ppo"),
            "loss.anchor",
            self.anchor,
            f"loss.kind={self.kind} is a function of the ratio to an anchor; set it to behaviour, broker or proximal",
        )
        require(
            self.correction == "none" or self.anchor in ("proximal", "broker"),
            "loss.correction",
            self.correction,
            f"compares the anchor with the behaviour policy, and loss.anchor={self.anchor} leaves nothing between "
            "them to correct; set loss.anchor=proximal or loss.correction=none",
        )
        require(
            self.veto == 0 or self.anchor == "proximal",
            "loss.veto",
            self.veto,
            f"compares the proximal policy with the behaviour policy; set loss.anchor=proximal, not {self.anchor}",
        )
        require(
            self.target == "anchor" or (self.kind == "ppo" and self.anchor != "none"),
            "loss.target",
            self.target,
            "Jackpot's weight is of loss.kind=ppo with an anchor; set it to anchor",
        )
        require(
            self.anchor_cap is None or self.target == "policy",
            "loss.anchor_cap",
            self.anchor_cap,
            "caps p_ref / p_new, which is 1 unless loss.target=policy; set that, or null here",
        )
        require(
            self.ratio_cap is None or self.kind == "cispo",
            "loss.ratio_cap",
            self.ratio_cap,
            f"is CISPO's absolute cap; loss.kind={self.kind} takes loss.clip_high",
        )
        in_advantage = [f"loss.distill={self.distill}"] * (self.distill > 0) + ["loss.kl_estimator=k1"] * (
            self.kl > 0 and self.kl_estimator == "k1"
        )
        require(
            not in_advantage or (self.kind != "m2po" and self.opsm is None),
            "loss.kind" if self.kind == "m2po" else "loss.opsm",
            self.kind if self.kind == "m2po" else self.opsm,
            f"decides by the sign of the advantage before {', '.join(in_advantage)} is in it; take one of them",
        )
        require(
            self.target == "anchor" or self.correction in ("none", "icepop"),
            "loss.correction",
            self.correction,
            "loss.target=policy goes all the way to the trained policy in one weight: a sequence's correction would be "
            "a second one for the same gap (algorithms.md 9); set it to none",
        )
        require(
            self.kind != "m2po" or self.weight_cap is None,
            "loss.weight_cap",
            self.weight_cap,
            "M2PO's mask is its trust region: one is enough (algorithms.md 9, rule 5); set it to null",
        )

    def _check_sequences(self) -> None:
        """What is decided by whole sequences needs every token's ratio, accepted or not."""
        require(
            self.kind != "gspo" or self.aggregate == "sequence_mean",
            "loss.aggregate",
            self.aggregate,
            "GSPO's ratio is a sequence's, so its loss is a mean over sequences (algorithms.md 5.1); set sequence_mean",
        )
        whole = self.kind == "gspo" or self.correction in BY_SEQUENCE
        require(
            not whole or self.anchor != "broker",
            "loss.anchor",
            self.anchor,
            "the broker's densities travel for accepted tokens alone, and a sequence's ratio needs them all; set it to "
            "behaviour or proximal",
        )


def check_stacking(
    obrs_mode: str, z_weight: str, advantage: AdvantageSection, loss: LossSection, group_size: int, max_sampled: int
) -> None:
    """Raise :class:`ConfigError` for sections that are each sound and cannot stand together (algorithms.md 9)."""
    require(
        not (obrs_mode == "off" and loss.anchor == "broker"),
        "loss.anchor",
        loss.anchor,
        "the broker's version is scored only with rejection on; set obrs.mode=threshold or loss.anchor=behaviour",
    )
    require(
        z_weight != "batch" or (loss.aggregate == "token_mean" and advantage.blocks == "off"),
        "obrs.z_weight",
        z_weight,
        "divides by the accepted tokens, which only loss.aggregate=token_mean without advantage.blocks may: a mean "
        "over a sequence's accepted tokens would blow up those that lost most (algorithms.md 1.8)",
    )
    require(
        not (loss.correction == "uncorrected" and obrs_mode != "off"),
        "loss.correction",
        loss.correction,
        "ignores what a token was sampled from, and so what rejection did to it; set obrs.mode=off",
    )
    require(
        advantage.blocks == "off" or loss.aggregate == "token_mean",
        "loss.aggregate",
        loss.aggregate,
        "advantage.blocks makes each block a mean over its own tokens; leave it at token_mean",
    )
    require(
        advantage.blocks == "off" or loss.kind != "gspo",
        "loss.kind",
        loss.kind,
        "decides for a whole sequence, and advantage.blocks for each of its blocks; take another",
    )
    require(
        advantage.blocks == "off" or advantage.zero_signal == "keep",
        "advantage.zero_signal",
        advantage.zero_signal,
        "looks at the whole trajectory's reward, and advantage.blocks trains on those of its blocks; set it to keep",
    )
    require(
        advantage.blocks == "off" or not advantage.overlong_buffer,
        "advantage.overlong_buffer",
        advantage.overlong_buffer,
        "is added to the whole trajectory's reward, and advantage.blocks trains on those of its blocks; set it to 0",
    )
    require(
        z_weight == "none" or obrs_mode != "off",
        "obrs.z_weight",
        z_weight,
        "is the acceptance that rejection has in a context, and obrs.mode=off rejects nothing; set it to none",
    )
    require(
        advantage.zero_signal == "keep" or advantage.kind in GROUP_BASELINES,
        "advantage.zero_signal",
        advantage.zero_signal,
        f"equal rewards do teach with advantage.kind={advantage.kind}, whose baseline is not the group's; set it to "
        "keep",
    )
    require(
        group_size > 1 or advantage.kind not in GROUP_BASELINES or loss.distill > 0 or advantage.blocks != "off",
        "rollout.group_size",
        group_size,
        f"advantage.kind={advantage.kind} compares the siblings of a group, and one alone has an advantage of 0; "
        "set advantage.kind=batch_mean or reinforce_pp",
    )
    require(
        advantage.overlong_buffer <= max_sampled,
        "advantage.overlong_buffer",
        advantage.overlong_buffer,
        f"is longer than the {max_sampled} tokens that a trajectory may have (rollout.max_tokens x max_turns)",
    )


# name -> values of keys; what a file sets itself wins. Sources: docs/algorithms.md.
ALGORITHMS: dict[str, dict[str, dict[str, Any]]] = {
    "grpo": {"advantage": {"kind": "grpo"}, "loss": {"aggregate": "sequence_mean"}},
    "dr_grpo": {"advantage": {"kind": "dr_grpo"}, "loss": {"aggregate": "constant"}},
    "rloo": {"advantage": {"kind": "rloo"}},
    "dapo": {
        "advantage": {"kind": "grpo", "epsilon": 0.0, "zero_signal": "resample"},
        "loss": {"clip_low": 0.2, "clip_high": 0.28, "aggregate": "token_mean"},
    },
    "reinforce_pp": {"advantage": {"kind": "reinforce_pp"}},
    "gspo": {
        "advantage": {"kind": "grpo"},
        "loss": {"kind": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "sequence_mean"},
    },
    "cispo": {"loss": {"kind": "cispo", "clip_low": 1.0, "clip_high": 4.0}},
    "tis": {"obrs": {"mode": "off"}, "loss": {"kind": "reinforce", "anchor": "none", "weight_cap": 2.0}},
    "pipelinerl": {"obrs": {"mode": "off"}, "loss": {"kind": "reinforce", "anchor": "none", "weight_cap": 5.0}},
    "icepop": {
        "obrs": {"mode": "off"},
        "loss": {"anchor": "proximal", "correction": "icepop", "correction_low": 0.5, "correction_high": 5.0},
    },
    "mis": {
        "obrs": {"mode": "off"},
        "loss": {"anchor": "proximal", "correction": "mask_sequence", "correction_low": 0.0, "correction_high": 3.0},
    },
    "decoupled_ppo": {"obrs": {"mode": "off"}, "loss": {"anchor": "proximal"}},
    "glm5_reasoning": {
        "obrs": {"mode": "off"},
        "advantage": {"kind": "grpo"},
        "loss": {
            "anchor": "proximal", "correction": "icepop", "correction_low": 0.5, "correction_high": 2.0,
            "clip_low": 0.2, "clip_high": 0.28, "aggregate": "sequence_mean",
        },
    },
    "glm5_agentic": {
        "obrs": {"mode": "off"},
        "advantage": {"kind": "dr_grpo"},
        "loss": {"kind": "double_sided", "clip_low": 0.2, "clip_high": 0.28},
    },
    "m2po": {"obrs": {"mode": "off"}, "loss": {"kind": "m2po", "m2_threshold": 0.04}},
    "dppo_tv": {"obrs": {"mode": "off"}, "loss": {"kind": "dppo_tv", "tv_threshold": 0.2, "ratio_penalty": 1e-3}},
    "opsm": {"loss": {"opsm": 0.1}},
    "scalerl": {
        "obrs": {"mode": "off"},
        "advantage": {"kind": "scalerl", "zero_signal": "mask"},
        "loss": {"kind": "cispo", "clip_low": 1.0, "ratio_cap": 5.0, "aggregate": "prompt_mean"},
    },
    "jackpot": {"obrs": {"mode": "threshold", "threshold": 1.0}, "loss": {"anchor": "behaviour"}},
    "jackpot_paper": {
        "obrs": {"mode": "threshold", "threshold": 1.0, "z_weight": "context", "z_kappa": True},
        "loss": {"anchor": "proximal", "target": "policy", "weight_cap": 2.0, "anchor_cap": 2.0},
    },
    "blockwise": {"advantage": {"blocks": "ocb", "leave_one_out": False}},
}  # fmt: skip
