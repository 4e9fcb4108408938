"""The learner process, top to bottom.

::

    shard = feed.fetch(step)            the broker's accepted tokens, this rank's share
    metrics = train_step(batch)         forward, loss, backward, all-reduce, AdamW
    feed.commit(step)                   the broker may forget the step once it is checkpointed
    publisher.publish(step + 1)         rank 0: new weights to the fleet, in flight
    checkpoint                          every learner.checkpoint_every steps, and at the end
"""

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import wire
from common.config import RunConfig
from common.errors import CheckpointError, ConfigError
from common.link import BrokerLink, connect
from common.process import StopFlag
from learner import checkpoint
from learner.device import pick_device
from learner.feed import Feed
from learner.hf import hf_tensors, load_hf, save_hf
from learner.model.config import ModelConfig
from learner.model.decoder import Decoder
from learner.optim import Optimizer
from learner.parallel.data import DataParallel
from learner.step import StepBatch, StepSettings, train_step
from learner.weights.publish import WeightPublisher

FAREWELL_S = 60.0  # how long the learner stays for late joiners after its last step

log = logging.getLogger("learner")


@dataclass
class Learner:
    """What a rank holds; :meth:`run` trains to the last step."""

    config: RunConfig
    stop: StopFlag
    parallel: DataParallel
    device: torch.device
    model: Decoder
    optimizer: Optimizer
    link: BrokerLink
    expert_fraction: torch.Tensor  # [L, E] of the last step
    step: int = 0  # the next to train; the weights are version ``step``
    published: int = 0  # newest version that the fleet was sent
    resync: str = ""  # why somebody asked to be sent it again
    publish_seconds: float = 0.0

    def run(self) -> None:
        """Train every step, then stay until the broker says Stop."""
        config = self.config
        feed = Feed(self.link, self.parallel.rank, self.parallel.world, config.learner.wait_s, self._stopping)
        publisher = self._publisher() if self.parallel.rank == 0 else None
        if publisher is not None and self.step > self.published:
            self._publish(publisher, self.step)
        other = self._other(publisher)
        while self.step < config.run.steps and not self._stopping():
            began = time.perf_counter()
            shard = feed.fetch(self.step, other)
            if shard is None:
                break
            fetched = time.perf_counter()
            metrics, self.expert_fraction = train_step(
                self.model, self.optimizer, to_batch(shard, self.device), self.expert_fraction,
                settings_of(config), self.parallel,
            )  # fmt: skip
            metrics |= {"seconds_fetch": fetched - began, "seconds_train": time.perf_counter() - fetched}
            self.step += 1
            if publisher is not None:
                feed.commit(self.step - 1, metrics | {"seconds_publish": self.publish_seconds})
                if self.step > self.published:
                    self._publish(publisher, self.step)
            if self._checkpoint_due():
                self._checkpoint(feed)
        self._farewell(feed, other)

    # ---- weights --------------------------------------------------------------------------------

    def _publisher(self) -> WeightPublisher:
        weights = self.config.weights
        return WeightPublisher(
            self.link.send, self.link.receive, weights.host, weights.bucket_mb, weights.deadline_s, self.device,
            weight_backend(self.config, self.device),
        )  # fmt: skip

    def _publish(self, publisher: WeightPublisher, version: int) -> None:
        self.resync = ""  # whoever asked gets it now
        self.link.set_version(version)
        self.publish_seconds = publisher.publish(version, hf_tensors(self.model), self._note, self._stopping)
        self.published = max(self.published, version)

    def _note(self, message: Any) -> None:
        match message:
            case wire.Stop():
                self.stop.set(f"the broker said stop: {message.reason}")
            case wire.Resync():
                self.resync = message.reason

    def _other(self, publisher: WeightPublisher | None) -> Callable[[Any], None]:
        def handle(message: Any) -> None:
            self._note(message)
            if self.resync and publisher is not None and self.step >= self.published:
                log.info("sending version %d again: %s", self.step, self.resync)
                self._publish(publisher, self.step)

        return handle

    def _stopping(self) -> bool:
        return self.stop.is_set

    # ---- checkpoints ----------------------------------------------------------------------------

    def _checkpoint_due(self) -> bool:
        every = self.config.learner.checkpoint_every
        return self.step == self.config.run.steps or (every > 0 and self.step % every == 0)

    def _checkpoint(self, feed: Feed) -> None:
        if self.parallel.rank == 0:
            directory = self.config.run.path / "checkpoints"
            checkpoint.save(
                directory, self.model, self.optimizer, step=self.step, version=self.step, run_id=self.link.run_id,
                expert_fraction=self.expert_fraction, keep=self.config.learner.checkpoint_keep,
            )  # fmt: skip
            feed.checkpointed(self.step - 1)
            if self.step == self.config.run.steps:
                save_hf(self.model, self.config.model.path, self.config.run.path / "model")
        self.parallel.barrier()

    def _farewell(self, feed: Feed, other: Callable[[Any], None]) -> None:
        deadline = time.monotonic() + FAREWELL_S
        while not self._stopping() and not feed.stopped and time.monotonic() < deadline:
            message = self.link.receive(0.2)
            if message is not None:
                other(message)


def settings_of(config: RunConfig) -> StepSettings:
    """The step's settings out of the run's configuration."""
    loss = config.loss
    return StepSettings(
        anchor=loss.anchor,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        weight_cap=loss.weight_cap,
        balance=loss.balance,
        temperature=config.rollout.temperature,
        micro_batch_tokens=config.learner.micro_batch_tokens,
        logprob_chunk=config.learner.logprob_chunk,
    )


def to_batch(shard: wire.Shard, device: torch.device) -> StepBatch:
    """The shard's arrays as tensors; advantages spread over each trajectory's tokens."""
    lengths = np.diff(shard.cu_seqlens)

    def tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).to(device=device, dtype=dtype)

    return StepBatch(
        token_ids=tensor(shard.token_ids, torch.int64),
        cu_seqlens=shard.cu_seqlens,
        trainable=tensor(shard.trainable, torch.uint8),
        accept=tensor(shard.accept, torch.uint8),
        advantages=tensor(np.repeat(shard.advantages, lengths), torch.float32),
        log_q=tensor(shard.log_q, torch.float32),
        log_m=tensor(shard.log_m, torch.float32),
        log_p_v=tensor(shard.log_p, torch.float32),
        denominator=shard.denominator,
        tokens_global=shard.tokens_global,
    )


def weight_backend(config: RunConfig, device: torch.device) -> str:
    """What ``weights.backend`` comes to: nccl needs a GPU on both ends, and the embedded engine has none."""
    if config.weights.backend != "auto":
        return config.weights.backend
    return "nccl" if device.type == "cuda" and config.actor.engine != "local" else "gloo"


def _connect(
    config: RunConfig, parallel: DataParallel, version: int, run_id: str, stop: StopFlag
) -> tuple[BrokerLink, int]:
    """Say Hello; returns the link and the newest version that was published so far (-1: told to stop)."""
    hello = wire.Hello(
        role="learner",
        name="learner",
        run_id=run_id,
        session=f"{parallel.broadcast_int(secrets.randbits(31)):08x}",
        rank=parallel.rank,
        world=parallel.world,
        version=version,
        capacity=0,
        host=socket.gethostname(),
        pid=os.getpid(),
    )
    link = connect(config.broker, hello)
    try:
        welcome = link.wait_welcome(config.learner.wait_s, lambda: stop.is_set)
    except BaseException:
        link.close()
        raise
    return link, -1 if welcome is None else welcome.version


def run_learner(config: RunConfig, _name: str, stop: StopFlag) -> None:
    """Train one run to its end on this rank."""
    torch.set_num_threads(config.learner.threads)
    torch.manual_seed(config.run.seed)
    parallel = DataParallel.from_environment()
    try:
        if parallel.world != config.learner.ranks:
            raise ConfigError(
                f"learner.ranks={config.learner.ranks}, but torchrun started {parallel.world}: "
                f"use --nproc-per-node {config.learner.ranks} or set learner.ranks={parallel.world}"
            )
        _train(config, parallel, stop)
    finally:
        parallel.close()


def _train(config: RunConfig, parallel: DataParallel, stop: StopFlag) -> None:
    device = pick_device()
    model = Decoder(ModelConfig.from_hf_dir(config.model.path)).to(device)
    load_hf(config.model.path, model)
    optimizer = Optimizer(model, config.optim, config.run.steps)
    step, run_id = 0, ""
    expert_fraction = model.uniform_expert_fraction()
    found = _find_checkpoint(config)
    if found is not None:
        state = checkpoint.load(found, model, optimizer)
        step, run_id, expert_fraction = state.step, state.run_id, state.expert_fraction
        log.info("resumed from %s at step %d", found, step)
    link, published = _connect(config, parallel, step, run_id, stop)
    try:
        if published >= 0:
            Learner(config, stop, parallel, device, model, optimizer, link, expert_fraction, step, published).run()
    finally:
        link.close("finished" if not stop.is_set else "stopped")


def _find_checkpoint(config: RunConfig) -> Path | None:
    if not config.learner.resume:
        return None
    directory = config.run.path / "checkpoints"
    found = checkpoint.latest(directory)
    if found is None and directory.exists() and any(directory.iterdir()):
        raise CheckpointError(f"learner.resume=true, but {directory} holds no complete checkpoint")
    return found
