"""The language model's layers with their small operations fused, for a GPU; decoding in static shapes.

Per layer, next to the four matrix products, one kernel adds both branches to the residual and normalises it, and one
does everything between the q/k/v product and the attention's output (see ``kernels``). ``decode`` reads its input from
tensors on the device and never waits for the host, so it can be captured as a CUDA graph; there, the MLP runs beside
the attention, as Phi's parallel block allows.

Notation: T tokens of a step, D width, N heads, H head width, G slots, L cache length, I width of the MLP, K vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers.activations import GELUTanh, NewGELUActivation

from tinygptv.inference.decoder import FlatDecoder
from tinygptv.inference.layer_weights import NormWeights, attention_weights, layer_norm, rms_norm
from tinygptv.kernels import step_ops
from tinygptv.kernels.shapes import Branch, Cache
from tinygptv.model.language_model import PhiDecoderLayer
from tinygptv.quantization.linear_packed import PackedLinear
from tinygptv.quantization.linear_tinygemm import TinygemmLinear

PACKED_LAYERS = (PackedLinear, TinygemmLinear)

attend = nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Span:
    """Consecutive prompt tokens of one sequence: positions [start, end) of a slot."""

    slot: int
    start: int
    end: int


class FusedLayers:
    """All layers and the head, over the cache of a ``FlatDecoder``."""

    def __init__(self, decoder: FlatDecoder, ops: ModuleType | None = None) -> None:
        """Read the decoder's weights.

        Args:
            decoder: whose cache is read and extended.
            ops: ``kernels.fused`` or ``kernels.reference``; None takes what suits the device.
        """
        self.decoder = decoder
        self.ops: Any = ops or step_ops(decoder.device.type)
        self.layers = [_Layer(cast(PhiDecoderLayer, layer), decoder, self.ops) for layer in decoder.language.layers]
        self.final_norm = layer_norm(decoder.language.final_layernorm)
        is_cuda = decoder.device.type == "cuda"
        self._side = torch.cuda.Stream(decoder.device) if is_cuda else None

    @torch.inference_mode()
    def decode(self, slots_T: Tensor, tokens_G: Tensor, lengths_G: Tensor) -> Tensor:
        """One new token for each of T sequences; extends the cache.

        Args:
            slots_T: int64 [T] slot of each sequence; G marks a row that belongs to nobody.
            tokens_G: int64 [G + 1] last token of each slot's sequence.
            lengths_G: int64 [G + 1] positions that each slot holds; the token stands at that position.

        Returns:
            Logits float32 [T, K]; those of nobody's rows mean nothing.
        """
        hidden_TD = self.decoder.embed(tokens_G.index_select(0, slots_T)).float()
        branches = None
        for layer in self.layers:
            normed_TD = self._add_norm(hidden_TD, branches, layer.norm)
            with _beside(self._side):
                mlp = layer.mlp(normed_TD)
            qkv = layer.qkv.partials(normed_TD)
            attended = self.ops.attend(qkv, layer.attention, layer.cache, slots_T, lengths_G)
            branches = layer.attention_branch(attended), mlp
            _join(self._side)
        return self._logits(self._add_norm(hidden_TD, branches, self.final_norm))

    @torch.inference_mode()
    def prefill(self, inputs_embeds_TD: Tensor, spans: Sequence[Span], output_rows: Sequence[int]) -> Tensor:
        """Read pieces of prompts; extends the cache.

        Args:
            inputs_embeds_TD: [T, D], the spans' embeddings one after another.
            spans: where they belong.
            output_rows: rows whose next token is wanted.

        Returns:
            Logits float32 [len(output_rows), K].
        """
        device = self.decoder.device
        positions_T = torch.cat([torch.arange(span.start, span.end, device=device) for span in spans])
        slots_T = torch.cat([torch.full((s.end - s.start,), s.slot, device=device) for s in spans])
        hidden_TD = inputs_embeds_TD.to(torch.float32, copy=True)
        branches = None
        for layer in self.layers:
            normed_TD = self._add_norm(hidden_TD, branches, layer.norm)
            qkv = layer.qkv.partials(normed_TD)
            query_TNH = self.ops.rotate_and_store(qkv, layer.attention, layer.cache, slots_T, positions_T)
            branches = layer.attention_branch(layer.attend_to_spans(query_TNH, spans)), layer.mlp(normed_TD)
        normed_TD = self._add_norm(hidden_TD, branches, self.final_norm)
        if not output_rows:
            return hidden_TD.new_empty(0, self.decoder.model.config.text_config.vocab_size)
        return self._logits(torch.stack([normed_TD[row] for row in output_rows]))

    def _add_norm(self, hidden_TD: Tensor, branches: tuple[Branch, Branch] | None, norm: NormWeights) -> Tensor:
        dtype = self.decoder.matrix_dtype
        return self.ops.add_norm(hidden_TD, branches, norm.weight, norm.bias, norm.eps, dtype)

    def _logits(self, normed_TD: Tensor) -> Tensor:
        return self.decoder.model.compute_logits(normed_TD)


class _Layer:
    """One parallel block's weights, as the kernels take them."""

    def __init__(self, layer: PhiDecoderLayer, decoder: FlatDecoder, ops: Any) -> None:
        attention, index = layer.self_attn, layer.self_attn.layer_idx
        self.ops = ops
        self.qkv, self.dense = Projection(attention.qkv_proj), Projection(attention.dense)
        self.fc1, self.fc2 = Projection(layer.mlp.fc1), Projection(layer.mlp.fc2)
        self.activation = layer.mlp.activation_fn
        self.norm = layer_norm(layer.input_layernorm)
        tables = decoder.rotary.cos[:, 0], decoder.rotary.sin[:, 0]
        self.attention = attention_weights(attention, self.qkv.bias, *tables)
        self.cache = Cache(*decoder.cache[index].unbind(0))
        self.rms_weight, self.rms_eps = rms_norm(layer)

    def attention_branch(self, attended: Tensor) -> Branch:
        return Branch(self.dense.partials(attended), self.dense.bias, self.rms_weight, self.rms_eps)

    def mlp(self, normed_TD: Tensor) -> Branch:
        return Branch(self.fc2.partials(self._activated(normed_TD)), self.fc2.bias)

    def _activated(self, normed_TD: Tensor) -> Tensor:
        fc1 = self.fc1
        if not isinstance(self.activation, GELUTanh | NewGELUActivation):
            output = fc1.partials(normed_TD).float().sum(0)
            return self.activation(output if fc1.bias is None else output + fc1.bias).to(normed_TD.dtype)
        if fc1.plain is not None and fc1.plain.bias is not None and normed_TD.is_cuda:
            # cuBLAS adds the bias and applies the tanh GELU as it writes the product.
            return torch._addmm_activation(
                fc1.plain.bias, normed_TD.to(fc1.plain.weight.dtype), fc1.plain.weight.t(), use_gelu=True
            )
        return self.ops.bias_gelu(fc1.partials(normed_TD), fc1.bias, normed_TD.dtype)

    def attend_to_spans(self, query_TNH: Tensor, spans: Sequence[Span]) -> Tensor:
        """Attention of prompt pieces over what their slots hold up to them: [T, N * H]."""
        outputs, first = [], 0
        for span in spans:
            rows = span.end - span.start
            query = query_TNH[first : first + rows].transpose(0, 1).unsqueeze(0)  # [1, N, rows, H]
            keys, values = (x[span.slot, :, : span.end].unsqueeze(0) for x in (self.cache.keys, self.cache.values))
            scale = self.attention.scale
            if span.start == 0:
                output = attend(query, keys, values, is_causal=True, scale=scale)
            else:
                output = attend(query, keys, values, causal_lower_right(rows, span.end), scale=scale)
            outputs.append(output.squeeze(0).transpose(0, 1).flatten(1))
            first += rows
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class Projection:
    """A linear layer as partial products and a bias that the next kernel adds.

    Attributes:
        bias: float32 [O]; None where there is none or the product holds it already.
        plain: the layer, where it is a plain ``nn.Linear``.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.plain = module if type(module) is nn.Linear else None
        bias = module.bias if self.plain is not None or isinstance(module, PACKED_LAYERS) else None
        self.bias = None if bias is None else cast(Tensor, bias).detach().float()

    def partials(self, x_TI: Tensor) -> Tensor:
        """[T, I] to [P, T, O], whose sum over P, plus the bias, is the layer's output."""
        if self.plain is not None:
            return nn.functional.linear(x_TI.to(self.plain.weight.dtype), self.plain.weight).unsqueeze(0)
        if isinstance(self._module, PACKED_LAYERS):
            return self._module.partial_products(x_TI)
        return self._module(x_TI).unsqueeze(0)


@contextmanager
def _beside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run a block on another stream while a CUDA graph is captured; elsewhere it runs where it stands."""
    if stream is None or not torch.cuda.is_current_stream_capturing():
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield


def _join(stream: torch.cuda.Stream | None) -> None:
    """Wait for what ``_beside`` started."""
    if stream is not None and torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream().wait_stream(stream)
