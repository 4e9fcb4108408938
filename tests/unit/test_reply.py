"""Replies of /generate that no test server gives: recorded experts, and pieces put together."""

import base64
import json

import numpy as np
import pytest

from actor.engine.pieces import join_experts, until_end
from actor.engine.reply import Asked, Piece, read_piece
from common.errors import DataError
from common.wire import UNROUTED

PROMPT, TOKENS, LAYERS, PER_TOKEN = 3, 4, 5, 2
SPARSE = (1, 3, 4)


def body(experts=None, tokens=TOKENS, **meta):
    ids = list(range(tokens))
    fields = {
        "finish_reason": {"type": "length"}, "prompt_tokens": PROMPT, "completion_tokens": tokens,
        "weight_versions": [{"version": "v", "start": 0, "end": tokens}],
        "output_token_logprobs": [[-1.0, i, None] for i in ids], **meta,
    }  # fmt: skip
    if experts is not None:
        fields["routed_experts"] = base64.b64encode(experts.astype(np.int32).tobytes()).decode()
    return json.dumps({"output_ids": ids, "meta_info": fields}).encode()


def asked(**more):
    return Asked(PROMPT, TOKENS, 0, 16, SPARSE, PER_TOKEN, **more)


def record(rows=PROMPT + TOKENS - 1):
    return np.arange(rows * LAYERS * PER_TOKEN).reshape(rows, LAYERS, PER_TOKEN)


def test_experts_of_the_layers_that_have_some_in_their_order():
    piece = read_piece(body(record()), asked())
    assert piece.experts.shape == (PROMPT + TOKENS, len(SPARSE) * PER_TOKEN)
    for row in range(PROMPT + TOKENS - 1):
        wanted = [record()[row, layer, k] for layer in SPARSE for k in range(PER_TOKEN)]
        assert piece.experts[row].tolist() == wanted
    assert (piece.experts[-1] == UNROUTED).all()  # never read


def test_a_server_that_records_none_or_too_few_is_refused_with_the_remedy():
    with pytest.raises(DataError, match="--enable-return-routed-experts"):
        read_piece(body(), asked())
    with pytest.raises(DataError, match="not one of SGLang's"):
        read_piece(body(record(4)), asked())


def test_experts_of_two_pieces_are_those_of_the_first_reading():
    first, second = record(), 1000 + record(PROMPT + TOKENS + 1)
    one = read_piece(body(first), asked())
    rest = Asked(PROMPT + TOKENS, 2, 0, 16, SPARSE, PER_TOKEN)
    two = read_piece(body(second, 2, prompt_tokens=PROMPT + TOKENS), rest)
    joined = join_experts([one, two])
    assert joined.shape == (PROMPT + TOKENS + 2, 6)
    read = PROMPT + TOKENS - 1
    assert (joined[:read] == one.experts[:read]).all() and (joined[read:] == two.experts[read:]).all()
    assert (joined[-1] == UNROUTED).all() and (joined[:-1] != UNROUTED).all()


def test_an_abort_before_anything_ran_is_an_empty_piece():
    reply = {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort", "message": "x"}}}
    piece = read_piece(json.dumps(reply).encode(), asked())
    assert isinstance(piece, Piece) and piece.finish == "abort" and len(piece.token_ids) == 0
    assert piece.experts.shape == (PROMPT, 6)


@pytest.mark.parametrize(("end", "kept"), [(3, 4), (1, 2), (0, 1)])
def test_what_an_aborted_server_sampled_up_to_an_end_token_is_whole(end, kept):
    """The last of its tokens as a rule; with speculative decoding more may lie behind it."""
    spans = [{"version": "v", "start": 0, "end": 2}, {"version": "w", "start": 2, "end": TOKENS}]
    said = {"finish_reason": {"type": "abort"}, "weight_versions": spans}
    whole = read_piece(body(record(), **said), asked())
    piece = until_end(whole, [end, 9])
    assert piece.finish == "stop" and piece.token_ids.tolist() == list(range(kept)) and len(piece.logprobs) == kept
    assert piece.spans == ((("v", 0, 2), ("w", 2, 4)) if kept == 4 else (("v", 0, min(2, kept)),))
    assert (piece.experts[:-1] == whole.experts[: PROMPT + kept - 1]).all() and (piece.experts[-1] == UNROUTED).all()
    assert len(piece.experts) == PROMPT + kept and piece.topk_ids.shape == (kept, 0)


def test_only_what_was_aborted_is_looked_at_for_its_end():
    for reason, stops in (("abort", [9]), ("abort", []), ("length", [2]), ("stop", [2])):
        piece = read_piece(body(record(), finish_reason={"type": reason}), asked())
        assert until_end(piece, stops) is piece
