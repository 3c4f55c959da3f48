"""The miniature's shipped weights: pretrained backbones, and what each stage then trained on top of them.

    data/backbones/     config, tokenizer and all weights (float16), before any stage
    data/stage{1..4}/   what that stage's run trained (float16), a few hundred kilobytes each

A shipped stage becomes an ordinary checkpoint folder with ``write_checkpoint``.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from tinygptv.checkpoint.checkpoint import load_checkpoint, read_stage, save_checkpoint
from tinygptv.checkpoint.folders import hash_file, is_whole, verify_folder
from tinygptv.checkpoint.stage_record import StageRecord
from tinygptv.config import TinyGPTVConfig
from tinygptv.data.processing import TinyGPTVImageProcessor, TinyGPTVProcessor
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.training.stages import RECIPES, set_trainable

DATA = Path(__file__).parent / "data"
BACKBONES = DATA / "backbones"
_TRAINED = "trained.safetensors"


def assemble_backbones(
    folder: Path,
    config: TinyGPTVConfig,
    vision: nn.Module,
    language: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    metadata: StageRecord,
) -> Path:
    """Put pretrained parts together and write them as a checkpoint in float16.

    Args:
        folder: where to.
        config: sizes, without LoRA.
        vision: module with ``vision_encoder`` and ``qformer``.
        language: module with ``language_model`` and ``lm_head``.
        tokenizer: the miniature's tokenizer.
        metadata: how they were made, for ``stage.json``.
    """
    model = TinyGPTVForConditionalGeneration(config)
    for part in (vision, language):
        for name, module in part.named_children():
            if hasattr(model, name):
                getattr(model, name).load_state_dict(module.state_dict())
    model.half()
    return save_checkpoint(folder, model, TinyGPTVProcessor.from_config(config, tokenizer), metadata)


def shipped_stages() -> list[int]:
    """Numbers of the stages whose training is shipped."""
    return sorted(int(path.parent.name.removeprefix("stage")) for path in DATA.glob(f"stage*/{_TRAINED}"))


def write_checkpoint(folder: Path, stage: int = 0) -> Path:
    """Write a shipped stage as an ordinary float32 checkpoint folder.

    Args:
        folder: where to; an existing whole checkpoint there is kept as it is.
        stage: 0 for the backbones as pretrained, else the number of a shipped stage.

    Raises:
        ValueError: that stage is not shipped.
    """
    if is_whole(folder):
        return folder
    if stage and stage not in shipped_stages():
        raise ValueError(f"stage {stage} of the miniature is not shipped; shipped: {shipped_stages() or 'none'}.")
    model, processor, metadata = load_checkpoint(BACKBONES, dtype=torch.float32)
    if stage:
        spec = RECIPES["mini"][stage - 1]
        model.set_image_size(spec.image_size)
        if spec.lora_rank:
            model.add_lora(spec.lora_rank, spec.lora_alpha, spec.lora_dropout)
        shipped = DATA / f"stage{stage}"
        trained = {name: tensor.float() for name, tensor in load_file(shipped / _TRAINED).items()}
        unexpected = model.load_state_dict(trained, strict=False).unexpected_keys
        if unexpected:
            raise ValueError(f"{shipped} does not fit the shipped backbones: {unexpected[0]}.")
        metadata = json.loads((shipped / "stage.json").read_text())
        processor = TinyGPTVProcessor(
            TinyGPTVImageProcessor(spec.image_size),
            processor.tokenizer,
            num_query_tokens=model.config.num_query_tokens,
            image_token_id=model.config.image_token_id,
            template=spec.template,
        )
    return save_checkpoint(folder, model, processor, metadata)


def shipped_model() -> Path:
    """The shipped model after its last stage, as an ordinary checkpoint folder in the user's cache folder.

    Raises:
        ValueError: the shipped weights are missing.
    """
    stages = shipped_stages()
    if not stages:
        raise ValueError(
            f"the shipped weights ({DATA}) are missing from this installation or upload: check .rayignore, or name a "
            "checkpoint or artifact folder."
        )
    parts = (DATA / f"stage{stages[-1]}" / _TRAINED, BACKBONES / "manifest.json")
    version = "-".join(hash_file(part)[:8] for part in parts)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return write_checkpoint(cache / "tinygptv" / f"miniature-{version}", stages[-1])


def ship_backbones(checkpoint: Path) -> Path:
    """Keep a checkpoint of pretrained backbones as package data.

    Returns:
        The folder in the package.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
    """
    verify_folder(checkpoint)
    shutil.rmtree(BACKBONES, ignore_errors=True)
    shutil.copytree(checkpoint, BACKBONES)
    return BACKBONES


def ship_stage(checkpoint: Path, stage: int) -> Path:
    """Keep what a stage trained as package data.

    Args:
        checkpoint: the stage's checkpoint folder.
        stage: its number.

    Returns:
        The folder in the package.
    """
    model, _, metadata = load_checkpoint(checkpoint)
    set_trainable(model, RECIPES["mini"][stage - 1].trainable)
    trained = {name: p.detach().half().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    folder = DATA / f"stage{stage}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(trained, folder / _TRAINED)
    shareable = {key: value for key, value in {**metadata, **read_stage(checkpoint)}.items() if key != "init_from"}
    (folder / "stage.json").write_text(json.dumps(shareable, indent=1))
    return folder
