"""The tokenizer of a model directory."""

from typing import Any

from common.errors import TaskError


def load_tokenizer(model_dir: str, key: str = "model.path") -> Any:
    """As transformers loads it, from the directory alone. Raises TaskError, naming ``key``, if it cannot."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except Exception as error:  # transformers raises many unrelated types for a missing tokenizer
        raise TaskError(f"{key}={model_dir}: no tokenizer that transformers can load: {error}") from error
