"""torch.compile, layer by layer: each language layer and each encoder block is one graph.

All layers of a kind share one compiled form, so that it costs seconds; a graph of the whole model would cost minutes.
Shapes are dynamic where batches differ: tokens in the language model, images in the encoder.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch

from tinygptv.folder_fault import folder_fault
from tinygptv.model.head_loss import Scorer, score_logits
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

logger = logging.getLogger(__name__)

Compile = Literal["auto", "on", "off"]
"""``auto`` compiles on CUDA devices."""

CACHE_DIR = Path("~/.cache/tinygptv/torchinductor")
"""Compiled kernels are kept here from run to run, where ``TORCHINDUCTOR_CACHE_DIR`` names no other folder."""


def wants_compilation(setting: Compile, device: torch.device) -> bool:
    """Whether layers are compiled on this device."""
    return setting == "on" or (setting == "auto" and device.type == "cuda")


def compile_layers(
    model: TinyGPTVForConditionalGeneration, *, backend: str = "inductor", fullgraph: bool = False
) -> None:
    """Compile the layers of a model in place; compilation itself happens when each kind of layer first runs.

    Args:
        model: any; names of parameters and checkpoints stay as they are.
        backend: of ``torch.compile``.
        fullgraph: fail where a layer is not one graph.
    """
    keep_compiled_layers()
    # With dynamic=True, floats such as LoRA's scale would be inputs of the graph, each with kernels of its own.
    torch._dynamo.config.specialize_float = True
    for layer in model.language_model.layers:
        layer.compile(dynamic=True, backend=backend, fullgraph=fullgraph)
    for layer in model.vision_encoder.vit.blocks:
        layer.compile(backend=backend, fullgraph=fullgraph)


def keep_compiled_layers() -> None:
    """Have torch keep what it compiles in ``CACHE_DIR``, unless the environment names another folder."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = CACHE_DIR.expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
        except OSError as error:  # torch takes a temporary folder
            logger.warning("compiled layers cannot be kept in %s (%s)", folder, folder_fault(folder, error))


def compiled_scorer(backend: str = "inductor") -> Scorer:
    """``head_loss.score_logits``, compiled."""
    return torch.compile(score_logits, dynamic=True, backend=backend)


def run_eagerly() -> AbstractContextManager[None]:
    """Inside, compiled layers run as they are written: for hooks to see their parts, and for shapes not worth it."""
    return torch.compiler.set_stance("force_eager")
