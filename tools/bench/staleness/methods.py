"""The methods that are compared and the ways in which their data are old."""

from dataclasses import dataclass
from typing import Literal

from common.objective import LossSection

CAP = 2.0  # of truncated importance sampling, and the paper's c1


@dataclass(frozen=True)
class Method:
    """A loss, and what is done to the batch before it."""

    title: str
    loss: LossSection
    coins: bool = False  # optimal budgeted rejection at lambda 1, against the policy that trains
    z_weight: bool = False  # the acceptance of each context, exact over the whole vocabulary, in the weight


@dataclass(frozen=True)
class Regime:
    """Where the data come from."""

    title: str
    lag: int = 0  # versions behind, always
    batch: int = 1  # updates that one large batch is cut into
    actor: Literal["policy", "small"] = "policy"


METHODS = {
    "none": Method("no correction", LossSection(kind="ppo", anchor="proximal", correction="uncorrected")),
    "tis": Method("TIS, C = 2", LossSection(kind="reinforce", anchor="none", weight_cap=CAP)),
    "icepop": Method(
        "IcePop, .5 to 5",
        LossSection(anchor="proximal", correction="icepop", correction_low=0.5, correction_high=5.0),
    ),
    "ppo": Method("PPO clip at the behaviour", LossSection(anchor="behaviour")),
    "m2po": Method("M2PO, .04", LossSection(kind="m2po")),
    "double_sided": Method("double-sided, .2 / .28", LossSection(kind="double_sided", clip_high=0.28)),
    "obrs": Method("OBRS, coin only", LossSection(kind="reinforce", anchor="none"), coins=True),
    "z_tis": Method("Z x TIS, no coin", LossSection(kind="reinforce", anchor="none", weight_cap=CAP), z_weight=True),
    "jackpot": Method(
        "Jackpot as in the paper",
        LossSection(anchor="proximal", target="policy", weight_cap=CAP, anchor_cap=CAP),
        coins=True,
        z_weight=True,
    ),
    "obrs_clip": Method("OBRS + clip at the behaviour", LossSection(anchor="behaviour"), coins=True),
}
REGIMES = {
    "lag0": Regime("lag 0"),
    "lag4": Regime("lag 4", lag=4),
    "lag16": Regime("lag 16", lag=16),
    "lag64": Regime("lag 64", lag=64),
    "batch64": Regime("one batch for 64 updates", batch=64),
    "actor": Regime("another, frozen model samples", actor="small"),
}
RATES = (1.5e-4, 3e-4, 6e-4)
