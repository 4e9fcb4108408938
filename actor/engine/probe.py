"""What a server must be before it is believed: a version we know, our model, and log-probabilities that are q.

algorithms.md 0.2 says which settings make the returned value something else than log q; T24 is the
test. Flags are refused by name where the server tells them; what it does not tell is measured.
"""

import logging
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from actor.engine.client import Client, ServerLostError, ServerRefusedError
from actor.engine.reply import Asked, read_piece
from common.errors import DataError, EngineError

OLDEST, NEWEST = (0, 5, 19), (0, 5, 23)  # releases whose answers were looked at
FLAT_SINCE = (0, 5, 23)
RETRACT_SINCE = (0, 5, 21)  # before, taking a live request back and flushing the cache kills the scheduler
DRAWS = 512  # tokens sampled to compare frequencies with the returned log-probabilities
BINS = 7  # likeliest ids that are counted apart; the rest is one more bin
CHI2_BOUND = 46.0  # with 7 degrees of freedom exceeded once in 1e7 starts
SCALED = 1e-2  # largest error of log-probability differences under temperature
PROBE_S = 120.0  # a first request may compile

log = logging.getLogger("actor.engine")


@dataclass(frozen=True)
class Identity:
    """What the server says of itself."""

    version: tuple[int, ...]
    ranks: int  # of tensor parallelism (and pipeline), each a member of a weights group
    data_parallel: int  # ranks of data-parallel attention, each with a cache of its own
    flat_top: bool  # alternatives as flat arrays


def sampling(temperature: float, max_tokens: int, stop_ids: list[int], ignore_eos: bool) -> dict[str, Any]:
    """The only sampling parameters under which the returned value is log q (algorithms.md 0.2)."""
    return {
        "temperature": temperature,
        "max_new_tokens": max_tokens,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": [] if ignore_eos else stop_ids,
        "ignore_eos": ignore_eos,
        "skip_special_tokens": False,
    }


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def read_identity(info: dict[str, Any], name: str, update: str) -> Identity:
    """From /server_info. Raises EngineError that names the setting that must change."""
    text = str(info.get("version", ""))
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise EngineError(f"{name} says it is version {text!r}: not an SGLang server")
    version = tuple(map(int, match.groups()))
    known = f"{_dotted(OLDEST)} to {_dotted(NEWEST)}"
    if version < OLDEST or version[:2] > NEWEST[:2]:
        raise EngineError(f"{name} runs SGLang {text}; {known} are supported")
    if version > NEWEST:
        log.warning("%s runs SGLang %s; %s were tested", name, text, known)
    if update == "retract" and version < RETRACT_SINCE:
        raise EngineError(
            f"{name} runs SGLang {text}, which engine.update=retract kills; set engine.update=abort or in_place, "
            f"or install {_dotted(RETRACT_SINCE)} or later"
        )
    for key, harmless in (
        ("preferred_sampling_params", (None, "", "{}")),
        ("speculative_accept_threshold_single", (None, 1.0)),
        ("speculative_accept_threshold_acc", (None, 1.0)),
    ):
        if info.get(key) not in harmless:
            flag = key.replace("_", "-")
            raise EngineError(
                f"{name} was started with --{flag}={info[key]!r}, under which its log-probabilities "
                "are not those that it samples from (algorithms.md 0.2); start it without"
            )
    attention = int(info.get("attn_dp_size") or 1)  # since 0.5.23; before, a flag beside dp_size
    data_parallel = max(int(info.get("dp_size") or 1), attention)
    if data_parallel > 1 and attention == 1 and not info.get("enable_dp_attention"):
        raise EngineError(
            f"{name} has dp_size={data_parallel} replicas, which SGLang cannot update by broadcast; start several "
            "servers instead (engine.launch), or use data-parallel attention"
        )
    ranks = int(info.get("tp_size") or 1) * int(info.get("pp_size") or 1)
    return Identity(version, ranks, data_parallel, version >= FLAT_SINCE)


async def identify(client: Client, update: str) -> Identity:
    """Ask a server who it is."""
    return read_identity(await client.call("/server_info", None, PROBE_S), client.name, update)


async def check_density(client: Client, vocab_size: int, temperature: float) -> None:
    """T24 on a live server: what it returns must be the density that it samples from.

    Raises EngineError that says which rule is broken. The prompt is the middle of the vocabulary.
    """
    prompt = [vocab_size // 2, vocab_size // 3]
    k = min(BINS, vocab_size)

    async def ask(temperature: float, draws: int) -> list[dict[str, Any]]:
        fields = {
            "input_ids": [prompt] * draws,
            "sampling_params": sampling(temperature, 1, [], True),
            "return_logprob": True,
            "top_logprobs_num": k,
        }
        try:
            answer = orjson.loads(await client.send("/generate", orjson.dumps(fields), PROBE_S))
        except ServerRefusedError as error:
            kind = ServerLostError if error.passing else EngineError
            raise kind(f"{client.name} refused the probe of its log-probabilities: {error}") from error
        return list(answer)

    drawn = await ask(temperature, DRAWS)
    asked = Asked(len(prompt), 1, k, vocab_size)
    try:
        pieces = [read_piece(orjson.dumps(reply), asked) for reply in drawn]
    except DataError as error:
        raise EngineError(f"{client.name}: {error}") from error
    first = pieces[0]
    check_frequencies(
        client.name, np.array([piece.token_ids[0] for piece in pieces]), first.topk_ids[0], first.topk_logprobs[0]
    )
    if temperature != 1.0:
        plain = read_piece(orjson.dumps((await ask(1.0, 1))[0]), asked)
        check_scale(client.name, first, plain, temperature)


def check_frequencies(
    name: str, drawn: NDArray[Any], top_ids: NDArray[np.int32], top_logprobs: NDArray[np.float32]
) -> None:
    """Chi-square of sampled ids against ``exp(log q)`` of the likeliest ones and the rest."""
    expected = np.exp(top_logprobs.astype(np.float64))
    counted = np.array([(drawn == token).sum() for token in top_ids], np.float64)
    rest = max(0.0, 1.0 - float(expected.sum()))
    observed = np.append(counted, len(drawn) - counted.sum())
    wanted = np.append(expected, rest) * len(drawn)
    if rest * len(drawn) < 1e-3 and observed[-1] > 0:
        raise EngineError(f"{name} samples ids to which it gives no probability: not log q (algorithms.md 0.2)")
    kept = wanted > 1.0
    chi2 = float(((observed - wanted)[kept] ** 2 / wanted[kept]).sum())
    if chi2 > CHI2_BOUND:
        raise EngineError(
            f"{name} does not sample from the log-probabilities that it returns (chi-square {chi2:.0f} of "
            f"{len(drawn)} tokens): something truncates or reshapes its distribution (algorithms.md 0.2)"
        )


def check_scale(name: str, hot: Any, plain: Any, temperature: float) -> None:
    """Log-probabilities under a temperature must be log-softmax(logits / T)."""
    ids = [int(token) for token in hot.topk_ids[0] if token in plain.topk_ids[0]]
    if len(ids) < 2:
        return

    def gap(piece: Any) -> float:
        at = {int(token): float(value) for token, value in zip(piece.topk_ids[0], piece.topk_logprobs[0], strict=True)}
        return at[ids[0]] - at[ids[-1]]

    if not math.isclose(gap(hot), gap(plain) / temperature, abs_tol=SCALED, rel_tol=SCALED):
        raise EngineError(
            f"{name} returns log-probabilities without the temperature ({temperature:g}): unset "
            "SGLANG_RETURN_ORIGINAL_LOGPROB in its environment, or set rollout.temperature=1"
        )
