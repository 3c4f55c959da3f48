"""Load what answers questions: any checkpoint or artifact folder -> model and processor, ready for inference."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinygptv.data.processing import TinyGPTVProcessor
    from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

logger = logging.getLogger(__name__)


def load_for_inference(
    path: str | Path, device: str = "cpu"
) -> tuple[TinyGPTVForConditionalGeneration, TinyGPTVProcessor]:
    """Load an artifact or a checkpoint, strictly (``checkpoint.load_model``); LoRA adapters of a checkpoint are merged.

    A folder that ``save_pretrained`` wrote has no manifest; its hashes cannot be compared, all else is checked.

    Args:
        path: checkpoint or artifact folder, or ``hf://org/name`` of the hub.
        device: where the model is put, e.g. ``cuda``.

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        CheckpointError: the folder is missing, is no TinyGPT-V checkpoint, or is damaged.
    """
    import torch
    from torch import nn

    from tinygptv.checkpoint.config_file import read_config
    from tinygptv.checkpoint.folders import MANIFEST, verify_folder
    from tinygptv.checkpoint.load_model import load_model
    from tinygptv.hub import local_folder
    from tinygptv.quantization.artifact import compute_dtype, is_artifact, load_artifact

    folder = local_folder(path)
    read_config(folder)
    if is_artifact(folder):
        return load_artifact(folder, device)[:2]
    if (folder / MANIFEST).is_file():
        verify_folder(folder)
    else:
        logger.warning("%s has no %s: the hashes of its files are not checked.", folder, MANIFEST)
    model, processor = load_model(folder, compute_dtype(torch.device(device)))
    model.requires_grad_(False)
    if model.config.lora_rank:
        model.merge_lora()
    nn.Module.to(model, device)
    return model, processor
