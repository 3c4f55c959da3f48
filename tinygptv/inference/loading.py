"""Load what answers questions: any checkpoint or artifact folder -> model and processor, ready for inference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinygptv.data.processing import TinyGPTVProcessor
    from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration


def load_for_inference(
    path: str | Path, device: str = "cpu"
) -> tuple[TinyGPTVForConditionalGeneration, TinyGPTVProcessor]:
    """Load an artifact, or a folder that ``save_pretrained`` wrote; the LoRA adapters of the latter are merged.

    Args:
        path: checkpoint or artifact folder.
        device: where the model is put, e.g. ``cuda``.

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        ValueError: the folder is missing, is no TinyGPT-V checkpoint, or does not load.
    """
    import torch
    from torch import nn

    from tinygptv.data.processing import TinyGPTVProcessor
    from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
    from tinygptv.quantization.artifact import compute_dtype, is_artifact, load_artifact

    folder = Path(path)
    config = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(
            f"artifact {path} does not exist: give a checkpoint folder of a stage, or an exported artifact."
        )
    if not config.is_file() or json.loads(config.read_text()).get("model_type") != "tinygptv":
        raise ValueError(f"{path} is no TinyGPT-V checkpoint: it needs a config.json whose model_type is 'tinygptv'.")
    if is_artifact(folder):
        return load_artifact(folder, device)[:2]
    try:
        model = TinyGPTVForConditionalGeneration.from_pretrained(
            str(folder), local_files_only=True, dtype=compute_dtype(torch.device(device))
        )
        processor = TinyGPTVProcessor.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    model.eval().requires_grad_(False)
    if model.config.lora_rank:
        model.merge_lora()
    nn.Module.to(model, device)
    return model, processor
