"""Two directories that one run must not mix."""

import json
import shutil

import pytest

from common import wire
from common.errors import DataError, ProtocolError
from common.identity import differing_identity, model_identity
from common.link import connect
from tests.integration.harness import make_broker


def test_a_directory_equals_itself_and_unknown_things_differ_from_nothing(model, tmp_path):
    ours = model_identity(model)
    assert set(ours) == {"architecture", "shape", "vocabulary", "tokenizer"}
    assert differing_identity(ours, model_identity(model)) == differing_identity(ours, {}) == ""
    assert model_identity(tmp_path) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 17}, "vocabulary 17 where this run has 16"),
        ({"model_type": "llama"}, "architecture llama where this run has qwen3_moe"),
        ({"hidden_size": 128}, "shape hidden_size=128"),
        (None, "tokenizer "),
    ],
)
def test_what_differs_is_named(model, tmp_path, change, words):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    if change is None:
        (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    else:
        path = other / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert words in differing_identity(model_identity(model), model_identity(other))


def test_a_peer_with_another_model_is_turned_away(tmp_path):
    broker = make_broker(tmp_path)
    broker.service.door.identities.policy["vocabulary"] = "16"
    hello = wire.Hello("actor", "a", "", "s", 0, 1, 0, 1, "h", 1, {"vocabulary": "17"})
    link = connect(broker.config.broker, hello)
    try:
        with pytest.raises(ProtocolError, match="another model: vocabulary 17 where this run has 16"):
            link.wait_welcome(5)
    finally:
        link.close("over")
        broker.end()


def test_facts_are_few_and_short():
    def hello(model):
        return wire.Hello("actor", "a", "", "s", 0, 1, 0, 1, "h", 1, model)

    hello({"vocabulary": "16"}).check()
    for model in ({str(n): "x" for n in range(9)}, {"a": "x" * 600}, {"a": "\n"}):
        with pytest.raises(DataError, match="facts of a model"):
            hello(model).check()
