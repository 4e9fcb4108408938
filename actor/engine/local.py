"""The embedded engine: continuous batching on a transformers model, on the CPU.

::

    waiting -> admit (one prefill a prompt, KV copied to its siblings) -> decode all live rows -> sample -> finish
                                                  ^                                                  |
                                                  +------ live rows stay contiguous from slot 0 -----+

A request whose siblings do not fit waits, and so do those behind it (first in, first out).

Legend: n live rows, U unique prompts, P prompt length, V vocabulary, R experts recorded of a token.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actor.engine.base import Completion, Loaded, SampleRequest, check_request
from actor.engine.experts import ExpertRecorder
from actor.engine.kvcache import SlotCache
from actor.engine.loading import differing, load_model, stop_ids
from actor.engine.names import checkpoint_views
from actor.engine.rows import Rows
from actor.engine.sampling import sample
from actor.weights import bucket_tensors
from common.errors import EngineError, ModelError
from common.routing import REMEDY
from common.trace import Tracer, power_of_two, silent
from common.weights import Bucket

CONTEXT_BIN = 32  # tokens: contexts are tallied to so many
PREFILL_TOKENS = 8192  # padded prompt tokens of one pass: bounds its activations


class LocalEngine:
    """Samples from the Hugging Face directory ``model_dir``; see :class:`actor.engine.base.Engine`.

    ``max_sequences`` decode together, each of at most ``max_length`` tokens, prompt included.
    ``threads`` sets this process's torch threads; with ``record_experts`` completions say which
    experts read each token. Versions come without the tensors that ``frozen`` matches (``optim.freeze``);
    ``expert_bias`` gives the routers one (``loss.expert_bias_rate``).
    Raises ModelError if the directory cannot be used.
    """

    def __init__(
        self,
        model_dir: str | Path,
        max_sequences: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        record_experts: bool = False,
        frozen: Sequence[str] = (),
        expert_bias: bool = False,
        tracer: Tracer | None = None,
    ) -> None:
        self._tracer = tracer or silent()
        torch.set_num_threads(threads)
        self._model = load_model(Path(model_dir), max_length, dtype, expert_bias)
        self._frozen = tuple(frozen)
        self._recorder = _recorder(self._model, model_dir) if record_experts else None
        config = self._model.config
        self.vocab_size: int = config.vocab_size
        self._stop_ids = np.array(stop_ids(self._model), np.int64)
        self.eos_id = int(self._stop_ids[0]) if len(self._stop_ids) else -1
        self.version = 0
        self._loaded: Loaded | None = None
        self._max_length = max_length
        self._cache = SlotCache(
            layers=config.num_hidden_layers,
            slots=max_sequences,
            max_length=max_length,
            heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=dtype,
        )
        self._rows = Rows(max_sequences, max_length, self._recorder.width if self._recorder else 0)
        self._waiting: deque[SampleRequest] = deque()
        self._unwanted: set[tuple[int, int]] = set()  # cancelled before they had a row
        self._columns = torch.arange(max_length)
        self._targets = checkpoint_views(self._model)

    @property
    def holds(self) -> int:
        """The same."""
        return self.version

    @property
    def busy(self) -> bool:
        """Whether anything is waiting or live."""
        return bool(self._waiting) or self._rows.live > 0

    @property
    def in_flight(self) -> int:
        """Sequences waiting or live."""
        return self._rows.live + sum(request.samples for request in self._waiting)

    @property
    def slots(self) -> int:
        """Rows."""
        return self._rows.slots

    def add(self, request: SampleRequest) -> None:
        """Queue a request. Raises EngineError if it can never be sampled."""
        check_request(request, self.vocab_size, self._max_length, self._rows.slots)
        self._waiting.append(request)

    @torch.inference_mode()
    def step(self, wait_s: float = 0.0) -> list[Completion]:
        """Admit what fits, sample the next token of every live row, return what finished; never waits.

        Raises EngineError, naming the version and a request, on non-finite logits; call
        :meth:`abort` before going on.
        """
        decoding = self._rows.live
        began, cpu = self._tracer.now(), self._tracer.cpu()
        longest = int(self._rows.positions.max()) + 1 if decoding else 0
        logits = [self._decode()] if decoding else []
        batches = self._admit()
        read = self._read(batches, logits) if batches else (0, 0)
        if not logits:
            return []
        self._sample(logits[0] if len(logits) == 1 else torch.cat(logits))
        sampled, completions = self._rows.live, self._finish()
        took = self._tracer.now() - began - read[0], self._tracer.cpu() - cpu - read[1]
        self._tracer.tally("decode", decoding, *took, sampled)
        self._tracer.tally("context", longest // CONTEXT_BIN, *took, decoding * longest)
        self._tracer.tally("context_rows", longest // CONTEXT_BIN, 0, 0, decoding)
        return completions

    def cancel(self, request_id: int, sibling: int) -> None:
        """Forget one sibling; one that waits with others is sampled with its request and dropped when it ends."""
        row = self._rows.find(request_id, sibling)
        if row is not None:
            self._remove(np.array([row]))
            return
        for request in self._waiting:
            if request.request_id == request_id and 0 <= sibling - request.first_sibling < request.samples:
                if request.samples == 1:
                    self._waiting.remove(request)
                else:
                    self._unwanted.add((request_id, sibling))
                return

    def abort(self) -> None:
        """Forget everything in flight."""
        self._waiting.clear()
        self._unwanted.clear()
        self._rows.clear()
        self._cache.clear()

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(iter(self._targets.values())).device

    @property
    def counters(self) -> dict[str, float]:
        """None of its own."""
        return {}

    def load(self, version: int, buckets: Sequence[tuple[Bucket, Tensor]]) -> None:
        """Copy them into the model between two steps."""
        try:
            self.swap(version, dict(bucket_tensors(buckets)))
            self._loaded = Loaded(version)
        except EngineError as error:
            self._loaded = Loaded(version, str(error))

    def loaded(self) -> Loaded | None:
        """At once."""
        loaded, self._loaded = self._loaded, None
        return loaded

    def close(self) -> None:
        """Nothing to release."""

    def weight_targets(self) -> dict[str, Tensor]:
        """Checkpoint name -> view of the live parameter."""
        return dict(self._targets)

    @torch.no_grad()
    def swap(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy all weights but the frozen ones in place; the KV cache is kept.

        Raises EngineError, and changes nothing, if names or shapes are not those of the model.
        """
        own = {name: tuple(tensor.shape) for name, tensor in self._targets.items()}
        wrong = differing(own, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, self._frozen)
        if wrong:
            raise EngineError(f"version {version}: {wrong}")
        for name, tensor in tensors.items():
            self._targets[name].copy_(tensor)
        self.version = version

    # ---- one step ---------------------------------------------------------------------------------

    def _admit(self) -> list[list[SampleRequest]]:
        """Give rows to waiting requests in order; returns them in prefill batches."""
        batches: list[list[SampleRequest]] = []
        longest = 0
        while self._waiting and self._waiting[0].samples <= self._rows.free:
            request = self._waiting.popleft()
            longest = max(longest, len(request.prompt_ids))
            if not batches or longest * (len(batches[-1]) + 1) > PREFILL_TOKENS:
                batches.append([])
                longest = len(request.prompt_ids)
            batches[-1].append(request)
            self._rows.append(request)
        return batches

    def _read(self, batches: list[list[SampleRequest]], logits: list[Tensor]) -> tuple[int, int]:
        """Prefill, and add to ``logits``; the wall-clock and CPU time that it took, nanoseconds."""
        began, cpu = self._tracer.now(), self._tracer.cpu()
        logits += [self._prefill(requests) for requests in batches]
        took = self._tracer.now() - began, self._tracer.cpu() - cpu
        tokens = sum(len(request.prompt_ids) for requests in batches for request in requests)
        self._tracer.tally("prefill", power_of_two(tokens), *took, tokens)
        return took

    def _prefill(self, requests: list[SampleRequest]) -> Tensor:
        """Read each prompt once; returns the logits of its last token for every sibling, ``[n', V]``."""
        lengths = torch.tensor([len(request.prompt_ids) for request in requests])
        ids_UP = np.zeros((len(requests), int(lengths.max())), np.int64)
        for row, request in zip(ids_UP, requests, strict=True):
            row[: len(request.prompt_ids)] = request.prompt_ids
        samples = torch.tensor([request.samples for request in requests])
        sources = torch.arange(len(requests)).repeat_interleave(samples)
        first = self._rows.first_row(requests[0])
        self._cache.begin_prefill(first, sources)
        # Padding lies behind every real token, so the causal rule alone hides it: no mask.
        positions_1P = self._columns[None, : ids_UP.shape[1]]
        hidden_UPC = self._forward(torch.from_numpy(ids_UP), positions_1P, None)
        if self._recorder is not None:
            experts_UPR = self._recorder.latest().reshape(*ids_UP.shape, -1)
            self._rows.record_prompts(first, sources.numpy(), experts_UPR)
        last_UC = hidden_UPC[torch.arange(len(requests)), lengths - 1]
        return self._head(last_UC)[sources]

    def _decode(self) -> Tensor:
        """Read the newest token of every live row; returns the logits of the next, ``[n, V]``."""
        rows = self._rows
        positions_n = torch.from_numpy(rows.positions.astype(np.int64))
        shortest, longest = int(rows.positions.min()), int(rows.positions.max()) + 1
        mask = None
        if shortest + 1 < longest:
            hidden = self._columns[:longest] > positions_n[:, None]
            mask = torch.zeros(hidden.shape, dtype=self._model.dtype).masked_fill_(hidden, float("-inf"))[:, None, None]
        self._cache.begin_decode(positions_n, longest)
        ids_n1 = torch.from_numpy(rows.newest.astype(np.int64)).unsqueeze(1)
        hidden_nC = self._forward(ids_n1, positions_n.unsqueeze(1), mask)[:, 0]
        if self._recorder is not None:
            rows.record_experts(self._recorder.latest())
        return self._head(hidden_nC)

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states ``[rows, T, C]``: transformers' own layers, without the mask building around them."""
        decoder = self._model.model
        hidden: Tensor = decoder.embed_tokens(ids)
        rotary = decoder.rotary_emb(hidden, position_ids=positions)
        for layer in decoder.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                position_embeddings=rotary,
            )
        normed: Tensor = decoder.norm(hidden)
        return normed

    def _head(self, hidden_nC: Tensor) -> Tensor:
        logits: Tensor = self._model.lm_head(hidden_nC)
        return logits

    def _sample(self, logits_nV: Tensor) -> None:
        rows = self._rows
        finite = logits_nV.sum(-1).isfinite()  # a row with any inf or nan
        if not finite.all():
            bad = rows.request(int(finite.int().argmin()))
            raise EngineError(
                f"request {bad.request_id}: version {self.version} gives non-finite logits; "
                "the published weights are broken or dtype is too narrow"
            )
        temperatures, uniforms = torch.from_numpy(rows.temperatures.copy()), torch.from_numpy(rows.uniforms())
        sampled = sample(logits_nV, temperatures, uniforms)
        top: tuple[NDArray[np.float32], NDArray[np.int64]] | None = None
        if (k := rows.most_top_logprobs()) > 0:
            values, ids = sampled.logprobs_nV.topk(k, dim=-1)
            top = values.numpy(), ids.numpy()
        rows.record(sampled.ids.numpy(), sampled.logprobs.numpy(), self.version, top)

    def _finish(self) -> list[Completion]:
        """Take finished rows out."""
        done = self._rows.done(self._stop_ids)
        if not len(done):
            return []
        completions = [self._rows.completion(int(row), self._stop_ids) for row in done]
        self._remove(done)
        if self._unwanted:
            wanted = [c for c in completions if (c.request_id, c.sibling) not in self._unwanted]
            self._unwanted -= {(c.request_id, c.sibling) for c in completions}
            return wanted
        return completions

    def _remove(self, rows: NDArray[np.int64]) -> None:
        """Take rows (ascending) out and close the gaps they leave."""
        longest = int(self._rows.positions.max())
        sources, targets = self._rows.remove(rows)
        if len(sources):
            self._cache.move(torch.from_numpy(sources), torch.from_numpy(targets), longest)


def _recorder(model: Any, directory: str | Path) -> ExpertRecorder:
    recorder = ExpertRecorder(model)
    if recorder.width == 0:
        raise ModelError(f"rollout.routing_replay=true: {directory} has no experts to record; {REMEDY}")
    return recorder
