"""A server with SGLang's answers and faults on demand: what the real one does only when it is broken."""

import asyncio
import base64
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from aiohttp import web

from common.weights import store_prefix
from tests.app_thread import AppThread

VOCAB = 32
CUT = "cut"  # what a spoiled answer is where the connection breaks
GROUP_S = 10.0  # that a group may take to meet, and a bucket to come


class FakeServer:
    """``spoil`` maps a path to a function(request fields, answer) -> answer, web.Response or an awaitable of them."""

    def __init__(self, port=0, version="0.5.23", **info):
        self.info = {"version": version, "tp_size": 1, "dp_size": 1, **info}
        self.weight_version, self.paused, self.architectures = "default", 0, None
        self.spoil, self.calls, self.seconds = {}, [], 0.0
        self.groups, self.receives = {}, False  # name -> group of weights; whether it joins them and takes what comes
        self.random = np.random.default_rng(0)
        self._server = AppThread(self._answer, port)

    @property
    def port(self):
        return self._server.port

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def stop(self):
        """Refuse connections; another one may listen at this port."""
        self._server.stop()

    def close(self):
        self._server.close()

    async def _answer(self, request):
        path = request.path
        fields = await request.json() if request.method == "POST" else {}
        self.calls.append((path, fields))
        made = getattr(self, "on" + path.replace("/", "_"), lambda fields: {"success": True})(fields)
        answer = await made if asyncio.iscoroutine(made) else made
        if path in self.spoil:
            answer = self.spoil[path](fields, answer)
            answer = await answer if asyncio.iscoroutine(answer) else answer
        if answer == CUT:
            request.transport.close()
        return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)

    def on_server_info(self, fields):
        return self.info

    def on_model_info(self, fields):
        return {"weight_version": self.weight_version, "architectures": self.architectures}

    def on_v1_loads(self, fields):
        return {
            "loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0, "token_usage": 0.1, "queues": {"retracted": 0}}]
        }

    def on_update_weights_from_disk(self, fields):
        self.weight_version = fields["weight_version"]
        return {"success": True}

    async def on_init_weights_update_group(self, fields):
        self.groups[fields["group_name"]] = await asyncio.to_thread(_join, fields) if self.receives else None
        return {"success": True}

    def on_destroy_weights_update_group(self, fields):
        unknown = self._unless_unknown(fields)
        self.groups.pop(fields["group_name"], None)
        return unknown or {"success": True}

    async def on_update_weights_from_distributed(self, fields):
        if unknown := self._unless_unknown(fields):
            return unknown
        if self.receives:
            await asyncio.to_thread(_receive, self.groups[fields["group_name"]], fields)
        self.weight_version = fields["weight_version"] or self.weight_version
        return {"success": True}

    def _unless_unknown(self, fields):
        """HTTP 400 for a group that it is not in, as SGLang answers."""
        if fields["group_name"] in self.groups:
            return None
        return web.json_response({"success": False, "message": "The group does not exist."}, status=400)

    def on_weights_checker(self, fields):
        return {"per_engine_checksum": f"sum of {self.weight_version}"}

    async def on_generate(self, fields):
        await asyncio.sleep(self.seconds)
        prompts = fields["input_ids"]
        if isinstance(prompts[0], list):
            return [self._reply(prompt, fields) for prompt in prompts]
        return self._reply(prompts, fields)

    def _reply(self, prompt, fields):
        """Uniform over the vocabulary, and said so."""
        tokens, k = fields["sampling_params"]["max_new_tokens"], fields["top_logprobs_num"]
        ids = self.random.integers(0, VOCAB, tokens).tolist()
        value = float(np.float32(-np.log(VOCAB)))
        meta = {
            "finish_reason": {"type": "length", "length": tokens},
            "prompt_tokens": len(prompt),
            "completion_tokens": tokens,
            "cached_tokens": len(prompt) // 2,
            "weight_version": self.weight_version,
            "weight_versions": [{"version": self.weight_version, "start": 0, "end": tokens}],
            "output_token_logprobs": [[value, token, None] for token in ids],
        }
        if k and fields.get("return_flat_raw_output_top_logprobs"):
            values = np.full((tokens, k), value, np.float32)
            numbers = np.tile(np.arange(k, dtype=np.int32), (tokens, 1))
            meta |= {
                "output_top_logprobs_val_flat_b64": base64.b64encode(values.tobytes()).decode(),
                "output_top_logprobs_idx_flat_b64": base64.b64encode(numbers.tobytes()).decode(),
                "output_top_logprobs_val_flat_b64_dtype": "float32",
                "output_top_logprobs_idx_flat_b64_dtype": "int32",
                "output_top_logprobs_shape": [tokens, k],
            }
        elif k:
            meta["output_top_logprobs"] = [[[value, token, None] for token in range(k)] for _ in ids]
        return {"output_ids": ids, "meta_info": meta}


def _join(fields):
    """Rank ``rank_offset`` of a group, as torch's own helper finds it."""
    store = dist.TCPStore(fields["master_address"], fields["master_port"], timeout=timedelta(seconds=GROUP_S))
    prefixed = dist.PrefixStore(store_prefix(fields["group_name"], "cpu"), store)
    return dist.ProcessGroupGloo(prefixed, fields["rank_offset"], fields["world_size"], timedelta(seconds=GROUP_S))


def _receive(group, fields):
    """One bucket of float32."""
    assert set(fields["dtypes"]) == {"float32"}
    nbytes = 4 * sum(int(np.prod(shape)) for shape in fields["shapes"])
    group.broadcast([torch.empty(nbytes, dtype=torch.uint8)]).wait()
