"""A step, a score and a joint step on a device that computes nothing: ``python fakegpu.py``, in a process of its own.

Shapes and devices alone are worked out (torch's FakeTensorMode over a backend in Python that says it is a
GPU), so a tensor that was left on the host is an error here, and so is, while a step runs forward and
backward, whatever would have the host wait for a GPU: a look at a number, or a shape that follows from one.
"""

from typing import get_args, get_type_hints

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from common.config import OptimSection, RunConfig
from common.joint import JointSection
from common.objective import LossSection
from learner import step
from learner.joint import trainer
from learner.logprobs import Head, score_tokens
from learner.mesh import single
from learner.model import experts, packing
from learner.model.config import ModelConfig
from learner.model.decoder import Decoder
from learner.model.experts import ExpertSettings
from learner.optim import Optimizer

SHAPE = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128,
    "mlp_only_layers": (1,), "expert_bias": True,
}  # fmt: skip
CUTS = np.array([0, 100, 250, 300], np.int32)
N = int(CUTS[-1])
NAME = "fakegpu"


class Backend(_DummyBackendModule):
    """What activation checkpointing asks of one."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Numbers:
    """What torch is asked when the host wants a number of a device: invented, unless it must not ask."""

    def __init__(self) -> None:
        self.may_look = True

    def __call__(self, invented):
        def look(tensor, *_):
            if not self.may_look and tensor.device.type == NAME:
                raise AssertionError("the host would wait for the device")
            return invented(tensor)

        return look

    def phase(self, name: str) -> None:
        """As :func:`learner.step.train_step` tells it."""
        self.may_look = name not in ("forward", "backward")


def zeros(tensor):
    kind = np.float64 if tensor.dtype.is_floating_point else np.int64
    return np.zeros(tuple(tensor.shape), kind).tolist()


def pretend(numbers: Numbers) -> None:
    """Numbers are invented; the device takes the ways of a GPU."""
    _setup_privateuseone_for_python_backend(NAME, Backend())
    inventions = {
        "tolist": zeros, "item": lambda _: 0.5, "__float__": lambda _: 0.5, "__int__": lambda _: 1,
        "__bool__": lambda _: True, "cpu": lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu"),
    }  # fmt: skip
    for name, invented in inventions.items():
        setattr(torch.Tensor, name, numbers(invented))
    FakeTensor.tolist = torch.Tensor.tolist  # it has its own
    torch.Tensor.is_cuda = property(lambda tensor: tensor.device.type == NAME)
    experts.spoils_idle = lambda _: True
    make, move = torch.tensor, torch.Tensor.to

    def made(data, *, device=None, **how):
        assert numbers.may_look or torch.device(device or "cpu").type != NAME, "the host would wait for its copy"
        on_host = make(data, **how)
        there = torch.device(device or "cpu").type == NAME
        return torch.zeros(on_host.shape, dtype=on_host.dtype, device=device) if there else on_host

    def moved(tensor, *where, **how):
        there = move(tensor, *where, **how)
        assert numbers.may_look or there.device == tensor.device, "the host would wait for its copy"
        return there

    torch.tensor, torch.Tensor.to = made, moved

    def brought(array, device):  # which waits for nobody
        return torch.zeros(array.shape, dtype=torch.from_numpy(array).dtype, device=device)

    for module in (step, trainer, packing):
        module.to_device = brought


def roles():
    """All tokens are sampled but the first of each sequence."""
    found = np.ones(N, np.uint8)
    found[CUTS[:-1]] = 0
    return found


def model_of(device, dtype, *, recompute=False, grouped=True, **changes) -> Decoder:
    torch.set_default_dtype(dtype)
    with device:
        model = Decoder(ModelConfig(**{**SHAPE, **changes}), single(device), recompute=recompute)
    torch.set_default_dtype(torch.float32)
    model.prepare(compiled=False)
    model.use_experts(ExpertSettings(grouped=grouped))
    return model


def batch_of(device) -> step.StepBatch:
    def of(dtype):
        return torch.zeros(N, dtype=dtype, device=device)

    floats = {
        name: of(torch.float32)
        for name in ("advantages", "weights", "log_q", "log_m", "log_p_v", "log_reference", "log_teacher")
    }
    return step.StepBatch(
        token_ids=of(torch.int64), cu_seqlens=CUTS, trainable=roles(), accept=of(torch.uint8),
        tokens_global=N, experts=torch.zeros((N, 2, 4), dtype=torch.int16, device=device), **floats,
    )  # fmt: skip


def train(device, numbers: Numbers, loss: LossSection, dtype=torch.bfloat16, **how) -> None:
    """A whole step, in which grouped experts let nobody look at the device between first forward and last backward."""
    model = model_of(device, dtype, **how)
    phase = numbers.phase if how.get("grouped", True) else lambda _: None
    optimizer, batch = Optimizer(model, OptimSection(), 10), batch_of(device)
    settings = step.StepSettings(loss, 0.9, 200, 1.0)
    _, fractions = step.train_step(model, optimizer, batch, model.uniform_expert_fraction(), settings, phase)
    assert fractions.device == device


def score(device, dtype) -> None:
    model = model_of(device, dtype, grouped=dtype is torch.bfloat16)
    ids = torch.zeros(N, dtype=torch.int64, device=device)
    asked = torch.zeros((N, 5), dtype=torch.int64, device=device)
    with torch.no_grad():
        scores = score_tokens(model.hidden(ids, CUTS), Head(model.head, 0.9, 1.0), ids, asked, top=20)
    assert {tensor.device for tensor in vars(scores).values()} == {device}


def joint(device) -> None:
    """A step of the rollout model towards the policy."""
    config = RunConfig(joint=JointSection(path="rollout"))
    its = trainer.RolloutTrainer(config, model_of(device, torch.bfloat16))
    its.step(model_of(device, torch.bfloat16, hidden_size=512), batch_of(device))


def every_loss() -> list[LossSection]:
    """Each ratio family, each correction, and all that is added to a loss."""
    hints = get_type_hints(LossSection)
    found = []
    for kind in set(get_args(hints["kind"])) - {"m2po"}:  # whose bound is searched for by looking
        anchor = "none" if kind == "reinforce" else "behaviour"
        found.append(LossSection(kind=kind, anchor=anchor, aggregate="sequence_mean"))
    for correction in get_args(hints["correction"]):
        found.append(LossSection(correction=correction, anchor="proximal", correction_high=2.0))
    return [
        *found,
        LossSection(kl=0.1, kl_estimator="k3", distill=0.5, entropy=0.01, ratio_penalty=0.1),
        LossSection(kl=0.1, kl_estimator="k1"),
        LossSection(kl=0.1, kl_estimator="k2", opsm=0.1),
        LossSection(anchor="proximal", veto=0.01),
        LossSection(anchor="broker", target="policy", anchor_cap=2.0, router_z=0.001, expert_bias_rate=0.001),
    ]


def main() -> None:
    numbers = Numbers()
    pretend(numbers)
    device = torch.device(NAME, 0)
    losses = every_loss()
    with FakeTensorMode():
        for loss in losses:
            train(device, numbers, loss)
        train(device, numbers, LossSection(), recompute=True)
        train(device, numbers, LossSection(), torch.float32, grouped=False)  # each expert in turn: looks where it ends
        for dtype in (torch.bfloat16, torch.float32):
            score(device, dtype)
        dense = {"num_experts": 0, "num_experts_per_tok": 0, "expert_bias": False, "tie_word_embeddings": True}
        train(device, numbers, LossSection(), **dense)
        joint(device)
    print(f"{len(losses)} losses")


if __name__ == "__main__":
    main()
