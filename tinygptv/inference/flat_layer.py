"""One layer of the language model over a flat list of tokens that belong to many sequences (``decoder``).

Notation: T tokens of a step, G slots, L cache length, N heads, H head width, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, NewGELUActivation

from tinygptv.inference.layer_weights import attention_weights, rms_norm
from tinygptv.kernels.host_attention import HostAttention, add_branches, gelu_rows, norm_rows
from tinygptv.kernels.host_library import BLOCK
from tinygptv.kernels.shapes import Cache
from tinygptv.model.language_model import LanguageModel, PhiDecoderLayer, matrix_input

attend = nn.functional.scaled_dot_product_attention

SHORT_PROMPT = 128
"""Positions up to which a CPU attends for each token of a prompt by itself.

torch's kernel reads keys once for many tokens, but its threads have to be woken.
"""


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

    def prompts(self) -> list[Segment]:
        """Segments that are pieces of prompts."""
        return [segment for segment in self.segments if segment.rows.start >= self.num_decoding]

    def has_short_prompts(self) -> bool:
        """Whether each token attends by itself on a CPU."""
        return all(segment.length <= SHORT_PROMPT for segment in self.prompts())


@dataclass(frozen=True)
class RotaryTables:
    """Rotary embedding of whole heads: ``x * cos + x[swap] * sin``.

    Attributes:
        cos: float32 [L, 1, H]; 1 beyond the rotated numbers.
        sin: float32 [L, 1, H], signed; 0 beyond the rotated numbers.
        swap: int64 [H], the partner of each number.
    """

    cos: Tensor
    sin: Tensor
    swap: Tensor


class FlatLayer:
    """One parallel block over flat tokens; the arithmetic of ``PhiDecoderLayer``."""

    def __init__(self, layer: PhiDecoderLayer, cache: Cache, rotary: RotaryTables) -> None:
        """Read a layer's weights.

        Args:
            layer: with its modules as they are: LoRA, low-bit layers and switched-off norms included.
            cache: [G, N, L, H] of this layer; extended in place.
            rotary: for all positions of the cache.
        """
        self.layer, self.attention, self.cache, self.rotary = layer, layer.self_attn, cache, rotary
        _, num_heads, _, head_dim = cache.keys.shape
        self.shape = (-1, 3, num_heads, head_dim)
        self.flat_keys, self.flat_values = cache.keys.view(-1, head_dim), cache.values.view(-1, head_dim)
        self.activation = _activation(layer.mlp.activation_fn)
        self.input_norm: Callable[[Tensor], Tensor] = layer.input_layernorm

    def __call__(self, hidden_states: Tensor, plan: StepPlan) -> Tensor:
        """Map the residual stream float32 [T, D] to the next one, extending the cache."""
        attention, mlp = self.attention, self.layer.mlp
        normed = self.input_norm(hidden_states)
        qkv = attention.qkv_proj(matrix_input(normed, attention.qkv_proj)).view(self.shape)
        attended = attention.dense(matrix_input(self._attend(qkv, plan), attention.dense))
        activated = self.activation(mlp.fc1(matrix_input(normed, mlp.fc1)))
        return self._add(attended, mlp.fc2(activated), hidden_states)

    def _attend(self, qkv: Tensor, plan: StepPlan) -> Tensor:
        """Extend the cache and attend: [T, 3, N, H] to [T, N * H]."""
        rotary, dtype = self.rotary, self.cache.keys.dtype
        cos, sin = rotary.cos.index_select(0, plan.positions), rotary.sin.index_select(0, plan.positions)
        query = self.attention.q_layernorm(qkv[:, 0])
        key = self.attention.k_layernorm(qkv[:, 1])
        query = torch.addcmul(query * cos, query.index_select(-1, rotary.swap), sin).to(dtype)
        key = torch.addcmul(key * cos, key.index_select(-1, rotary.swap), sin).to(dtype)
        self.flat_keys.index_copy_(0, plan.cache_rows, key.flatten(0, 1))
        self.flat_values.index_copy_(0, plan.cache_rows, qkv[:, 2].flatten(0, 1).to(dtype))
        return torch.cat([self._attend_segment(query, segment, plan) for segment in plan.segments]).to(qkv.dtype)

    def _attend_segment(self, query: Tensor, segment: Segment, plan: StepPlan) -> Tensor:
        """Attend for one segment: queries [T, N, H] to [its tokens, N * H]."""
        decoding = segment.rows.start < plan.num_decoding
        query = query[segment.rows]
        query = query.unsqueeze(2) if decoding else query.transpose(0, 1).unsqueeze(0)  # [B, N, tokens, H]
        keys = self.cache.keys[segment.slots, :, : segment.length]
        values = self.cache.values[segment.slots, :, : segment.length]
        output = attend(query, keys, values, segment.mask, is_causal=segment.is_causal, scale=self.attention.scaling)
        output = output.squeeze(2) if decoding else output.squeeze(0).transpose(0, 1)
        return output.flatten(1)

    def _add(self, attended: Tensor, mlp: Tensor, hidden_states: Tensor) -> Tensor:
        """Add both branches [T, D] to the residual stream."""
        return self.layer.attention_rmsnorm(attended) + mlp + hidden_states


class HostFlatLayer(FlatLayer):
    """``FlatLayer`` for float32 on a CPU, with what stands between the matrix products in C functions.

    Where tokens decode, no operation is shared among torch's threads, which would spin beside those of the C functions.
    """

    def __init__(self, layer: PhiDecoderLayer, cache: Cache, rotary: RotaryTables) -> None:
        """As ``FlatLayer``."""
        super().__init__(layer, cache, rotary)
        weights = attention_weights(layer.self_attn, None, rotary.cos[:, 0], rotary.sin[:, 0])
        self.host = HostAttention(weights, cache)
        self.rms = rms_norm(layer)
        self.input_norm = host_norm(layer.input_layernorm)
        is_gelu = isinstance(layer.mlp.activation_fn, GELUTanh | NewGELUActivation)
        if is_gelu and layer.mlp.fc1.out_features % BLOCK == 0:
            self.activation = gelu_rows

    def _attend(self, qkv: Tensor, plan: StepPlan) -> Tensor:
        is_short = plan.has_short_prompts()
        num_attended = len(qkv) if is_short else plan.num_decoding
        output = self.host(qkv.contiguous(), plan.positions, plan.cache_rows, plan.num_decoding, num_attended)
        if is_short:
            return output.flatten(1)
        query = output.to(self.cache.keys.dtype)
        parts = [output[: plan.num_decoding].flatten(1)]
        return torch.cat(parts + [self._attend_segment(query, segment, plan).float() for segment in plan.prompts()])

    def _add(self, attended: Tensor, mlp: Tensor, hidden_states: Tensor) -> Tensor:
        return add_branches(attended, *self.rms, mlp, hidden_states)


def host_norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A norm of the residual stream by a C function; one that is switched off stays as it is."""
    return partial(norm_rows, norm=module) if isinstance(module, nn.LayerNorm) else module


def _activation(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Phi's tanh GELU in one kernel instead of eight; any other activation as it is."""
    return nn.GELU(approximate="tanh") if isinstance(module, NewGELUActivation) else module


def rotary_tables(language: LanguageModel, length: int, head_dim: int, rotary_dim: int) -> RotaryTables:
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
    return RotaryTables(cos, sin, torch.tensor(order, device=device))
