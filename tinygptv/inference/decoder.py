"""One forward pass of the language model over a flat list of tokens that belong to many sequences.

``model.language_model`` expects a rectangle [B, S]; a serving step has one token of each answering sequence and a piece
of each new prompt. Here they stand in one list of T tokens, so that every matrix is read once per step for all of them:

    tokens     a7  b3  c9   d0  d1  d2  d3      three sequences decode, the prompt of d is being read
    slots       0   1   4    2   2   2   2
    positions   7   3   9    0   1   2   3

The modules are the model's own (LoRA, low-bit layers and switched-off norms included). What differs is only what would
cost time per step: the cache is preallocated, masks are built once per step, rotary tables once for all.

Notation: T tokens of a step, G slots, L cache length, N heads, H head width, D width, K vocabulary.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import cast

import torch
from torch import Tensor

from tinygptv.inference.flat_layer import FlatLayer, HostFlatLayer, StepPlan, host_norm, rotary_tables
from tinygptv.inference.flat_step import host_step
from tinygptv.kernels.host_attention import has_host_attention
from tinygptv.kernels.pages import lazy_zeros
from tinygptv.kernels.shapes import Cache
from tinygptv.model.language_model import LanguageModel, PhiAttention, PhiDecoderLayer
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.quantization.linear_packed import PackedLinear
from tinygptv.quantization.linear_tinygemm import TinygemmLinear

logger = logging.getLogger(__name__)

WORKSPACE_BYTES = 3 * 2**28
"""Approximate GPU memory of steps, graphs and image encoder beside weights and cache."""

CACHE_DTYPES = {"auto": None, "bfloat16": torch.bfloat16}
"""Storage of keys and values: as the matrix products give them (float32 on a CPU), or in half of that."""


def slots_that_fit(
    model: TinyGPTVForConditionalGeneration, wanted: int, cache_length: int, cache_dtype: torch.dtype | None = None
) -> int:
    """Number of sequences whose keys and values fit into a GPU's free memory, at most ``wanted``.

    Room is left for the steps' own tensors, for graphs, and for encoding images. On a CPU the cache takes memory as it
    is written, and ``wanted`` is returned.

    Args:
        model: where its weights are.
        wanted: most slots.
        cache_length: positions of each.
        cache_dtype: as for ``FlatDecoder``.

    Raises:
        ValueError: not even one fits.
    """
    text = model.config.text_config
    device = cast(Tensor, model.get_input_embeddings().weight).device
    if device.type != "cuda":
        return wanted
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    dtype = cache_dtype or _matrix_dtype(model)
    slot = 2 * text.num_hidden_layers * text.hidden_size * cache_length * dtype.itemsize
    room = free - WORKSPACE_BYTES - total // 50
    if room < slot:
        raise ValueError(
            f"the cache of one sequence of {cache_length} tokens takes {slot / 2**30:.2f} GiB, and {free / 2**30:.2f} "
            f"GiB are free on {device}, of which {(free - room) / 2**30:.2f} GiB are needed for other things: choose a "
            "smaller context_length, or an artifact of fewer bits."
        )
    num_slots = min(wanted, room // slot)
    if num_slots < wanted:
        logger.warning(
            "%d answers of %d tokens are generated together, not %d: %.1f GiB of the GPU's memory are free",
            num_slots, cache_length, wanted, free / 2**30,
        )  # fmt: skip
    return num_slots


class FlatDecoder:
    """The language model with its head, reading and writing a preallocated cache of keys and values."""

    def __init__(
        self,
        model: TinyGPTVForConditionalGeneration,
        num_slots: int,
        cache_length: int,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the cache.

        Args:
            model: in evaluation mode.
            num_slots: sequences that the cache holds (G).
            cache_length: positions of each (L).
            cache_dtype: of keys and values; None is that of the matrix products.
        """
        self.model = model
        self.num_slots, self.cache_length = num_slots, cache_length
        self.language: LanguageModel = model.language_model
        language, text = self.language, self.language.config
        first = cast(PhiAttention, language.layers[0].self_attn)
        self.num_heads, self.head_dim = first.num_heads, first.head_dim
        self.device: torch.device = cast(Tensor, model.get_input_embeddings().weight).device
        self.matrix_dtype = _matrix_dtype(model)
        self.dtype = cache_dtype or self.matrix_dtype
        shape = (text.num_hidden_layers, 2, num_slots, self.num_heads, cache_length, self.head_dim)
        on_cpu = self.device.type == "cpu"
        make = lazy_zeros if on_cpu else partial(torch.zeros, device=self.device)
        self.cache = make(shape, dtype=self.dtype)
        self.head_rows = torch.arange(self.num_heads, device=self.device) * cache_length
        self.rotary = rotary_tables(language, cache_length, self.head_dim, first.rotary_dim)
        self.layers = [self._flat_layer(cast(PhiDecoderLayer, layer)) for layer in language.layers]
        self.host_step = host_step(self.layers)
        on_host = isinstance(self.layers[0], HostFlatLayer)
        self.final_layernorm = host_norm(language.final_layernorm) if on_host else language.final_layernorm

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token embeddings: [...] to [..., D]."""
        return self.model.get_input_embeddings()(token_ids)

    @torch.inference_mode()
    def forward(self, inputs_embeds: Tensor, plan: StepPlan) -> Tensor:
        """Run the step, extending the cache.

        Args:
            inputs_embeds: [T, D].
            plan: where each token belongs.

        Returns:
            Logits float32 [M, K] of ``plan.output_rows``.
        """
        hidden_states = inputs_embeds.float()
        if self.host_step is not None and plan.has_short_prompts():
            hidden_states = self.host_step(hidden_states, plan.positions, plan.cache_rows, plan.num_decoding)
        else:
            for layer in self.layers:
                hidden_states = layer(hidden_states, plan)
        if plan.output_rows is not None:
            hidden_states = hidden_states.index_select(0, plan.output_rows)
        if len(hidden_states) == 0:
            return hidden_states.new_empty(0, self.model.config.text_config.vocab_size)
        return self.model.compute_logits(self.final_layernorm(hidden_states))

    def _flat_layer(self, layer: PhiDecoderLayer) -> FlatLayer:
        cache = Cache(*self.cache[layer.self_attn.layer_idx].unbind(0))
        on_host = self.device.type == "cpu" and self.matrix_dtype == torch.float32
        kind = HostFlatLayer if on_host and has_host_attention(self.head_dim, layer.mlp.fc2.out_features) else FlatLayer
        return kind(layer, cache, self.rotary)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another."""
        self.cache[:, :, target, :, :length] = self.cache[:, :, source, :, :length]

    def clear(self, slot: int) -> None:
        """Zero a slot: a masked position has weight 0, but 0 times NaN would still spoil its neighbours' answers."""
        self.cache[:, :, slot] = 0

    def cache_rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """``StepPlan.cache_rows`` of tokens [T] at ``positions`` of ``slots``."""
        starts = slots * (self.num_heads * self.cache_length) + positions
        return (starts.unsqueeze(1) + self.head_rows).flatten()

    def decoding_mask(self, lengths: Tensor, longest: int) -> Tensor:
        """Additive mask [B, 1, 1, longest] that hides what lies beyond each sequence's length."""
        hidden = torch.arange(longest, device=self.device) >= lengths.unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(hidden, torch.finfo(self.dtype).min)[:, None, None]

    def prompt_mask(self, start: int, end: int) -> Tensor:
        """Additive causal mask [1, 1, end - start, end] of a prompt piece that follows ``start`` cached positions."""
        triangle = torch.full((end - start, end), torch.finfo(self.dtype).min, dtype=self.dtype, device=self.device)
        return triangle.triu_(start + 1)[None, None]


def _matrix_dtype(model: TinyGPTVForConditionalGeneration) -> torch.dtype:
    """Dtype in which the language model's matrix products come out, and so of keys and values."""
    module = model.language_model.layers[0].self_attn.qkv_proj
    if isinstance(module, PackedLinear | TinygemmLinear):
        return module.dtype
    weight = module.weight
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else model.dtype
