"""config.json of a model folder, checked before a model is built from it."""

from __future__ import annotations

from pathlib import Path

from tinygptv.checkpoint.folders import CheckpointError, read_object
from tinygptv.config import ATTENTION_IMPLEMENTATIONS, TinyGPTVConfig
from tinygptv.json_object import JsonObject

_LARGEST = {
    "num_hidden_layers": 1_000,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "encoder_hidden_size": 1 << 16,
    "projector_hidden_size": 1 << 18,
    "vocab_size": 1 << 22,
    "num_attention_heads": 1 << 12,
    "image_size": 1 << 13,
    "max_position_embeddings": 1 << 22,
    "num_query_tokens": 1 << 13,
    "lora_rank": 1 << 13,
}
"""Largest values that config.json may ask for: a few times those of any model of this kind."""


def read_config(folder: Path) -> TinyGPTVConfig:
    """The configuration of a model folder, after checking its sizes.

    Raises:
        CheckpointError: there is none, it is damaged, of another model, or asks for what cannot be.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}: give a checkpoint folder of a stage, or an exported artifact.")
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds a peft adapter, which is not applied here: load it with peft, merge it "
            "(merge_and_unload), and save model and processor to a folder of their own (save_pretrained)."
        )
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no TinyGPT-V checkpoint: it has no config.json.")
    content = read_object(path)
    if content.get("model_type") != TinyGPTVConfig.model_type:
        raise CheckpointError(
            f"{folder} is no TinyGPT-V checkpoint: model_type in its config.json is {content.get('model_type')!r}, not "
            f"{TinyGPTVConfig.model_type!r}."
        )
    _check_values(path, content)
    try:
        return TinyGPTVConfig.from_dict(content)
    except Exception as error:  # transformers checks types with errors of its own
        raise CheckpointError(f"{path} is no usable configuration: {error}") from error


def _check_values(path: Path, content: JsonObject) -> None:
    for name, value in content.items():
        if isinstance(value, dict):
            _check_values(path, value)
        largest = _LARGEST.get(name)
        if largest is not None and not (isinstance(value, int) and 0 <= value <= largest):
            raise CheckpointError(f"{path} has {name}={value!r:.60}; it must be a whole number of at most {largest}.")
        if name in ("_attn_implementation", "attn_implementation") and value not in (None, *ATTENTION_IMPLEMENTATIONS):
            raise CheckpointError(
                f"{path} has {name}={value!r:.60}; choose one of {', '.join(ATTENTION_IMPLEMENTATIONS)}."
            )
