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
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from tinygptv.model.language_model import LanguageModel, PhiAttention, PhiDecoderLayer, matrix_input
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.quantization.linear_packed import PackedLinear
from tinygptv.quantization.linear_tinygemm import TinygemmLinear

logger = logging.getLogger(__name__)

WORKSPACE_BYTES = 3 * 2**28
"""Approximate GPU memory of steps, graphs and image encoder beside weights and cache."""

attend = nn.functional.scaled_dot_product_attention

CACHE_DTYPES = {"auto": None, "bfloat16": torch.bfloat16}
"""Storage of keys and values: as the matrix products give them (float32 on a CPU), or in half of that."""


@dataclass
class Segment:
    """Consecutive tokens of the flat list that attend together.

    Attributes:
        rows: where they stand in the flat list.
        slots: the cache rows that they read, one per sequence.
        length: cache positions that they read, [0, length).
        mask: additive float mask, broadcastable to [sequences, 1, queries, length]; None where nothing is hidden.
        is_causal: a prompt's first piece, where the triangle is the whole mask.
    """

    rows: slice
    slots: slice
    length: int
    mask: Tensor | None = None
    is_causal: bool = False


@dataclass
class StepPlan:
    """Input of one forward pass.

    Attributes:
        positions: [T] position of each token in its sequence.
        cache_rows: [T * N] row ``(slot * N + head) * L + position`` of the flattened cache for each token and head.
        segments: how the tokens attend.
        num_decoding: the first so many tokens are one new token each of as many sequences.
        output_rows: [M] tokens whose next token is wanted.
    """

    positions: Tensor
    cache_rows: Tensor
    segments: list[Segment] = field(default_factory=list)
    num_decoding: int = 0
    output_rows: Tensor | None = None


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
        self.cache = _zeros(shape, self.dtype, self.device)
        self.flat_cache = self.cache.view(text.num_hidden_layers, 2, -1, self.head_dim)
        self.head_rows = torch.arange(self.num_heads, device=self.device) * cache_length
        self.cos, self.sin, self.swap = _rotary_tables(language, cache_length, self.head_dim, first.rotary_dim)
        self.layers = [_Layer(cast(PhiDecoderLayer, layer), self) for layer in language.layers]
        self.final_layernorm = language.final_layernorm

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
        cos, sin = self.cos.index_select(0, plan.positions), self.sin.index_select(0, plan.positions)
        hidden_states = inputs_embeds.float()
        for layer in self.layers:
            hidden_states = layer(hidden_states, cos, sin, plan)
        if plan.output_rows is not None:
            hidden_states = hidden_states.index_select(0, plan.output_rows)
        if len(hidden_states) == 0:
            return hidden_states.new_empty(0, self.model.config.text_config.vocab_size)
        return self.model.compute_logits(self.final_layernorm(hidden_states))

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


class _Layer:
    """One parallel block over flat tokens; the arithmetic of ``PhiDecoderLayer``."""

    def __init__(self, layer: PhiDecoderLayer, decoder: FlatDecoder) -> None:
        attention: PhiAttention = layer.self_attn
        index = attention.layer_idx
        self.layer, self.attention = layer, attention
        self.keys, self.values = decoder.cache[index].unbind(0)  # [G, N, L, H] each
        self.flat_keys, self.flat_values = decoder.flat_cache[index].unbind(0)  # [G * N * L, H]
        self.swap, self.shape = decoder.swap, (-1, 3, decoder.num_heads, decoder.head_dim)
        self.activation = _activation(layer.mlp.activation_fn)

    def __call__(self, hidden_states: Tensor, cos: Tensor, sin: Tensor, plan: StepPlan) -> Tensor:
        layer, attention, mlp = self.layer, self.attention, self.layer.mlp
        normed = layer.input_layernorm(hidden_states)
        qkv = attention.qkv_proj(matrix_input(normed, attention.qkv_proj)).view(self.shape)
        query = attention.q_layernorm(qkv[:, 0])
        key = attention.k_layernorm(qkv[:, 1])
        query = torch.addcmul(query * cos, query.index_select(-1, self.swap), sin).to(self.keys.dtype)
        key = torch.addcmul(key * cos, key.index_select(-1, self.swap), sin).to(self.keys.dtype)
        self.flat_keys.index_copy_(0, plan.cache_rows, key.flatten(0, 1))
        self.flat_values.index_copy_(0, plan.cache_rows, qkv[:, 2].flatten(0, 1).to(self.keys.dtype))

        output = torch.cat([self._attend(query, segment, plan) for segment in plan.segments]).to(qkv.dtype)
        output = layer.attention_rmsnorm(attention.dense(matrix_input(output, attention.dense)))
        activated = self.activation(mlp.fc1(matrix_input(normed, mlp.fc1)))
        return output + mlp.fc2(activated) + hidden_states

    def _attend(self, query: Tensor, segment: Segment, plan: StepPlan) -> Tensor:
        """Attend for one segment; returns [its tokens, N * H]."""
        decoding = segment.rows.start < plan.num_decoding
        query = query[segment.rows]
        query = query.unsqueeze(2) if decoding else query.transpose(0, 1).unsqueeze(0)  # [B, N, tokens, H]
        keys = self.keys[segment.slots, :, : segment.length]
        values = self.values[segment.slots, :, : segment.length]
        output = attend(query, keys, values, segment.mask, is_causal=segment.is_causal, scale=self.attention.scaling)
        output = output.squeeze(2) if decoding else output.squeeze(0).transpose(0, 1)
        return output.flatten(1)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zeroed tensor that, on a CPU, takes memory page by page as it is written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def _matrix_dtype(model: TinyGPTVForConditionalGeneration) -> torch.dtype:
    """Dtype in which the language model's matrix products come out, and so of keys and values."""
    module = model.language_model.layers[0].self_attn.qkv_proj
    if isinstance(module, PackedLinear | TinygemmLinear):
        return module.dtype
    weight = module.weight
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else model.dtype


def _activation(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Phi's tanh GELU in one kernel instead of eight; any other activation as it is."""
    return nn.GELU(approximate="tanh") if isinstance(module, NewGELUActivation) else module


def _rotary_tables(
    language: LanguageModel, length: int, head_dim: int, rotary_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines and signed sines [L, 1, H] for every position, and the order that pairs each number with its partner.

    Rotating is then ``x * cos + x[swap] * sin`` on whole heads: numbers beyond ``rotary_dim`` get cosine 1 and sine 0.
    """
    device = language.embed_tokens.weight.device
    positions = torch.arange(length, device=device).unsqueeze(0)
    cos_part, sin_part = language.rotary_emb(torch.zeros(1, device=device), positions)
    cos, sin = torch.ones(length, 1, head_dim, device=device), torch.zeros(length, 1, head_dim, device=device)
    cos[:, 0, :rotary_dim] = cos_part[0]
    half = rotary_dim // 2
    sin[:, 0, :half], sin[:, 0, half:rotary_dim] = -sin_part[0, :, :half], sin_part[0, :, half:]
    order: Sequence[int] = [*range(half, rotary_dim), *range(half), *range(rotary_dim, head_dim)]
    return cos, sin, torch.tensor(order, device=device)
