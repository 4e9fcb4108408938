"""The policy replica: the learner's own model code, scoring tokens for the broker.

::

    ScoreRequest -> wait until our weights are new enough -> packed forward -> log p -> ScoreResult
         weights: Prepare/Go -> received in the background -> swapped in between two requests

Scoring happens here, off the learner's critical path, so the learner never runs a second forward
pass to find its old policy. ``torchrun -m learner.score`` starts one independent replica a rank.
"""

import logging
import os
import secrets
import socket
import sys
import time
from collections import deque

import numpy as np
import torch

from common import wire
from common.cli import run_process
from common.config import RunConfig
from common.errors import CroupierError, DataError
from common.link import connect
from common.process import StopFlag
from common.weights import StagedWeights, WeightReceiver
from learner.device import pick_device
from learner.hf import hf_tensors, load_hf
from learner.logprobs import score_tokens, target_positions
from learner.model.config import ModelConfig
from learner.model.decoder import Decoder
from learner.weights.group import join, unpack

IDLE_WAIT_S = 0.01  # how long an idle replica blocks for a message before it looks for new weights

log = logging.getLogger("replica")


class PolicyScorer:
    """Log-probabilities of packed sequences under the weights it holds."""

    def __init__(self, model: Decoder, chunk: int) -> None:
        self.model = model
        self.chunk = chunk
        self.version = 0

    @torch.no_grad()
    def score(self, request: wire.ScoreRequest) -> tuple[np.ndarray, np.ndarray]:
        """``log p`` of every wanted token ``[N]`` and at its alternatives ``[N, k]``; 0 elsewhere."""
        device = self.model.device
        vocab_size = self.model.config.vocab_size
        if len(request.token_ids) and not 0 <= request.token_ids.min() <= request.token_ids.max() < vocab_size:
            raise DataError(f"score_request {request.request}: a token id lies outside the vocabulary of {vocab_size}")
        token_ids = torch.from_numpy(request.token_ids.astype(np.int64)).to(device)
        hidden = self.model.hidden(token_ids, request.cu_seqlens).hidden
        at = target_positions(request.cu_seqlens, request.wanted)
        tokens = torch.from_numpy(at).to(device)
        topk = torch.from_numpy(request.topk_ids[at].astype(np.int64)).to(device)
        scores = score_tokens(
            hidden[tokens - 1], self.model.head, token_ids[tokens], topk, request.temperature, self.chunk
        )
        log_p = np.zeros(len(request.token_ids), np.float32)
        topk_log_p = np.zeros(request.topk_ids.shape, np.float32)
        log_p[at] = scores[0].cpu().numpy()
        topk_log_p[at] = scores[1].cpu().numpy()
        return log_p, topk_log_p

    @torch.no_grad()
    def swap(self, staged: StagedWeights) -> None:
        """Copy a received version into the model; checks that it holds exactly the model's tensors."""
        targets = dict(hf_tensors(self.model))
        received = dict(unpack(staged.buckets))
        if set(targets) != set(received):
            odd = sorted(set(targets) ^ set(received))[:3]
            raise DataError(
                f"version {staged.version}: tensors {odd} are missing or unknown; is model.path the learner's?"
            )
        for name, tensor in received.items():
            targets[name].copy_(tensor)
        self.version = staged.version


class ReplicaService:
    """One replica; :meth:`run` returns when the broker says Stop or the process is asked to end."""

    def __init__(self, config: RunConfig, name: str, stop: StopFlag) -> None:
        torch.set_num_threads(config.replica.threads)
        self.config = config
        self.stop = stop
        rank = int(os.environ.get("RANK", "0"))
        device = pick_device()
        model = Decoder(ModelConfig.from_hf_dir(config.model.path)).to(device)
        load_hf(config.model.path, model)
        self.scorer = PolicyScorer(model, config.learner.logprob_chunk)
        self._requests: deque[wire.ScoreRequest] = deque()
        hello = wire.Hello(
            role="replica",
            name=f"{name}.{rank}" if "RANK" in os.environ else name,
            run_id="",
            session=secrets.token_hex(4),
            rank=rank,
            world=int(os.environ.get("WORLD_SIZE", "1")),
            version=0,
            capacity=0,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        self.link = connect(config.broker, hello)
        deadline = config.weights.deadline_s
        self.receiver = WeightReceiver(self.link.send, lambda prepare: join(prepare, deadline, device))

    def run(self) -> None:
        """Score until told to stop."""
        try:
            if self.link.wait_welcome(self.config.replica.wait_s, lambda: self.stop.is_set) is None:
                return
            while not self.stop.is_set:
                block = not self._ready()
                while (message := self.link.receive(IDLE_WAIT_S if block else 0.0)) is not None:
                    self._handle(message)
                    block = False
                self._swap()
                if self._ready():
                    self._answer(self._requests.popleft())
        finally:
            self.receiver.close()
            self.link.close("stopped")

    def _ready(self) -> bool:
        return bool(self._requests) and self._requests[0].min_version <= self.scorer.version

    def _handle(self, message: object) -> None:
        match message:
            case wire.ScoreRequest():
                self._requests.append(message)
            case wire.Prepare():
                self.receiver.on_prepare(message)
            case wire.Go():
                self.receiver.on_go(message)
            case wire.Stop():
                self.stop.set(f"the broker said stop: {message.reason}")
            case wire.Welcome():
                self._requests.clear()  # a broker that came back asks again

    def _swap(self) -> None:
        while (staged := self.receiver.staged()) is not None:
            try:
                if staged.version != self.scorer.version:
                    self.scorer.swap(staged)
            except CroupierError as error:
                log.error("version %d cannot be used: %s", staged.version, error)
                self.receiver.failed(staged, str(error))
                continue
            self.link.set_version(staged.version)
            self.receiver.applied(staged)

    def _answer(self, request: wire.ScoreRequest) -> None:
        began = time.perf_counter()
        try:
            log_p, topk_log_p = self.scorer.score(request)
        except DataError as error:
            log.error("%s", error)
            return
        seconds = time.perf_counter() - began
        self.link.send(wire.ScoreResult(request.request, self.scorer.version, seconds, log_p, topk_log_p))


def run_replica(config: RunConfig, name: str, stop: StopFlag) -> None:
    """Serve one run to its end."""
    ReplicaService(config, name, stop).run()


def main() -> int:
    """``[torchrun ...] -m learner.score RUN.yaml [--name replica-0] [key=value ...]``."""
    return run_process("learner.score", sys.argv[1:], run_replica, default_name="replica-0")


if __name__ == "__main__":
    sys.exit(main())
