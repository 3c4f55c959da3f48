"""Language model: Phi-2's parallel block with the three norms that TinyGPT-V adds.

Each layer computes, in this order (paper figure 3; the release's modified ``modeling_phi.py``):

    h = input_layernorm(x)                                    LayerNorm, Phi's own, trainable in TinyGPT-V
    a = dense(attention(q_layernorm(q), k_layernorm(k), v))   LayerNorm per head, before rotary embedding
    a = attention_rmsnorm(a)                                  RMSNorm, before residual dropout
    x = dropout(a) + dropout(mlp(h)) + x

``qkv_proj`` is one linear layer with all query rows first, then all key rows, then all value rows.
Norm parameters and the residual stream x are float32 whatever the dtype of the matrices, as in the release.

Notation: B batch, S sequence, D width, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.phi.modeling_phi import (
    PhiMLP,
    PhiRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from tinygptv.config import TinyGPTVTextConfig
from tinygptv.kernels.training_functions import draw_seeds
from tinygptv.model.fused_layer import can_fuse, fused_layer
from tinygptv.model.varlen_attention import varlen_attention


class Float32LayerNorm(nn.LayerNorm):
    """LayerNorm that computes and returns float32 whatever the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension of ``input``."""
        weight, bias = self.weight.float(), None if self.bias is None else self.bias.float()
        return nn.functional.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)


class Float32RMSNorm(nn.Module):
    """RMSNorm (weight only) that computes and returns float32 whatever the dtype of its input."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        """Divide the last dimension of ``input`` by its root mean square, then scale by the weight."""
        x = input.float()
        return self.weight.float() * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def matrix_input(x: Tensor, linear: nn.Module) -> Tensor:
    """Cast x to the dtype of a linear layer's weight; packed low-bit weights cast their input themselves."""
    weight = cast(Tensor, linear.weight)
    return x.to(weight.dtype) if weight.is_floating_point() else x


class PhiAttention(nn.Module):
    """Causal self-attention with partial rotary embedding, fused q/k/v projection and optional q/k LayerNorm."""

    def __init__(self, config: TinyGPTVTextConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        factor = cast(dict[str, Any], config.rope_parameters)["partial_rotary_factor"]
        self.rotary_dim = int(self.head_dim * factor)
        if self.rotary_dim % 2:
            raise ValueError(
                f"partial_rotary_factor={factor} of heads of {self.head_dim} is {self.rotary_dim} numbers, which must "
                "be even: choose another factor, width or number of heads."
            )
        # What transformers' attention functions read from the module:
        self.num_key_value_groups = 1
        self.is_causal = True

        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        norm = (lambda: Float32LayerNorm(self.head_dim, eps=config.layer_norm_eps)) if config.qk_layernorm else None
        self.q_layernorm = norm() if norm else nn.Identity()
        self.k_layernorm = norm() if norm else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: [B, S, D].
            position_embeddings: cosine and sine, [B, S, rotary_dim] each.
            attention_mask: what ``create_causal_mask`` returns for the chosen attention implementation.
            past_key_values: cache that is read and extended.
            cu_seq_lens_q: int32 [L + 1], where the one row (B = 1) holds L sequences, which attend to themselves: the
                first position of each, and S. No mask and no cache then.
            max_length_q: at least the positions of the longest of them.
            kwargs: for the attention function.

        Returns:
            Output [B, S, D] and, from the eager implementation, attention weights [B, N, S, S].
        """
        batch, length, width = hidden_states.shape
        qkv = self.qkv_proj(matrix_input(hidden_states, self.qkv_proj))
        qkv = qkv.view(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.unbind(2)  # [B, S, N, H] each
        flat = cu_seq_lens_q is not None
        if not flat:  # transformers' attention functions take [B, N, S, H]
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, key = self.q_layernorm(query), self.k_layernorm(key)

        cos, sin = position_embeddings
        query_rotated, key_rotated = apply_rotary_pos_emb(
            query[..., : self.rotary_dim], key[..., : self.rotary_dim], cos, sin, unsqueeze_dim=2 if flat else 1
        )
        query = torch.cat((query_rotated, query[..., self.rotary_dim :]), dim=-1).to(value.dtype)
        key = torch.cat((key_rotated, key[..., self.rotary_dim :]), dim=-1).to(value.dtype)

        if cu_seq_lens_q is not None:
            assert max_length_q is not None and past_key_values is None, "a flat batch has no cache"
            output = varlen_attention(query[0], key[0], value[0], cu_seq_lens_q, max_length_q, self.scaling)
            return self._project(output.view(batch, length, width)), None

        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self._project(output.reshape(batch, length, width)), weights

    def _project(self, output: Tensor) -> Tensor:
        return self.dense(matrix_input(output, self.dense))


class PhiDecoderLayer(GradientCheckpointingLayer):
    """One parallel block: attention and MLP read the same normalised input and are added to the residual."""

    def __init__(self, config: TinyGPTVTextConfig, layer_idx: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = PhiAttention(config, layer_idx)
        self.mlp = PhiMLP(config)
        self.input_layernorm = Float32LayerNorm(width, eps=eps) if config.input_layernorm else nn.Identity()
        self.attention_rmsnorm = (
            Float32RMSNorm(width, config.attention_rmsnorm_eps) if config.attention_rmsnorm else nn.Identity()
        )
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor, dropout_seeds: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Map the residual stream [B, S, D] (float32) to the next one.

        Args:
            hidden_states: the stream.
            dropout_seeds: of this layer; computes it with fused kernels (``fused_layer``).
            kwargs: for the attention.
        """
        if dropout_seeds is not None:
            return fused_layer(self, hidden_states, dropout_seeds, **kwargs)
        normed = self.input_layernorm(hidden_states)
        attention_output, _ = self.self_attn(normed, **kwargs)
        attention_output = self.resid_dropout(self.attention_rmsnorm(attention_output))
        mlp_output = self.resid_dropout(self.mlp(matrix_input(normed, self.mlp.fc1)))
        return attention_output + mlp_output + hidden_states


class LanguageModel(PreTrainedModel):
    """Phi without its language head: embeddings or ids in, final hidden states out."""

    config_class = TinyGPTVTextConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["PhiDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": PhiDecoderLayer, "attentions": PhiAttention}
    _keep_in_fp32_modules_strict = ["[a-z]_layernorm", "input_layernorm", "final_layernorm", "attention_rmsnorm"]

    def __init__(self, config: TinyGPTVTextConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PhiDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.rotary_emb = PhiRotaryEmbedding(config)
        self.final_layernorm = Float32LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        fused: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run all layers.

        Args:
            input_ids: [B, S]; give either these or ``inputs_embeds``.
            attention_mask: [B, S], 1 for real positions; or None.
            position_ids: [B, S]; None counts 0..S-1 (after the cache) whatever the mask says, as in training.
            past_key_values: cache to extend.
            inputs_embeds: [B, S, D].
            use_cache: make a cache where none is given.
            fused: compute the layers with fused kernels (``fused_layer``) where all norms and ``cu_seq_lens_q`` exist.
            kwargs: for the layers; with ``cu_seq_lens_q`` and ``max_length_q`` (``PhiAttention``) there is one row of
                several sequences, whose ``position_ids`` restart.

        Returns:
            ``last_hidden_state`` [B, S, D] float32 after the final norm, and the cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + past

        mask = None
        if kwargs.get("cu_seq_lens_q") is None:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=matrix_input(inputs_embeds, cast(PhiDecoderLayer, self.layers[0]).self_attn.dense),
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        hidden_states = inputs_embeds.float()  # the residual stream
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        seeds: Sequence[Tensor | None] = [None] * len(self.layers)
        if fused and kwargs.get("cu_seq_lens_q") is not None and can_fuse(cast(TinyGPTVTextConfig, self.config)):
            seeds = draw_seeds(len(self.layers), hidden_states.device)
        for layer, dropout_seeds in zip(self.layers, seeds, strict=True):
            hidden_states = layer(
                hidden_states,
                dropout_seeds=dropout_seeds,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden_states), past_key_values=past_key_values
        )
