"""Memory plan: will this stage, batch and precision fit this GPU? Counted from the configuration; no GPU is touched.

Parameters are counted on the meta device, activations and work areas by ``step_memory``. What CUDA, its libraries and
the allocator's rounding take is assumed, with a margin: measured on an H100 in ``benchmarks/gpu_memory.py``.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import TypedDict, cast

import torch

from tinygptv.config import TinyGPTVConfig
from tinygptv.data.flatten import TOKENS_MULTIPLE
from tinygptv.model.fused_layer import can_fuse
from tinygptv.model.meta import build_on_meta
from tinygptv.model.tinygptv import FLOAT32_NAMES, TinyGPTVForConditionalGeneration
from tinygptv.training.stages import Stage, set_trainable
from tinygptv.training.step_memory import (
    BatchSize,
    Computation,
    attention_workspace_bytes,
    encoder_workspace_bytes,
    head_workspace_bytes,
    layer_activation_bytes,
    layer_workspace_bytes,
    mask_bytes,
)
from tinygptv.training.train_step import images_at_a_time

GIB = 2**30
CUDA_CONTEXT_BYTES = GIB // 2
"""Memory of CUDA and its libraries beside the allocator; an assumption, about right for recent cards."""
LIBRARY_BYTES = 128 * 2**20
"""Work areas of cuBLAS, which come from torch's allocator: 32 MiB per thread and library on an H100, less elsewhere."""
ALLOCATOR_MARGIN = 0.03
"""Memory of the allocator beyond the tensors of a step, as a share of them, with expandable segments."""
PROMPT_TOKENS = 64
"""Length assumed for a prompt, image and answer not counted; captions of images alone have none."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4 with double quantization: 4 bits, a scale byte per 64, a float per 256 scales."""
WEIGHT_BYTES = {"full": 4.0, "half": 2.0, "bf16": 2.0, "int8": 1.0, "llm_int8": 1.0, "int4": 0.5625, "nf4": NF4_BYTES}
"""Format of a linear layer -> bytes of a weight; the 8-bit formats add a float per row."""
FROZEN_BYTES = {"int8": 1.0, "nf4": 0.5 + 2 / 64}
"""``frozen_weights`` -> bytes of a weight as it is kept in memory: NF4 with a float16 scale per 64."""
PARTS = ("vision_encoder", "qformer", "projector", "language_model", "lm_head")


class PlanBytes(TypedDict):
    """A ``MemoryPlan`` in JSON; ``cuda_context`` is CUDA's own share."""

    weights: dict[str, int]
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    margin: int
    cuda_context: int
    peak: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU.

    Attributes:
        weights: per part of the model.
        gradients: of what trains, float32.
        optimizer: AdamW's two moments, float32.
        activations: what is kept for the backward pass, or the KV cache in inference.
        workspace: what lives for a moment at the peak.
        margin: what the allocator holds beyond that.
    """

    weights: dict[str, int]
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    margin: int = 0

    @property
    def peak(self) -> int:
        """The most that is held at one time, the allocator's margin and CUDA's own share included."""
        return self.allocated + self.margin + CUDA_CONTEXT_BYTES

    @property
    def allocated(self) -> int:
        """The part of the peak that is tensors."""
        return sum(self.weights.values()) + self.gradients + self.optimizer + self.activations + self.workspace

    def to_dict(self) -> PlanBytes:
        """Plain data, bytes."""
        return cast("PlanBytes", {**asdict(self), "cuda_context": CUDA_CONTEXT_BYTES, "peak": self.peak})


class TrainingMemory:
    """Plans for one stage; parameters are counted once."""

    def __init__(
        self,
        config: TinyGPTVConfig,
        stage: Stage,
        computation: Computation | None = None,
        *,
        prompt_tokens: int | None = None,
    ) -> None:
        """Choose what is trained, and how.

        Args:
            config: sizes of the start; image side, dropout and (where it has none) LoRA rank are the stage's.
            stage: what trains, and sequence lengths.
            computation: how; None: as on a GPU by default.
            prompt_tokens: tokens of template and question; None takes ``PROMPT_TOKENS`` where the template has any.
        """
        self.config = deepcopy(config)
        self.config.vision_config.image_size = stage.image_size
        self.config.lora_rank = self.config.lora_rank or stage.lora_rank
        self.config.lora_dropout = stage.lora_dropout
        self.stage = stage
        self.computation = computation or Computation()
        if prompt_tokens is None:
            prompt_tokens = 0 if stage.prompt_template.turn == "{}" else PROMPT_TOKENS
        self.num_tokens = 1 + self.config.num_query_tokens + prompt_tokens + stage.limits.max_text_tokens

    def computed(self, **changes: bool | str) -> TrainingMemory:
        """The same stage, computed otherwise: fields of ``Computation``."""
        other = copy(self)
        other.computation = replace(self.computation, **changes)  # type: ignore[arg-type]
        if changes.keys() & {"precision", "frozen_weights"}:
            other.__dict__.pop("_parameters", None)
        return other

    @cached_property
    def _parameters(self) -> tuple[dict[str, int], int, int, bool]:
        """Weight bytes per part, numbers that train, those of them in matrices, whether the language head trains."""
        model = _built(self.config.to_json_string(use_diff=False))
        set_trainable(model, self.stage.trainable)
        weights = dict.fromkeys(PARTS, 0)
        for name, parameter in model.named_parameters():
            weights[name.partition(".")[0]] += int(parameter.numel() * self._bytes_of(name, parameter))
        trained = [p for p in model.parameters() if p.requires_grad]
        in_matrices = sum(p.numel() for p in trained if p.ndim > 1)
        return weights, sum(p.numel() for p in trained), in_matrices, model.lm_head.weight.requires_grad

    def _bytes_of(self, name: str, parameter: torch.nn.Parameter) -> float:
        """Bytes of each number of a parameter while it trains, or is frozen."""
        how = self.computation
        if parameter.requires_grad or FLOAT32_NAMES.match(name):
            return 4
        if how.frozen_weights != "full" and parameter.ndim == 2 and name.startswith("language_model.layers."):
            return FROZEN_BYTES[how.frozen_weights]
        return 2 if how.half else 4

    def longest(self, samples: int) -> BatchSize:
        """So many samples, each of the stage's greatest length, in one forward pass."""
        limit = self.stage.limits.max_text_tokens
        return BatchSize(samples, samples * self.num_tokens, samples * limit, samples)

    def plan(self, batch: int | BatchSize) -> MemoryPlan:
        """Memory of a step.

        Args:
            batch: of one forward pass; a number of samples stands for ``longest``.
        """
        batch = self.longest(batch) if isinstance(batch, int) else batch
        text, how = self.config.text_config, self.computation
        element = 2 if how.half else 4
        weights, trained, in_matrices, head_trains = self._parameters
        tokens = -(-batch.tokens // TOKENS_MULTIPLE) * TOKENS_MULTIPLE if how.on_gpu else batch.tokens
        residual = 4 * tokens * text.hidden_size
        layer = tokens * layer_activation_bytes(
            text,
            self.config.lora_rank,
            self.config.lora_dropout,
            half=how.half,
            compiled=how.compiled,
            fused=how.fused and how.has_no_padding and can_fuse(text),
        )
        if how.on_gpu and not how.has_no_padding:
            layer += mask_bytes(batch, element)
        width = self.config.qformer_config.hidden_size + self.config.projector_hidden_size
        kept = (
            residual  # input of the final norm
            + batch.images * self.config.num_query_tokens * width * element  # inputs of the projector's two layers
            + (in_matrices * 2 if how.half else 0)  # 16-bit copies of what trains
        )
        backward = tokens * layer_workspace_bytes(text) + (attention_workspace_bytes(text, batch) if how.on_gpu else 0)
        if how.frozen_weights != "full":
            backward += text.hidden_size * text.intermediate_size * element * 2  # one matrix while it is unpacked
        if how.gradient_checkpointing:
            kept += text.num_hidden_layers * residual
            backward += layer
        else:
            kept += text.num_hidden_layers * layer
        ends = residual + tokens * text.hidden_size * element  # the final norm's output and the embeddings
        loss = ends + head_workspace_bytes(text, batch.positions, how, head_trains=head_trains)
        moment = max(backward, loss)
        if how.features == "inline":
            images = min(batch.images, images_at_a_time(self.config))
            moment = max(moment, images * encoder_workspace_bytes(self.config, element) - kept)
        moment += LIBRARY_BYTES if how.on_gpu else 0
        return MemoryPlan(weights, 4 * trained, 8 * trained, kept, moment, int(ALLOCATOR_MARGIN * (kept + moment)))

    def largest_micro_batch(self, capacity: int) -> int:
        """The most samples of one forward pass that fit into so many bytes; 0 where not even one does."""
        return _largest(lambda size: self.plan(size).peak <= capacity, 1 << 20)

    def largest_tokens(self, capacity: int) -> int:
        """The most tokens of one forward pass that fit, however they are shared out; 0 where not one sample does.

        Images and sequences are counted as if every sample were as short as its image allows.
        """
        shortest = self.config.num_query_tokens + 2

        def fits(tokens: int) -> bool:
            samples = -(-tokens // shortest)
            return self.plan(BatchSize(samples, tokens, tokens, samples)).peak <= capacity

        tokens = _largest(fits, 1 << 26)
        return tokens if tokens >= self.num_tokens or self.plan(1).peak <= capacity else 0


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
    for name, parameter in _built(config.to_json_string(use_diff=False)).named_parameters():
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


@lru_cache(maxsize=8)
def _built(config_json: str) -> TinyGPTVForConditionalGeneration:
    """One model without memory for all plans of the same sizes; what trains is set again each time."""
    return build_on_meta(TinyGPTVConfig(**json.loads(config_json)))


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number from 0 to before ``limit`` that fits, where smaller ones fit too."""
    return bisect_left(range(1, limit), True, key=lambda size: not fits(size))
