"""The embedded engine: continuous batching on a transformers model in this process.

::

    add -> [waiting] -> admit: one prefill of the unique prompts, KV copied to the siblings
                     -> decode: one token for every live row -> finished rows leave, others close ranks

Noise is a function of (seed, request, sibling, position), so what is sampled does not depend on
who else is in the batch. Legend: n live rows, V vocabulary, k alternatives.
"""

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actor.engine.base import Completion, SampleRequest
from actor.engine.experts import use_sorted_experts
from actor.engine.kvcache import SlotCache
from actor.engine.names import weight_views
from common.errors import EngineError, ModelError
from common.philox import uniforms

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def load_model(model_dir: str, dtype: torch.dtype) -> Any:
    """A transformers causal language model from local files only."""
    path = Path(model_dir)
    if not (path / "config.json").is_file() or not any((path / name).is_file() for name in WEIGHT_FILES):
        raise ModelError(
            f"model.path={model_dir}: needs config.json and one of {', '.join(WEIGHT_FILES)}; make the quick-start "
            "model with `python -m tools.warmstart RUN.yaml` or copy the whole Hugging Face directory"
        )
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, local_files_only=True, attn_implementation="sdpa"
        )
    except Exception as error:  # transformers and safetensors raise many unrelated types for damaged files
        raise ModelError(f"model.path={model_dir}: transformers cannot load it: {error}") from error
    return model.eval().requires_grad_(False)


class LocalEngine:
    """See :class:`actor.engine.base.Engine`."""

    def __init__(
        self, model_dir: str, max_sequences: int, max_length: int, dtype: torch.dtype = torch.float32, threads: int = 1
    ) -> None:
        torch.set_num_threads(threads)
        self._model = load_model(model_dir, dtype)
        use_sorted_experts(self._model)
        self._views = weight_views(self._model)
        config = self._model.config
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        self._cache = SlotCache(config.num_hidden_layers, max_sequences, kv_heads, max_length, width, dtype)
        self._slots, self._max_length = max_sequences, max_length
        eos = config.eos_token_id
        self._eos = np.array([] if eos is None else np.atleast_1d(eos), np.int64)
        self._vocab_size = int(config.vocab_size)
        self._version = 0
        self._waiting: deque[SampleRequest] = deque()
        self._rows: list[tuple[SampleRequest, int]] = []  # live rows: request and sibling
        self._lengths = np.zeros(max_sequences, np.int64)  # tokens in the cache
        self._counts = np.zeros(max_sequences, np.int64)  # tokens sampled
        self._limits = np.zeros(max_sequences, np.int64)
        self._keys = np.zeros((max_sequences, 3), np.int64)  # sibling, request id low and high words
        self._tokens = np.zeros((max_sequences, max_length), np.int32)
        self._logprobs = np.zeros((max_sequences, max_length), np.float32)
        self._versions = np.zeros((max_sequences, max_length), np.int32)
        self._topk: list[list[tuple[Any, Any]]] = []  # per live row, per token: ids and log q

    @property
    def version(self) -> int:
        """The weights in use."""
        return self._version

    @property
    def busy(self) -> bool:
        """Whether anything waits or is in flight."""
        return bool(self._rows or self._waiting)

    @property
    def in_flight(self) -> int:
        """Live rows."""
        return len(self._rows)

    @property
    def vocab_size(self) -> int:
        """Ids lie in ``[0, vocab_size)``."""
        return self._vocab_size

    def weight_targets(self) -> Mapping[str, Tensor]:
        """Checkpoint name -> view of the live parameter."""
        return self._views

    @torch.no_grad()
    def swap(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy new weights in; the KV cache is kept, so only the logged log q is q afterwards.

        Raises :class:`EngineError`, with nothing changed, unless the names and shapes are ours.
        """
        odd = sorted(set(tensors) ^ set(self._views))
        if odd:
            raise EngineError(f"version {version}: tensor {odd[0]} (and {len(odd) - 1} more) is missing or unknown")
        for name, tensor in tensors.items():
            if tensor.shape != self._views[name].shape:
                raise EngineError(f"version {version}: {name} is {list(tensor.shape)}, ours {list(self._views[name].shape)}")
        for name, tensor in tensors.items():
            self._views[name].copy_(tensor)
        self._version = version

    def add(self, request: SampleRequest) -> None:
        """Queue a request."""
        prompt = request.prompt_ids
        who = f"request {request.request_id}"
        if len(prompt) == 0:
            raise EngineError(f"{who}: the prompt is empty")
        if prompt.min() < 0 or prompt.max() >= self._vocab_size:
            raise EngineError(f"{who}: a prompt id lies outside the vocabulary of {self._vocab_size}")
        if len(prompt) + request.max_tokens > self._max_length:
            raise EngineError(
                f"{who}: {len(prompt)} prompt and {request.max_tokens} completion tokens exceed {self._max_length}"
            )
        if request.samples > self._slots:
            raise EngineError(f"{who}: {request.samples} siblings, but actor.max_sequences={self._slots}")
        if not 0 <= request.top_logprobs <= self._vocab_size:
            raise EngineError(f"{who}: top_logprobs={request.top_logprobs} exceeds the vocabulary of {self._vocab_size}")
        self._waiting.append(request)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Admit what fits, decode one token for every live row, return what finished."""
        finished = self._admit()
        if self._rows:
            finished += self._decode()
        return finished

    # ---- admission ------------------------------------------------------------------------------

    def _admit(self) -> list[Completion]:
        """Prefill waiting requests while slots are free and sample their first token."""
        requests: list[SampleRequest] = []
        free = self._slots - len(self._rows)
        while self._waiting and self._waiting[0].samples <= free:
            requests.append(self._waiting.popleft())
            free -= requests[-1].samples
        if not requests:
            return []
        first = len(self._rows)
        prompt_of = np.repeat(np.arange(len(requests)), [r.samples for r in requests])
        lengths = np.array([len(r.prompt_ids) for r in requests], np.int64)
        for index, request in enumerate(requests):
            self._enter(request, int(lengths[index]))
        slots = torch.arange(first, len(self._rows))
        self._cache.begin_prefill(slots, torch.from_numpy(prompt_of))
        logits_RV = self._prefill(requests, lengths)
        self._sample(first, logits_RV[torch.from_numpy(prompt_of)])
        return self._retire()

    def _enter(self, request: SampleRequest, length: int) -> None:
        first, last = len(self._rows), len(self._rows) + request.samples
        self._lengths[first:last] = length
        self._counts[first:last] = 0
        self._limits[first:last] = request.max_tokens
        self._keys[first:last, 0] = np.arange(request.samples)
        self._keys[first:last, 1] = request.request_id & 0xFFFFFFFF
        self._keys[first:last, 2] = request.request_id >> 32
        self._rows += [(request, sibling) for sibling in range(request.samples)]
        self._topk += [[] for _ in range(request.samples)]

    def _prefill(self, requests: list[SampleRequest], lengths: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        """Logits ``[R, V]`` after each prompt; prompts are padded on the right, which causal attention never sees."""
        ids = np.zeros((len(requests), int(lengths.max())), np.int64)
        for row, request in enumerate(requests):
            ids[row, : len(request.prompt_ids)] = request.prompt_ids
        positions = torch.arange(ids.shape[1])[None]
        hidden = self._forward(torch.from_numpy(ids), positions, None)
        last = hidden[torch.arange(len(requests)), torch.from_numpy(lengths - 1)]
        logits: Tensor = self._model.lm_head(last)
        return logits

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        base = self._model.model
        hidden = base.embed_tokens(ids)
        rotary = base.rotary_emb(hidden, positions)
        for layer in base.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                position_embeddings=rotary,
            )
        normed: Tensor = base.norm(hidden)
        return normed

    # ---- decoding -------------------------------------------------------------------------------

    def _decode(self) -> list[Completion]:
        n = len(self._rows)
        last_tokens = self._tokens[np.arange(n), self._counts[:n] - 1]
        positions = self._lengths[:n]
        longest = int(positions.max()) + 1
        uniform = int(positions.min()) + 1 == longest
        at = torch.from_numpy(positions.copy())
        self._cache.begin_decode(at, longest, uniform)
        mask = None if uniform else (torch.arange(longest)[None, :] <= at[:, None])[:, None, None, :]
        hidden = self._forward(torch.from_numpy(last_tokens.astype(np.int64))[:, None], at[:, None], mask)
        self._lengths[:n] += 1
        self._sample(0, self._model.lm_head(hidden[:, -1]))
        return self._retire()

    def _sample(self, first: int, logits: Tensor) -> None:
        """One token for rows ``first:``, from ``logits[rows, V]``, with its log q and version."""
        rows = slice(first, first + len(logits))
        requests = [request for request, _ in self._rows[rows]]
        temperatures = torch.tensor([r.temperature for r in requests], dtype=torch.float64)
        greedy = temperatures == 0
        scaled = logits.double() / torch.where(greedy, 1.0, temperatures)[:, None]
        log_q = scaled.log_softmax(dim=-1)
        if not torch.isfinite(log_q.amax(dim=-1)).all():
            bad = int((~torch.isfinite(log_q.amax(dim=-1))).nonzero()[0])
            raise EngineError(f"version {self._version}: logits of request {requests[bad].request_id} are not finite")
        tokens = inverse_cdf(log_q, torch.from_numpy(self._noise(rows, requests)))
        if bool(greedy.any()):
            tokens = torch.where(greedy, logits.argmax(dim=-1), tokens)
        index = np.arange(rows.start, rows.stop)
        at = self._counts[rows]
        self._tokens[index, at] = tokens.numpy()
        self._logprobs[index, at] = log_q.gather(1, tokens[:, None]).squeeze(1).float().numpy()
        self._versions[index, at] = self._version
        k = max(r.top_logprobs for r in requests)
        if k:
            values, ids = log_q.topk(k, dim=-1)
            for row, (request, value, top) in enumerate(zip(requests, values.float().numpy(), ids.numpy(), strict=True)):
                self._topk[rows.start + row].append((top[: request.top_logprobs], value[: request.top_logprobs]))
        self._counts[rows] += 1

    def _noise(self, rows: slice, requests: list[SampleRequest]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Uniform noise of each row's next token."""
        keys = [r.noise_key for r in requests]
        sibling, low, high = self._keys[rows].T
        position = self._counts[rows]
        if len(set(keys)) == 1:
            return uniforms(*keys[0], position, sibling, low, high)
        noise = np.empty(len(requests))
        for key in set(keys):
            members = np.array([k == key for k in keys])
            noise[members] = uniforms(*key, position[members], sibling[members], low[members], high[members])
        return noise

    # ---- leaving --------------------------------------------------------------------------------

    def _retire(self) -> list[Completion]:
        """Take finished rows out and close the ranks, so that live rows stay at the front."""
        n = len(self._rows)
        last = self._tokens[np.arange(n), self._counts[:n] - 1]
        listens = np.array([not request.ignore_eos for request, _ in self._rows])
        stopped = np.isin(last, self._eos) & listens
        done = stopped | (self._counts[:n] >= self._limits[:n])
        if not done.any():
            return []
        completions = [self._completion(row, bool(stopped[row])) for row in np.flatnonzero(done)]
        live = n - int(done.sum())
        holes = np.flatnonzero(done[:live])
        movers = live + np.flatnonzero(~done[live:])
        if len(holes):
            longest = int(self._lengths[movers].max())
            self._cache.move(torch.from_numpy(movers), torch.from_numpy(holes), longest)
            for array in (
                self._lengths, self._counts, self._limits, self._keys, self._tokens, self._logprobs, self._versions,
            ):  # fmt: skip
                array[holes] = array[movers]
            for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
                self._rows[hole], self._topk[hole] = self._rows[mover], self._topk[mover]
        del self._rows[live:], self._topk[live:]
        return completions

    def _completion(self, row: int, stopped: bool) -> Completion:
        request, sibling = self._rows[row]
        count, k = int(self._counts[row]), request.top_logprobs
        topk = self._topk[row]
        return Completion(
            request_id=request.request_id,
            sibling=sibling,
            token_ids=self._tokens[row, :count].copy(),
            logprobs=self._logprobs[row, :count].copy(),
            versions=self._versions[row, :count].copy(),
            topk_ids=np.stack([t[0] for t in topk]).astype(np.int32) if k else np.zeros((count, 0), np.int32),
            topk_logprobs=np.stack([t[1] for t in topk]) if k else np.zeros((count, 0), np.float32),
            finish_reason="stop" if stopped else "length",
        )


def inverse_cdf(log_q: Tensor, noise: Tensor) -> Tensor:
    """Token ids ``[n]``: the first id at which the cumulated probability of ``log_q[n, V]`` reaches the noise.

    An id without probability is never chosen: its cumulated mass equals its predecessor's.
    """
    mass = log_q.exp().cumsum(dim=-1)
    chosen = torch.searchsorted(mass, (noise * mass[:, -1])[:, None]).squeeze(1)
    return chosen.clamp_max_(log_q.shape[1] - 1)
