"""Memory plan: will this stage, batch and precision fit this GPU? Counted from the configuration; no GPU is touched.

Parameters are counted on the meta device. What autograd keeps for the backward pass is a sum over the operations of
``language_model``, in bytes per token; ``tests/unit/training/test_memory_plan.py`` holds it against the tensors that
autograd really saves. What lives for a moment only (workspace, CUDA context) is an estimate.

Notation: D language width, I its MLP width, N heads, K vocabulary, r LoRA rank, Q query tokens, F Q-Former width,
V vision width, R image side.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch

from tinygptv.config import TinyGPTVConfig, TinyGPTVTextConfig
from tinygptv.model.tinygptv import FLOAT32_NAMES, TinyGPTVForConditionalGeneration
from tinygptv.training.stages import Stage, set_trainable

GIB = 2**30
CUDA_CONTEXT_BYTES = GIB // 2
"""What CUDA and its libraries take beside the allocator; an assumption, about right for recent cards."""
PROMPT_TOKENS = 64
"""Length assumed for a prompt, image and answer not counted; captions of images alone have none."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4 with double quantization: 4 bits, a scale byte per 64, a float per 256 scales."""
WEIGHT_BYTES = {"full": 4.0, "half": 2.0, "bf16": 2.0, "int8": 1.0, "llm_int8": 1.0, "nf4": NF4_BYTES}
"""Format of a linear layer -> bytes of a weight; the 8-bit formats add a float per row."""
PARTS = ("vision_encoder", "qformer", "projector", "language_model", "lm_head")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU.

    Attributes:
        weights: per part of the model.
        gradients: of what trains, float32.
        optimizer: AdamW's two moments, float32.
        activations: what is kept for the backward pass, or the KV cache in inference.
        workspace: what lives for a moment at the peak.
    """

    weights: dict[str, int]
    gradients: int
    optimizer: int
    activations: int
    workspace: int

    @property
    def peak(self) -> int:
        """The most that is held at one time, CUDA's own share included."""
        return self.allocated + CUDA_CONTEXT_BYTES

    @property
    def allocated(self) -> int:
        """The part of the peak that goes through torch's allocator."""
        return sum(self.weights.values()) + self.gradients + self.optimizer + self.activations + self.workspace

    def to_dict(self) -> dict[str, int | dict[str, int]]:
        """Plain data, bytes."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "workspace": self.workspace,
            "cuda_context": CUDA_CONTEXT_BYTES,
            "peak": self.peak,
        }


class TrainingMemory:
    """Plans for one stage; parameters are counted once."""

    def __init__(
        self,
        config: TinyGPTVConfig,
        stage: Stage,
        *,
        precision: str = "bf16",
        features: str = "inline",
        prompt_tokens: int | None = None,
    ) -> None:
        """Choose what is trained, and how.

        Args:
            config: sizes of the start; image side, dropout and (where it has none) LoRA rank are the stage's.
            stage: what trains, and sequence lengths.
            precision: key of ``train_step.PRECISIONS``; the 16-bit ones keep what trains in float32.
            features: ``inline`` encodes images in each step, ``cached`` does not (the encoder stays loaded).
            prompt_tokens: tokens of template and question; None takes ``PROMPT_TOKENS`` where the template has any.
        """
        self.config = deepcopy(config)
        self.config.vision_config.image_size = stage.image_size
        self.config.lora_rank = self.config.lora_rank or stage.lora_rank
        self.config.lora_dropout = stage.lora_dropout
        self.stage = stage
        self.half = precision in ("bf16", "fp16")
        self.features = features
        if prompt_tokens is None:
            prompt_tokens = 0 if stage.prompt_template.turn == "{}" else PROMPT_TOKENS
        self.num_tokens = 1 + self.config.num_query_tokens + prompt_tokens + stage.limits.max_text_tokens

    @cached_property
    def _parameters(self) -> tuple[dict[str, int], int, int]:
        """Weight bytes per part, numbers that train, and those of them that are in matrices."""
        model = build_on_meta(self.config)
        set_trainable(model, self.stage.trainable)
        weights = dict.fromkeys(PARTS, 0)
        for name, parameter in model.named_parameters():
            wide = not self.half or FLOAT32_NAMES.match(name) or parameter.requires_grad
            weights[name.partition(".")[0]] += parameter.numel() * (4 if wide else 2)
        trained = [p for p in model.parameters() if p.requires_grad]
        return weights, sum(p.numel() for p in trained), sum(p.numel() for p in trained if p.ndim > 1)

    def plan(self, micro_batch_size: int, *, gradient_checkpointing: bool = False) -> MemoryPlan:
        """Memory of a step with so many samples, each of the stage's greatest length, in one forward pass.

        Args:
            micro_batch_size: samples of a forward pass.
            gradient_checkpointing: language layers are computed again in the backward pass.
        """
        text, images, element = self.config.text_config, micro_batch_size, 2 if self.half else 4
        tokens = micro_batch_size * self.num_tokens
        weights, trained, in_matrices = self._parameters
        layer = tokens * layer_activation_bytes(text, self.config.lora_rank, self.half, self.config.lora_dropout)
        width = self.config.qformer_config.hidden_size + self.config.projector_hidden_size
        kept = (
            4 * tokens * text.hidden_size  # input of the final norm
            + images * self.config.num_query_tokens * width * element  # inputs of the projector's two layers
            + (in_matrices * 2 if self.half else 0)  # autocast's copies of what trains
        )
        moment = tokens * layer_workspace_bytes(text)
        if gradient_checkpointing:
            kept += text.num_hidden_layers * 4 * tokens * text.hidden_size
            moment += layer
        else:
            kept += text.num_hidden_layers * layer
        positions = micro_batch_size * self.stage.limits.max_text_tokens
        moment = max(moment, positions * text.vocab_size * (10 if self.half else 8))  # logits and their gradient
        if self.features == "inline":
            moment = max(moment, images * encoder_workspace_bytes(self.config, element) - kept)
        return MemoryPlan(weights, 4 * trained, 8 * trained, kept, moment)

    def largest_micro_batch(self, capacity: int, *, gradient_checkpointing: bool = False) -> int:
        """The most samples of one forward pass that fit into so many bytes; 0 where not even one does."""
        return _largest(
            lambda size: self.plan(size, gradient_checkpointing=gradient_checkpointing).peak <= capacity, 1 << 20
        )


def inference_memory(
    config: TinyGPTVConfig, formats: dict[str, str], *, num_tokens: int = 2048, num_images: int = 1
) -> MemoryPlan:
    """Memory to answer one request; LoRA adapters are merged.

    Args:
        config: sizes.
        formats: part -> format of its linear layers, a key of ``WEIGHT_BYTES``.
        num_tokens: prompt and answer, images included.
        num_images: images that are encoded together.
    """
    config = deepcopy(config)
    config.lora_rank = 0
    text = config.text_config
    weights = dict.fromkeys(PARTS, 0.0)
    for name, parameter in build_on_meta(config).named_parameters():
        part = name.partition(".")[0]
        weights[part] += parameter.numel() * _stored_bytes(name, parameter, formats[part])
    cache = 2 * 2 * text.num_hidden_layers * text.hidden_size * num_tokens
    prefill = num_tokens * (2 * 2 * text.intermediate_size + 20 * text.hidden_size)
    encoding = num_images * encoder_workspace_bytes(config, 2)
    return MemoryPlan({part: int(size) for part, size in weights.items()}, 0, 0, cache, max(prefill, encoding))


def _stored_bytes(name: str, parameter: torch.nn.Parameter, form: str) -> float:
    if form == "full" or FLOAT32_NAMES.match(name):
        return 4.0
    is_linear = parameter.ndim == 2 and "embed_tokens" not in name
    if not is_linear:
        return 2.0
    return WEIGHT_BYTES[form] + (4 / parameter.shape[1] if form in ("int8", "llm_int8") else 0)


def layer_activation_bytes(text: TinyGPTVTextConfig, lora_rank: int, half: bool, lora_dropout: float) -> int:
    """What one language layer keeps for its backward pass, in bytes per token, with fused attention.

    Frozen linear layers keep nothing: the gradient of their input needs their weight alone.

    Args:
        text: sizes, and which norms there are.
        lora_rank: 0 without adapters.
        half: 16-bit matrices under autocast; else float32.
        lora_dropout: dropout on the adapters' input; keeps a mask.
    """
    width, heads, element = text.hidden_size, text.num_attention_heads, 2 if half else 4
    total = 2 * width * element + 3 * width * element + width * element + 4 * heads  # attention: q, k, fused v, output
    total += text.intermediate_size * element  # the activation function's input
    if text.input_layernorm:
        total += 4 * width + 8
    if text.qk_layernorm:
        total += (8 * width if half else 0) + 16 * heads  # float32 copies of q and k; mean and deviation of each head
    if text.attention_rmsnorm:
        total += 8 * width + 4
    if text.resid_pdrop:
        total += 2 * width  # a byte per element and branch
    if lora_rank:
        total += 2 * lora_rank * element + 2 * width * element  # the inputs of both matrices of both adapters
        if lora_dropout:
            total += 2 * width
    return total


def layer_workspace_bytes(text: TinyGPTVTextConfig) -> int:
    """Gradients that one layer's backward pass holds at a time, in bytes per token; an estimate.

    The residual's gradient and its sum in float32, and both gradients around the MLP's activation function.
    """
    return 10 * text.hidden_size + 2 * 2 * text.intermediate_size


def encoder_workspace_bytes(config: TinyGPTVConfig, element: int) -> int:
    """What encoding an image holds at a time without gradients; an estimate.

    The residual, a normalised copy (autocast: float32 and again cast), and the MLP before and after its activation.
    """
    vision = config.vision_config
    per_patch = element * (2 * vision.hidden_size + 2 * vision.intermediate_size) + 4 * vision.hidden_size
    return (vision.num_patches + 1) * per_patch + 2 * 4 * 3 * vision.image_size**2


def build_on_meta(config: TinyGPTVConfig) -> TinyGPTVForConditionalGeneration:
    """The model without memory: names and shapes."""
    with torch.device("meta"):
        return TinyGPTVForConditionalGeneration(config)


def parse_bytes(text: str) -> int:
    """Bytes of ``24GB``, ``8 GiB`` or ``80000MB``; a GB is 2**30, as makers of cards count.

    Raises:
        ValueError: the text is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MG])i?B?\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise ValueError(f"{text!r} is no memory size: write it like 24GB.")
    return int(float(match[1]) * (GIB if match[2].upper() == "G" else 2**20))


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number from 0 to ``limit`` that fits, where smaller ones fit too."""
    low, high = 0, 1
    while high < limit and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
