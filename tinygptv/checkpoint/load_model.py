"""The one strict loader of unquantized model folders: chat, serving, scoring, quantization and stages use it.

Before anything is built: config.json is read as an object of bounded sizes, weight files are what their names promise,
and every tensor that the configuration needs is there in its shape, and no other. Nothing is downloaded, and no code of
a folder runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tinygptv.checkpoint.config_file import read_config
from tinygptv.checkpoint.folders import QUANTIZATION_FILE, CheckpointError, check_weight_file, read_object
from tinygptv.checkpoint.weight_files import WeightFileError, open_weights
from tinygptv.config import TinyGPTVConfig
from tinygptv.data.processing import TinyGPTVProcessor
from tinygptv.model.meta import tensor_shapes
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration


def load_model(
    folder: Path, dtype: torch.dtype | str = "auto", **kwargs: Any
) -> tuple[TinyGPTVForConditionalGeneration, TinyGPTVProcessor]:
    """Load a folder that ``save_checkpoint`` or ``save_pretrained`` wrote.

    Args:
        folder: with config.json, weights in safetensors, tokenizer and processor.
        dtype: dtype of the matrices; ``auto`` keeps the stored one.
        kwargs: passed to ``from_pretrained`` (``attn_implementation``, ``device_map``, ...).

    Returns:
        Model (evaluation mode) and processor.

    Raises:
        CheckpointError: a file is missing, damaged or of another kind; a tensor is missing, unexpected or misshapen.
    """
    config = read_config(folder)
    if (folder / QUANTIZATION_FILE).is_file():
        raise CheckpointError(
            f"{folder} is a quantized artifact: it can be served and asked, but not trained, converted or quantized "
            "again; give the checkpoint that it was made from."
        )
    check_tensors(folder, config)
    try:
        loaded: Any = TinyGPTVForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **kwargs,
        )
        processor = load_processor(folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {str(error).strip() or type(error).__name__}") from error
    model, found = loaded
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    return model.eval(), processor


def load_processor(folder: Path) -> TinyGPTVProcessor:
    """The processor of a folder, without running code of it.

    Raises:
        CheckpointError: a file of the tokenizer or processor is missing or damaged.
    """
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            read_object(folder / name)
    try:
        return TinyGPTVProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises its own and bare exceptions on damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own (auto_map), which is never run"
        raise CheckpointError(f"the tokenizer or processor of {folder} cannot be loaded: {reason}.") from error


def check_tensors(folder: Path, config: TinyGPTVConfig) -> None:
    """Compare the tensors of a folder with those of its configuration, before any is read.

    Raises:
        CheckpointError: naming the file that is none, or the tensor that is missing, unexpected or misshapen.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no weights: it has no .safetensors file.")
    for file in files:
        check_weight_file(file)
    try:
        stored = {name: tensor.shape for name, tensor in open_weights(folder).items()}
    except WeightFileError as error:
        raise CheckpointError(str(error)) from error
    needed = parameter_shapes(config)
    missing, unexpected = sorted(needed.keys() - stored.keys()), sorted(stored.keys() - needed.keys())
    if missing:
        raise CheckpointError(f"{folder} lacks {_named(missing)}: the checkpoint is damaged or incomplete.")
    if unexpected:
        raise CheckpointError(f"{folder} holds {_named(unexpected)}, which its config.json does not have.")
    for name, shape in needed.items():
        if stored[name] != shape:
            raise CheckpointError(
                f"{name} in {folder} has the shape {list(stored[name])}, but its config.json needs {list(shape)}."
            )


def parameter_shapes(config: TinyGPTVConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model, which is built without memory.

    Raises:
        CheckpointError: the configuration contradicts itself.
    """
    try:
        return tensor_shapes(config)
    except Exception as error:  # whatever torch, timm and transformers raise on sizes that do not fit each other
        raise CheckpointError(f"config.json describes no model that can be built: {error}") from error


def _named(names: list[str]) -> str:
    return f"tensor {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
