"""The learner process, top to bottom.

::

    shard = feed.fetch(step)            the broker's accepted tokens, this rank's share
    metrics = train_step(batch)         forward, loss, backward, all-reduce, AdamW
    rollout.step(model, batch)          a rollout model of its own, where the run has one
    feed.commit(step)                   the broker may forget the step once it is checkpointed
    publisher.publish(step + 1)         rank 0: new weights to the fleet, in flight
    checkpoint                          every learner.checkpoint_every steps, and at the end; with
                                        evaluation.keep_best also of versions that may be evaluated
"""

import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from common import wire
from common.config import MEGABYTE, RunConfig
from common.errors import DeadlineError, ProtocolError
from common.exporter import Exporter, Families, families_of_peer, gauge, open_exporter
from common.identity import model_identity
from common.joint import POLICY_STREAM, ROLLOUT_STREAM
from common.link import BrokerLink, connect, parting
from common.process import StopFlag
from common.slowness import Slowness
from common.trace import Tracer, open_tracer, power_of_two
from learner import checkpoint
from learner.checkpoint import TrainingState
from learner.device import keep_freed_memory, match_servers
from learner.exports import step_families
from learner.feed import Feed, to_batch
from learner.freeze import freeze
from learner.hf import load_model, save_hf
from learner.hold import held
from learner.joint.trainer import RolloutTrainer
from learner.mesh import Mesh
from learner.model.decoder import Decoder
from learner.optim import Optimizer
from learner.patience import patience_s, published_sizes
from learner.profiling import profiled
from learner.retention import CHECKPOINTS, Retention
from learner.saving import CheckpointWriter
from learner.step import StepBatch, StepSettings, train_step
from learner.together import shared
from learner.weights.gather import WeightGather
from learner.weights.publish import WeightPublisher
from learner.weights.stream import WeightStream

EXPORT_BUCKET_BYTES = 256 * MEGABYTE  # gathered at once for the final model
PAUSE_S = 0.1  # learner.slowdown and .pace_s: how long at a time
FAREWELL_S = 60.0  # how long the learner stays for late joiners after its last step

log = logging.getLogger("learner")

T = TypeVar("T")


@dataclass
class Learner:
    """What a rank holds; :meth:`run` trains to the last step."""

    config: RunConfig
    stop: StopFlag
    mesh: Mesh
    model: Decoder
    optimizer: Optimizer
    frozen: frozenset[str]
    link: BrokerLink
    tracer: Tracer
    expert_fraction: torch.Tensor  # [L, E] of the last step
    step: int = 0  # the next to train; the weights are version ``step``
    published: int = 0  # newest version that the fleet was sent before
    rollout: RolloutTrainer | None = None  # the model that actors run, where it is trained beside the policy
    streams: list[WeightStream] = field(default_factory=list)
    publish_seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)  # of the last step
    retention: Retention | None = None  # which checkpoints stay
    safe: int = 0  # the newest version that a checkpoint holds
    begun: int = 0  # the newest version whose checkpoint was begun
    failure: DeadlineError | ProtocolError | None = None  # of the broker: raised when all is written

    def run(self) -> None:
        """Train every step, then stay until the broker says Stop."""
        config, mesh, tracer = self.config, self.mesh, self.tracer
        feed = self._feed()
        directory = config.run.path / CHECKPOINTS
        evaluated_every = config.evaluation.every if config.evaluation.keep_best else 0
        self.retention = Retention(directory, config.learner.checkpoint_keep, evaluated_every)
        writer = CheckpointWriter(directory, mesh, self.retention, config.learner.write_timeout_s)
        self.streams = self._streams()
        slowness = Slowness(config.learner.slowdown, config.learner.pace_s)
        self._tell_safe()
        self._publish()
        while self.step < config.run.steps:
            began = time.perf_counter()
            tracer.state("idle.shard", self.step)
            shard = self._attempt(feed.fetch, self.step, self._catch_up)
            tracer.state("idle.ranks", self.step)
            if mesh.max_int(shard is None):  # one of us was told to stop, so all of us do
                if not self.stop.is_set:
                    self.stop.set("the broker said stop" if feed.stopped else "another rank was told to stop")
                break
            assert shard is not None
            fetched = time.perf_counter()
            with profiled(config, tracer, self.step, mesh.device):
                metrics, batch = self._train(shard)
                self._slow_down(slowness.pause_s(len(shard.token_ids), time.perf_counter() - fetched))
                metrics |= {"seconds_fetch": fetched - began, "seconds_train": time.perf_counter() - fetched}
                if self.rollout is not None:
                    tracer.state("joint", self.step)
                    metrics |= self.rollout.step(self.model, batch)
            tracer.state("commit", self.step)
            self.step += 1
            self.metrics = metrics | {"seconds_publish": self.publish_seconds}
            if mesh.rank == 0:
                feed.commit(self.step - 1, self.metrics)
            self._publish()
            self._checkpoint(writer)
        self._finish(writer)
        if self.failure is not None:
            raise self.failure
        self._farewell(feed)

    def _attempt(self, ask: Callable[..., T], *arguments: Any) -> T | None:
        """What ``ask`` gets from the broker. If that is gone, or refuses us, the run stops: what is trained is kept."""
        try:
            return ask(*arguments)
        except (DeadlineError, ProtocolError) as error:
            log.warning("%s; stopping with a checkpoint", error)
            self.failure = self.failure or error
            self.stop.set(str(error))
            return None

    def _train(self, shard: wire.Shard) -> tuple[dict[str, float], StepBatch]:
        """One update of the policy; its metrics, and the batch for the rollout model."""
        tracer, phase = self.tracer, self.tracer.phases(self.step)
        began, cpu = tracer.now(), tracer.cpu()
        phase("load")
        batch = to_batch(shard, self.mesh.device, self.model.config, self.config.rollout.temperature)
        metrics, self.expert_fraction = train_step(
            self.model, self.optimizer, batch, self.expert_fraction, settings_of(self.config), phase
        )
        tokens = len(shard.token_ids)
        tracer.tally("train", power_of_two(tokens), tracer.now() - began, tracer.cpu() - cpu, tokens)
        return metrics, batch

    def families(self) -> Families:
        """For Prometheus, whenever it asks; tokens and publishes are in the tracer's tallies."""
        yield from families_of_peer(self.link)
        yield from step_families(self.metrics)
        yield gauge("croupier_learner_step", "The step that is trained next.", self.step)

    # ---- weights --------------------------------------------------------------------------------

    def _feed(self) -> Feed:
        """Rank 0 waits ``learner.wait_s`` for a shard; the others, which cannot know what holds it up, longer."""
        mesh, wait_s, limit = self.mesh, self.config.learner.wait_s, "learner.wait_s"
        if mesh.rank != 0:
            wait_s, limit = mesh.timeout_s, "learner.wait_s, and all that rank 0 may do alone"
        return Feed(self.link, mesh.data_rank, mesh.data_ranks, wait_s, self._stopping, limit)

    def _streams(self) -> list[WeightStream]:
        """Whose weights go where; the actors', who may be waiting for them, first."""
        models: list[tuple[str, Decoder, frozenset[str]]] = [(POLICY_STREAM, self.model, self.frozen)]
        if self.rollout is not None:
            models.insert(0, (ROLLOUT_STREAM, self.rollout.model, frozenset()))
        bucket_bytes = int(self.config.weights.bucket_mb * MEGABYTE)
        return [
            WeightStream(name, model, frozen, bucket_bytes, self._publisher(name), self.published, self.tracer)
            for name, model, frozen in models
        ]

    def _publisher(self, stream: str) -> WeightPublisher | None:
        if self.mesh.rank != 0:
            return None
        weights = self.config.weights
        return WeightPublisher(
            self.link.send, self.link.receive, weights.host, weights.bucket_mb, weights.deadline_s, self.mesh.device,
            weight_backend(self.config, self.mesh.device), weights.least_mb_s, stream, self.tracer,
        )  # fmt: skip

    def _publish(self) -> None:
        """Gather the present weights, on every rank, and send them to who has not had them."""
        self.link.set_version(self.step)  # also where the fleet had later ones: what was trained again is trained
        self.publish_seconds = 0.0
        for stream in self.streams:  # every one, whatever became of the one before: other ranks take part
            seconds = self._attempt(stream.publish, self.step, self._note, self._stopping)
            self.publish_seconds += seconds or 0.0

    def _note(self, message: Any) -> None:
        match message:
            case wire.Stop():
                self.stop.set(f"the broker said stop: {message.reason}")
            case wire.Resync():
                for stream in self.streams:
                    if stream.name == message.stream:
                        stream.resync = message.reason
            case wire.Welcome():  # a broker that came back may have heard of the last one only in passing
                self._tell_safe()
            case wire.KeepBest() if self.retention is not None:
                self.retention.told(message)

    def _catch_up(self, message: Any) -> None:
        """What comes while nothing is published: somebody may lack the present version."""
        self._note(message)
        for stream in self.streams:
            stream.catch_up(self.step, self._note, self._stopping)

    def _slow_down(self, seconds: float) -> None:
        """Let ``seconds`` pass (learner.slowdown, .pace_s). Who lacks this version is sent the next: it is gone."""
        deadline = time.perf_counter() + seconds
        while not self.stop.is_set and (left := deadline - time.perf_counter()) > 0:
            self._note(self._attempt(self.link.receive, min(left, PAUSE_S)))

    def _stopping(self) -> bool:
        return self.stop.is_set

    # ---- checkpoints ----------------------------------------------------------------------------

    def _checkpoint(self, writer: CheckpointWriter) -> None:
        """Begin one where it is due, and tell the broker of those that are complete."""
        self.tracer.state("checkpoint", self.step - 1)
        every, evaluated = self.config.learner.checkpoint_every, writer.retention.is_evaluated(self.step)
        if self.step == self.config.run.steps or evaluated or (every > 0 and self.step % every == 0):
            self._begin(writer)
        self._report(writer)

    def _begin(self, writer: CheckpointWriter) -> None:
        optimizer, rollout = self.optimizer, self.rollout
        state = TrainingState(
            self.step, self.step, self.link.run_id, optimizer.steps, optimizer.skipped, self.expert_fraction.tolist(),
            None if rollout is None else rollout.state(),
        )  # fmt: skip
        writer.start(self.model, optimizer, state, None if rollout is None else rollout.trained)
        self.begun = self.step

    def _report(self, writer: CheckpointWriter) -> None:
        for step in writer.finished():
            self.safe = step
            self._tell_safe()

    def _tell_safe(self) -> None:
        """Nothing before the newest checkpoint will be asked for again."""
        if self.safe and self.mesh.rank == 0:
            self.link.send(wire.Checkpointed(self.safe - 1))

    def _finish(self, writer: CheckpointWriter) -> None:
        """Complete what is being written; one that is stopped keeps what it has trained since."""
        self.tracer.state("checkpoint")
        if self.step > self.begun:
            self._begin(writer)
        writer.wait()
        self._report(writer)
        self.tracer.state("export")
        if self.step == self.config.run.steps:
            self._export(self.model, self.config.model.path, "model")
            if self.rollout is not None:
                self._export(self.rollout.model, self.config.joint.path, "rollout_model")
        self.tracer.state("idle.ranks")
        self.mesh.barrier()

    def _export(self, model: Decoder, source: str, name: str) -> None:
        tensors = WeightGather(model, EXPORT_BUCKET_BYTES).tensors()
        if self.mesh.rank == 0:
            save_hf(tensors, source, self.config.run.path / name, model.config)
        else:
            for _ in tensors:
                pass

    def _farewell(self, feed: Feed) -> None:
        self.tracer.state("idle.end")
        last_evaluation_s = self.config.learner.wait_s if self.config.evaluation.keep_best else 0.0
        deadline = time.monotonic() + max(FAREWELL_S, last_evaluation_s)
        while not self._stopping() and not feed.stopped and time.monotonic() < deadline:
            try:
                message = self.link.receive(0.2)
                if message is not None:
                    self._catch_up(message)
            except (DeadlineError, ProtocolError) as error:  # all is written
                log.warning("%s; the run is finished here", error)
                return


def settings_of(config: RunConfig) -> StepSettings:
    """The step's settings out of the run's configuration."""
    learner = config.learner
    return StepSettings(
        loss=config.loss,
        temperature=config.rollout.temperature,
        micro_batch_tokens=learner.micro_batch_tokens,
        logprob_mb=learner.logprob_mb,
        head_float32=learner.head_float32,
        compiled=learner.compile,
    )


def weight_backend(config: RunConfig, device: torch.device) -> str:
    """What ``weights.backend`` comes to for a learner on ``device``."""
    return config.weight_backend(device.type == "cuda")


def _connect(
    config: RunConfig, mesh: Mesh, version: int, run_id: str, stop: StopFlag, tracer: Tracer
) -> tuple[BrokerLink, int]:
    """Say Hello; returns the link and the newest version that was published so far (-1: told to stop)."""
    hello = wire.Hello(
        role="learner",
        name="learner",
        run_id=run_id,
        session=f"{mesh.broadcast_int(secrets.randbits(31)):08x}",
        rank=mesh.rank,
        world=mesh.world,
        version=version,
        capacity=0,
        host=socket.gethostname(),
        pid=os.getpid(),
        model=model_identity(config.model.path),
    )
    link = connect(config.broker, hello, tracer)
    tracer.state("idle.start")
    try:
        welcome = link.wait_welcome(config.learner.wait_s, lambda: stop.is_set)
    except BaseException:
        link.close()
        raise
    return link, -1 if welcome is None else welcome.version


def run_learner(config: RunConfig, _name: str, stop: StopFlag) -> None:
    """Train one run to its end on this rank."""
    keep_freed_memory()
    torch.set_num_threads(config.learner.threads)
    torch.manual_seed(config.run.seed)
    match_servers(config)
    mesh = Mesh.from_environment(config.learner, patience_s(config, published_sizes(config)))
    try:
        process = f"learner.{mesh.rank}" if mesh.rank else "learner"
        with (
            shared(stop, mesh),
            open_tracer(config, process, "learner", mesh.rank) as tracer,
            open_exporter(config, tracer) as exporter,
        ):
            _train(config, mesh, stop, tracer, exporter)
    finally:
        mesh.close(orderly=sys.exception() is None)


def _train(config: RunConfig, mesh: Mesh, stop: StopFlag, tracer: Tracer, exporter: Exporter) -> None:
    model = load_model(config, mesh, recompute=config.learner.recompute)
    frozen = freeze(model, config.optim.freeze)
    optimizer = Optimizer(model, config.optim, config.run.steps)
    rollout = RolloutTrainer.load(config, mesh) if config.joint.trains else None
    step, run_id = 0, ""
    expert_fraction = model.uniform_expert_fraction()
    found = checkpoint.find(config.run.path / CHECKPOINTS, config.learner.resume, mesh)
    if found is not None:
        state = checkpoint.load(found, model, optimizer, frozen, rollout.trained if rollout is not None else None)
        step, run_id = state.step, state.run_id
        if rollout is not None and state.rollout is not None:
            rollout.restore(state.rollout)
        expert_fraction = torch.tensor(state.expert_fraction, device=mesh.device).view(expert_fraction.shape)
        log.info("resumed from %s at step %d", found, step)
    link, published = _connect(config, mesh, step, run_id, stop, tracer)
    try:
        if not mesh.max_int(published < 0):
            learner = Learner(
                config, stop, mesh, model, optimizer, frozen, link, tracer, expert_fraction, step, published, rollout,
                safe=step, begun=step,
            )  # fmt: skip
            exporter.families = learner.families
            with held(config.run.path, mesh.rank, lambda: stop.is_set):  # the broker turns a second one away
                if mesh.rank == 0:
                    checkpoint.check_newest(config.run.path / CHECKPOINTS, found)
                learner.run()
    finally:
        tracer.state("end")
        link.close(parting("finished" if not stop.is_set else "stopped"))
