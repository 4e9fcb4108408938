"""Scorers: the learner's own model code in a process that gives the broker log-probabilities.

::

    ScoreRequests -> wait until our weights are new enough -> one packed forward -> log p -> ScoreResults
         weights: Prepare/Go -> received in the background -> swapped in between two batches

Scoring happens here, off the learner's critical path, so the learner never runs a second forward
pass to find its old policy. Requests that wait are scored together. ``torchrun -m learner.score``
starts one independent replica a rank, or one replica on all ranks where ``replica.ep`` x
``replica.tp`` says so. With ``--serves NAME`` it is a frozen model, the reference or a teacher: the
same but for the weights, which stay as they were read.
"""

import logging
import os
import secrets
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common import wire
from common.cli import run_process
from common.config import RunConfig
from common.errors import ConfigError, CroupierError, DataError
from common.exporter import Families, families_of_peer, gauge, open_exporter
from common.frozen import POLICY
from common.identity import model_identity
from common.link import connect, parting
from common.process import StopFlag
from common.trace import Tracer, open_tracer, power_of_two
from common.weights import Bucket, StagedWeights, WeightReceiver, is_frozen
from learner.device import keep_freed_memory, match_servers, pick_device
from learner.feed import check_experts, check_ids, experts_tensor
from learner.followers import IDLE, IDLE_S, SCORE, STOP, SWAP, Followers, Packed
from learner.hf import load_model
from learner.layout import places, views
from learner.logprobs import Head, score_tokens, target_positions
from learner.mesh import COLLECTIVE_TIMEOUT_S, Mesh
from learner.model.decoder import Decoder
from learner.step import micro_batches
from learner.weights.group import Adopter, join, unpack

MAX_REASON = 500  # characters of why a request cannot be scored
IDLE_WAIT_S = 0.01  # how long an idle replica blocks for a message before it looks for new weights

log = logging.getLogger("replica")
Scored = tuple[NDArray[np.float32], NDArray[np.float32]]  # log p [N] and at the alternatives [N, k]


class PolicyScorer:
    """Log-probabilities of packed sequences under the weights it holds."""

    def __init__(
        self,
        model: Decoder,
        logprob_mb: float,
        micro_batch_tokens: int = 1 << 30,
        frozen: Sequence[str] = (),
        head_float32: bool = False,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.version = 0
        self.followers = Followers(model.mesh)
        self._logprob_mb, self._limit, self._frozen = logprob_mb, micro_batch_tokens, tuple(frozen)
        self._head_float32, self._compiled = head_float32, compiled
        self._adopter = Adopter(model.parameters(), views(model))
        self._checked: list[Bucket] = []  # the layout of a version whose tensors were found to be the model's
        self._adopted = False  # whether the parameters lie in memory that a receiver owns
        self._places = {place.name: place for place in places(model.config)}

    def score(self, requests: Sequence[wire.ScoreRequest]) -> list[Scored]:
        """``log p`` of every wanted token ``[N]`` and at its alternatives ``[N, k]``, 0 elsewhere; one pack.

        The requests have passed :meth:`check`.
        """
        packed = self._pack(requests)
        self.followers.order(SCORE)
        packed = self.followers.share(packed)
        scores = self.run(packed)
        out, found = [], 0
        for request in requests:
            at = np.flatnonzero(request.wanted)
            log_p = np.zeros(len(request.token_ids), np.float32)
            topk_log_p = np.zeros(request.topk_ids.shape, np.float32)
            mine = slice(found, found + len(at))
            log_p[at], topk_log_p[at] = scores[0][mine], scores[1][mine]
            out.append((log_p, topk_log_p))
            found = mine.stop
        return out

    def check(self, request: wire.ScoreRequest) -> None:
        """Raises :class:`DataError` for a request that cannot be scored, before others are packed with it."""
        tag = f"score_request {request.request}"
        check_ids(tag, request.token_ids, self.model.config.vocab_size)
        if request.topk_ids.size:
            check_ids(tag, request.topk_ids.reshape(-1), self.model.config.vocab_size)
        target_positions(request.cu_seqlens, request.wanted)
        check_experts(request.experts, self.model.config)

    def _pack(self, requests: Sequence[wire.ScoreRequest]) -> Packed:
        device = self.model.device
        starts = np.cumsum([0] + [len(r.token_ids) for r in requests])
        offsets = [r.cu_seqlens[1:].astype(np.int64) + start for r, start in zip(requests, starts, strict=False)]
        at = [target_positions(r.cu_seqlens, r.wanted) for r in requests]
        together = [a + start for a, start in zip(at, starts, strict=False)]

        def tensor(arrays: list[NDArray[np.int64]]) -> Tensor:
            return torch.from_numpy(np.concatenate(arrays)).to(device)

        experts = np.concatenate([r.experts for r in requests])
        return Packed(
            tensor([r.token_ids.astype(np.int64) for r in requests]),
            torch.from_numpy(np.concatenate([np.zeros(1, np.int64), *offsets])),
            tensor(together),
            tensor([r.topk_ids[a].astype(np.int64) for r, a in zip(requests, at, strict=True)]),
            experts_tensor(experts, self.model.config, device),
            requests[0].temperature,
        )

    @torch.no_grad()
    def run(self, packed: Packed) -> Scored:
        """The wanted tokens' scores, in order; micro-batch by micro-batch."""
        model, offsets = self.model, packed.cu_seqlens.numpy()
        head = Head(model.head, packed.temperature, self._logprob_mb, model.mesh.tp, self._head_float32, self._compiled)
        positions = packed.at.cpu().numpy()
        found = [(packed.at[:0].float(), packed.ids[:0].float())]
        for first, last in micro_batches(offsets, self._limit):
            start, end = int(offsets[first]), int(offsets[last])
            a, b = np.searchsorted(positions, (start, end)).tolist()
            experts = None if packed.experts is None else packed.experts[start:end]
            hidden = model.hidden(packed.token_ids[start:end], offsets[first : last + 1] - start, experts)
            at = packed.at[a:b]
            scores = score_tokens(hidden[at - 1 - start], head, packed.token_ids[at], packed.ids[a:b])
            found.append((scores.logp, scores.at_ids))  # copied to the host at the end: a GPU is not waited for
        log_p, at_ids = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
        return log_p, at_ids

    @torch.no_grad()
    def swap(self, staged: StagedWeights) -> bool:
        """Make a received version the model's; it must hold the model's tensors, but for the frozen ones.

        True if the model now runs on the memory the version arrived in, False if it was copied.
        """
        self._check(staged)
        self.followers.order(SWAP)
        return self.take(self.followers.share_weights(staged))

    def _check(self, staged: StagedWeights) -> None:
        """Raises :class:`DataError` unless its tensors are the model's."""
        buckets = [bucket for bucket, _ in staged.buckets]
        if buckets == self._checked:
            return
        received = {slot.name: slot.shape for bucket in buckets for slot in bucket.slots}
        odd = {name for name in set(self._places) ^ set(received) if not is_frozen(name, self._frozen)}
        if odd:
            raise DataError(
                f"version {staged.version}: tensors {sorted(odd)[:3]} are missing or unknown; "
                "is model.path the learner's?"
            )
        for name, shape in received.items():
            if shape != self._places[name].shape:
                wanted = list(self._places[name].shape)
                raise DataError(f"version {staged.version}: {name} has shape {list(shape)}, the model has {wanted}")
        self._checked = buckets

    @torch.no_grad()
    def take(self, staged: StagedWeights) -> bool:
        """This rank's part of every tensor."""
        tp = self.model.mesh.tp
        if not self.followers.any and self._adopter.adopt(staged):
            self.version, self._adopted = staged.version, True
            return True
        if self._adopted:  # the memory that they lie in will be another version's
            for parameter in self.model.parameters():
                parameter.data = parameter.data.clone()
            self._adopted = False
        held = views(self.model)
        for name, tensor in unpack(staged.buckets):
            if name in held:
                dim = self._places[name].dim
                held[name].copy_(tensor if dim is None else tensor.chunk(tp.size, dim=dim)[tp.rank])
        self.version = staged.version
        return False

    def follow(self, tracer: Tracer) -> None:
        """A rank that is not the first: do as the leader says until it stops."""
        tracer.state("idle.requests")
        while (kind := self.followers.order(IDLE)) != STOP:
            if kind == SCORE:
                tracer.state("score")
                self.run(self.followers.share(None))
            elif kind == SWAP:
                tracer.state("swap")
                self.take(self.followers.share_weights(None))
            tracer.state("idle.requests")


class ReplicaService:
    """One replica; :meth:`run` returns when the broker says Stop or the process is asked to end."""

    def __init__(
        self, config: RunConfig, name: str, stop: StopFlag, scorer: PolicyScorer, tracer: Tracer, serves: str = POLICY
    ) -> None:
        """``config.model`` is the model that it serves: the policy, or the frozen one called ``serves``."""
        self.config, self.tracer = config, tracer
        self.stop = stop
        self.scorer = scorer
        rank = rank_of(scorer.model.mesh)
        device = scorer.model.device
        self._requests: deque[wire.ScoreRequest] = deque()
        self._last_order = time.perf_counter()  # when the followers last heard of us
        hello = wire.Hello(
            role="replica",
            name=name,
            run_id="",
            session=secrets.token_hex(4),
            rank=rank,
            world=1 if scorer.followers.any else int(os.environ.get("WORLD_SIZE", "1")),
            version=0,
            capacity=0,
            host=socket.gethostname(),
            pid=os.getpid(),
            model=model_identity(config.model.path),
            serves=serves,
        )
        self.link = connect(config.broker, hello, tracer)
        deadline = config.weights.deadline_s
        self.receiver: WeightReceiver | None = None
        if serves == POLICY:
            self.receiver = WeightReceiver(
                self.link.send, lambda prepare: join(prepare, deadline, device), deadline, tracer
            )

    def run(self) -> None:
        """Score until told to stop."""
        try:
            self.tracer.state("idle.start")
            if self.link.wait_welcome(self.config.replica.wait_s, self._stopping) is None:
                return
            while not self.stop.is_set:
                block = not self._ready()
                self.tracer.state(self._waits_for() if block else "receive")
                while (message := self.link.receive(IDLE_WAIT_S if block else 0.0)) is not None:
                    self.tracer.state("receive")
                    self._handle(message)
                    block = False
                if self.tracer.wants_levels:
                    self.tracer.levels(requests=len(self._requests))
                self._swap()
                self._answer()
                self._keep_company()
        finally:
            self.tracer.state("end")
            self.scorer.followers.order(STOP)
            if self.receiver is not None:
                self.receiver.close()
            self.link.close(parting("stopped"))

    def _stopping(self) -> bool:
        self._keep_company()
        return self.stop.is_set

    def families(self) -> Families:
        """For Prometheus, whenever it asks; what was scored is in the tracer's tallies."""
        yield from families_of_peer(self.link)
        yield gauge("croupier_replica_waiting_requests", "Requests that wait to be scored.", len(self._requests))

    def _waits_for(self) -> str:
        """The state of a main thread that has nothing to do."""
        return "idle.weights" if self._requests else "idle.requests"

    def _ready(self) -> bool:
        return bool(self._requests) and self._requests[0].min_version <= self.scorer.version

    def _handle(self, message: object) -> None:
        match message:
            case wire.ScoreRequest():  # perhaps not for the first time: a repeated Hello has it sent again
                asked = [r for r in self._requests if r.request != message.request]
                self._requests = deque([*asked, message])
            case wire.Prepare() if self.receiver is not None:
                self.receiver.on_prepare(message)
            case wire.Go() if self.receiver is not None:
                self.receiver.on_go(message)
            case wire.Stop():
                self.stop.set(f"the broker said stop: {message.reason}")
            case wire.Welcome():
                self._requests.clear()  # a broker that came back asks again

    def _swap(self) -> None:
        while self.receiver is not None and (staged := self.receiver.staged()) is not None:
            adopted = copied = False
            self.tracer.state("swap")
            try:
                if staged.version != self.scorer.version:
                    adopted = self.scorer.swap(staged)
                    copied = not adopted
            except CroupierError as error:
                log.error("version %d cannot be used: %s", staged.version, error)
                self.receiver.failed(staged, str(error))
                continue
            self.link.set_version(staged.version)
            self.receiver.applied(staged, adopted=adopted, copied=copied)

    def _answer(self) -> None:
        """Score what waits, as much of it as one batch takes."""
        batch: list[wire.ScoreRequest] = []
        tokens = 0
        while self._ready():
            request = self._requests[0]
            tokens += len(request.token_ids)
            if batch and (tokens > self.config.replica.batch_tokens or not _alike(request, batch[0])):
                break
            self._requests.popleft()
            try:
                self.scorer.check(request)
                batch.append(request)
            except DataError as error:
                log.error("request %d cannot be scored: %s", request.request, error)
                self.link.send(wire.ScoreFailed(request.request, str(error)[:MAX_REASON]))
        if not batch:
            return
        self._last_order = time.perf_counter()
        self.tracer.state("score")
        began, cpu = self.tracer.now(), self.tracer.cpu()
        scored = self.scorer.score(batch)
        took = self.tracer.now() - began
        tokens = sum(len(request.token_ids) for request in batch)
        self.tracer.tally("score", power_of_two(tokens), took, self.tracer.cpu() - cpu, tokens)
        self.tracer.state("receive")
        seconds = took / 1e9 / len(batch)
        for request, (log_p, topk_log_p) in zip(batch, scored, strict=True):
            self.link.send(wire.ScoreResult(request.request, self.scorer.version, seconds, log_p, topk_log_p))

    def _keep_company(self) -> None:
        """Followers wait for orders no longer than their group's timeout."""
        now = time.perf_counter()
        if self.scorer.followers.any and now - self._last_order > IDLE_S:
            self.scorer.followers.order(IDLE)
            self._last_order = now


def _alike(a: wire.ScoreRequest, b: wire.ScoreRequest) -> bool:
    """Whether two requests can be one pack."""
    return (
        a.temperature == b.temperature
        and a.topk_ids.shape[1] == b.topk_ids.shape[1]
        and a.experts.shape[1] == b.experts.shape[1]
    )


def rank_of(mesh: Mesh) -> int:
    """Among the ranks of one replica, or else of the replicas that torchrun started together."""
    return mesh.rank if mesh.world > 1 else int(os.environ.get("RANK", "0"))


def name_of(name: str, mesh: Mesh) -> str:
    """Its name in the run: replicas that torchrun started together are told apart by their rank."""
    return f"{name}.{rank_of(mesh)}" if "RANK" in os.environ and mesh.world == 1 else name


def build_mesh(config: RunConfig) -> Mesh:
    """This rank's place among those of its replica."""
    alone = config.replica.ranks == 1
    return Mesh({}, 0, pick_device()) if alone else Mesh.from_environment(config.replica, COLLECTIVE_TIMEOUT_S)


def build_scorer(config: RunConfig, mesh: Mesh) -> PolicyScorer:
    """This rank's share of the replica's model, loaded."""
    learner = config.learner
    return PolicyScorer(
        load_model(config, mesh),
        learner.logprob_mb,
        learner.micro_batch_tokens,
        config.optim.freeze,
        learner.head_float32,
        learner.compile,
    )


def serving(config: RunConfig, serves: str) -> RunConfig:
    """``config`` with the frozen model ``serves`` in the policy's place. Raises :class:`ConfigError`."""
    if serves == POLICY:
        return config
    if serves not in config.frozen:
        known = ", ".join(config.frozen) or "none: the reference comes with loss.kl, teachers with loss.distill"
        raise ConfigError(f"--serves {serves}: no frozen model of this run; it has {known}")
    model = replace(config.model, path=config.frozen[serves].path)
    return replace(config, model=model, loss=replace(config.loss, expert_bias_rate=0.0))


def run_replica(config: RunConfig, name: str, stop: StopFlag, serves: str = POLICY) -> None:
    """Serve one run to its end, under the policy's newest weights or as a frozen model."""
    keep_freed_memory()
    torch.set_num_threads(config.replica.threads)
    name = name or (config.frozen[serves].process(0) if serves in config.frozen else "replica-0")
    config = serving(config, serves)
    match_servers(config)
    mesh = build_mesh(config)
    name = name_of(name, mesh)
    process = f"{name}.{mesh.rank}" if mesh.rank else name
    try:
        with (
            open_tracer(config, process, "replica", rank_of(mesh)) as tracer,
            open_exporter(config, tracer) as exporter,
        ):
            scorer = build_scorer(config, mesh)
            if mesh.rank == 0:
                service = ReplicaService(config, name, stop, scorer, tracer, serves)
                exporter.families = service.families
                service.run()
            else:
                scorer.follow(tracer)
    finally:
        mesh.close(orderly=sys.exception() is None)


def main() -> int:
    """``[torchrun ...] -m learner.score RUN.yaml [--name NAME] [--serves MODEL] [key=value ...]``."""
    flags = {"serves": "a frozen model: reference, or a teacher's name (default: the policy)"}
    return run_process("learner.score", sys.argv[1:], run_replica, flags=flags)


if __name__ == "__main__":
    sys.exit(main())
