from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from actor.tasks.base import make_task
from actor.tasks.gym import GymTask
from actor.tasks.sort6 import ALPHABET, EOS, PAD, Sort6, decode, encode, write_tokenizer
from common.errors import TaskError


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer, so that any question survives the way there and back."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)} | {"<end>": len(letters)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    directory = tmp_path_factory.mktemp("text")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    return directory


def test_sort6_prompts_and_answers() -> None:
    item = Sort6(0, {}).prompt(3, "train")
    text = decode(item.prompt_ids)
    assert len(text) == 7 and text[:6].isdigit() and text[6] == ">"
    assert item.reference == "".join(sorted(text[:6])) + "$"
    assert item.prompt_ids.dtype == np.int32


def test_sort6_rewards_the_exact_answer_with_its_end() -> None:
    task = Sort6(0, {})
    item = task.prompt(0, "train")
    right = encode(item.reference)
    assert task.reward(item, right) == {"correct": 1.0, "prefix": 1.0}
    assert task.reward(item, right[:-1]) == {"correct": 0.0, "prefix": 6 / 7}
    assert task.reward(item, right[::-1].copy()) == {"correct": 0.0, "prefix": 0.0}
    assert task.reward(item, np.append(right, right[-1]))["correct"] == 0.0


def test_sort6_is_deterministic_and_its_splits_are_disjoint_across_seeds() -> None:
    texts = {
        (seed, split): [decode(make_task("sort6", "", seed, {}).prompt(i, split).prompt_ids) for i in range(400)]
        for seed in (0, 1)
        for split in ("train", "heldout")
    }
    assert texts[0, "train"] == [decode(Sort6(0, {}).prompt(i, "train").prompt_ids) for i in range(400)]
    assert texts[0, "train"] != texts[1, "train"]
    trained, held_out = ({t for seed in (0, 1) for t in texts[seed, split]} for split in ("train", "heldout"))
    assert not trained & held_out
    assert len(trained) > 790


def test_sort6_codec_agrees_with_its_tokenizer(tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    text = "582013>012358$"
    assert tokenizer(text)["input_ids"] == encode(text).tolist()
    assert tokenizer.decode(encode(text).tolist()) == text == decode(encode(text))
    assert len(tokenizer) == len(ALPHABET) == 16
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, PAD)


def test_tokenizer_bytes_are_deterministic(tokenizer_dir: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (tokenizer_dir / file.name).read_bytes()


def test_unknown_tasks_suggest_the_nearest() -> None:
    with pytest.raises(TaskError, match="did you mean 'sort6'"):
        make_task("sort7", "", 0, {})
    with pytest.raises(TaskError, match="did you mean chain_sum"):
        make_task("gym:chain_sums", "", 0, {})
    with pytest.raises(TaskError, match=r"params\.digits: sort6 has no such parameter"):
        make_task("sort6", "", 0, {"digits": 8})


def test_gym_prompts_decode_to_the_question_and_the_answer_scores(text_dir: Path) -> None:
    task = make_task("gym:chain_sum", str(text_dir), 0, {"max_terms": 2})
    assert isinstance(task, GymTask)
    tokenizer = AutoTokenizer.from_pretrained(text_dir)
    item = task.prompt(5, "train")
    assert tokenizer.decode(item.prompt_ids.tolist()) == item.reference["question"]
    assert np.array_equal(item.prompt_ids, task.prompt(5, "train").prompt_ids)
    right = np.array(tokenizer(item.reference["answer"] + "<end>")["input_ids"], np.int32)
    assert task.reward(item, right) == {"correct": 1.0, "score": 1.0}
    wrong = np.array(tokenizer("nonsense")["input_ids"], np.int32)
    assert task.reward(item, wrong)["correct"] == 0.0


def test_gym_uses_the_chat_template(text_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_dir)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}>"
    tokenizer.save_pretrained(tmp_path)
    item = make_task("gym:chain_sum", str(tmp_path), 0, {}).prompt(0, "heldout")
    assert tokenizer.decode(item.prompt_ids.tolist()) == f"[{item.reference['question']}]>"


def test_gym_never_trains_on_a_held_out_question(text_dir: Path) -> None:
    params = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    task = make_task("gym:chain_sum", str(text_dir), 0, params)
    held_out = {task.prompt(i, "heldout").reference["question"] for i in range(512)}
    trained = [task.prompt(i, "train").reference["question"] for i in range(300)]
    assert not held_out & set(trained)


def test_gym_refuses_a_data_set_whose_questions_are_all_held_out(text_dir: Path) -> None:
    task = make_task("gym:prime_factorization", str(text_dir), 0, {"min_value": 2, "max_value": 30})
    with pytest.raises(TaskError, match="also held out"):
        for index in range(50):
            task.prompt(index, "train")


def test_gym_refusals_are_clear(text_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="held-out question 512"):
        make_task("gym:chain_sum", str(text_dir), 0, {}).prompt(512, "heldout")
    with pytest.raises(TaskError, match=r"task\.params\.heldout='all'"):
        make_task("gym:chain_sum", str(text_dir), 0, {"heldout": "all"})
    with pytest.raises(TaskError, match=r"task\.params for gym:chain_sum"):
        make_task("gym:chain_sum", str(text_dir), 0, {"max_termz": 2})
    with pytest.raises(TaskError, match="no tokenizer"):
        make_task("gym:chain_sum", str(tmp_path), 0, {})
