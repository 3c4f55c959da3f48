"""TinyGPTVForConditionalGeneration: images and text in, text out, as a transformers model.

How an image enters the language model's input (Q query tokens per image, here Q = 3):

    input_ids      BOS  #   #   #   what  is  it  ?
    embedded as    bos  i1  i2  i3  what  is  it  ?        # = image_token_id, i1..i3 = image embeddings

Notation: B batch, N images, R image side, P patch tokens, V vision width, Q query tokens, F Q-Former width,
D language width, S sequence, K vocabulary, M supervised positions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from timm.models.eva import Eva, EvaAttention
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from tinygptv.config import TinyGPTVConfig
from tinygptv.data.sample import IGNORE_INDEX
from tinygptv.model.adapters import AdapterMixin, lora_module
from tinygptv.model.backbone import Backbone
from tinygptv.model.generation import ImageGenerationMixin
from tinygptv.model.head_loss import Scorer, frozen_head_losses
from tinygptv.model.language_model import LanguageModel, matrix_input
from tinygptv.model.projector import Projector
from tinygptv.model.qformer import QFormer
from tinygptv.model.vision_encoder import VisionEncoder

FLOAT32_NAMES = re.compile(r"^(projector\.|language_model\..*(_layernorm|attention_rmsnorm|lora_[AB])\.)")
"""Parameters that stay float32 whatever the dtype of the frozen matrices: what stages train, and the norms' biases."""


@dataclass
class TinyGPTVOutput(ModelOutput):
    """Output of ``TinyGPTVForConditionalGeneration.forward``.

    Attributes:
        loss: mean cross-entropy over supervised positions of the whole batch, where labels were given.
        logits: [B, S, K] float32 (or the last ``logits_to_keep`` positions).
        past_key_values: the cache after this call.
        hidden_states: residual stream before each layer and after the final norm, where asked for.
        attentions: attention weights of each layer, where asked for (eager attention only).
        image_embeds: [N, Q, D], where they were given as such.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_embeds: Tensor | None = None


class TinyGPTVForConditionalGeneration(PreTrainedModel, ImageGenerationMixin, AdapterMixin):
    """Vision encoder, Q-Former, projector and language model with its head.

    The vision encoder and the Q-Former run in evaluation mode whatever ``train()`` says, and without gradients while
    all their parameters are frozen.

    Attributes:
        load_report: the ``LoadReport`` of a model that ``load_release`` built, else None.
    """

    load_report: Any = None

    config_class = TinyGPTVConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["PhiDecoderLayer", "EvaBlock", "Blip2QFormerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # FLOAT32_NAMES in transformers' terms.
    _keep_in_fp32_modules_strict = [
        "[a-z]_layernorm",
        "input_layernorm",
        "final_layernorm",
        "attention_rmsnorm",
        "projector",
        "lora_",
    ]

    def __init__(self, config: TinyGPTVConfig) -> None:
        super().__init__(config)
        text, qformer = config.text_config, config.qformer_config
        self.vision_encoder = VisionEncoder(config.vision_config)
        self.qformer = QFormer(qformer, config.num_query_tokens)
        self.projector = Projector(qformer.hidden_size, config.projector_hidden_size, text.hidden_size)
        self.language_model = LanguageModel(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size)
        if config.lora_rank:
            lora_module().add_lora(self.language_model, config.lora_rank, config.lora_alpha, config.lora_dropout)
        self.post_init()

    # ------------------------------------------------------------------ what transformers asks of a model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As in transformers, for checkpoints.

        Raises:
            ValueError: the folder is a quantized artifact.
        """
        if Path(str(pretrained_model_name_or_path), "quantization.json").is_file():  # checkpoint.folders' name
            raise ValueError(
                f"{pretrained_model_name_or_path} is a quantized artifact, which transformers does not read: give the "
                "checkpoint that it was made from, or load it with tinygptv.inference.loading.load_for_inference."
            )
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @property
    def base_model(self) -> nn.Module:
        """Everything but the language head (``Backbone``)."""
        parts = {name: part for name, part in self.named_children() if name != "lm_head"}
        return Backbone(parts, self.config, self._hidden_states)

    def get_input_embeddings(self) -> nn.Module:
        """Token embedding of the language model."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.language_model.embed_tokens = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        """Language head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language head."""
        self.lm_head = new_embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what no checkpoint supplied: normal(0, 0.02) matrices, unit norms, zero LoRA B."""
        if isinstance(module, QFormer):
            nn.init.normal_(module.query_tokens, std=self.config.initializer_range)
        elif isinstance(module, Eva):
            nn.init.trunc_normal_(cast(Tensor, module.pos_embed), std=0.02)
            nn.init.trunc_normal_(cast(Tensor, module.cls_token), std=0.02)
        elif isinstance(module, EvaAttention):
            # k_bias is a buffer of zeros that no checkpoint holds; built on the meta device it would stay unset.
            for bias in (module.q_bias, module.k_bias, module.v_bias):
                nn.init.zeros_(cast(Tensor, bias))
        elif hasattr(module, "reset_lora_parameters"):
            lora_module().reset_lora(module)
        else:
            super()._init_weights(module)

    def train(self, mode: bool = True) -> TinyGPTVForConditionalGeneration:
        """Set training mode; the frozen encoder and Q-Former stay in evaluation mode."""
        super().train(mode)
        self.vision_encoder.eval()
        self.qformer.eval()
        return self

    # ------------------------------------------------------------------ images

    def encode_query_features(self, pixel_values: Tensor) -> Tensor:
        """Run the vision encoder and the Q-Former.

        Args:
            pixel_values: [N, 3, R, R].

        Returns:
            Query features [N, Q, F]; they carry no gradient while both parts are frozen.
        """
        trainable = any(p.requires_grad for part in (self.vision_encoder, self.qformer) for p in part.parameters())
        with torch.set_grad_enabled(trainable and torch.is_grad_enabled()):
            return self.qformer(self.vision_encoder(pixel_values))

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Turn images into embeddings for the language model.

        Args:
            pixel_values: [N, 3, R, R].

        Returns:
            Image embeddings [N, Q, D].
        """
        return self.projector(self.encode_query_features(pixel_values))

    def set_image_size(self, image_size: int) -> None:
        """Change the image side R in place, e.g. from 224 to 448 before stage 4."""
        self.vision_encoder.set_image_size(image_size)
        self.config.vision_config.image_size = image_size

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        query_features: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_positions: Tensor | None = None,
    ) -> Tensor:
        """Embed tokens and put image embeddings where ``input_ids`` holds ``image_token_id``.

        Args:
            input_ids: [B, S]; each image takes Q positions, images in batch order.
            pixel_values: [N, 3, R, R] images, or
            query_features: [N, Q, F] cached Q-Former outputs, or
            image_embeds: [N, Q, D] ready embeddings; at most one of the three.
            image_positions: [N * Q] image positions of a single row (B = 1), where the caller knows them and
                ``input_ids`` holds ordinary ids there: a GPU then need not search.

        Returns:
            [B, S, D].

        Raises:
            ValueError: the number of image positions is not N * Q.
        """
        if image_embeds is None and query_features is None and pixel_values is not None:
            query_features = self.encode_query_features(pixel_values)
        if image_embeds is None and query_features is not None:
            image_embeds = self.projector(query_features)
        if image_positions is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if image_embeds is None:
                return inputs_embeds
            rows = image_embeds.flatten(0, 1).unsqueeze(0)
            return inputs_embeds.index_copy(1, image_positions, rows.to(inputs_embeds.dtype))

        is_image = input_ids == self.config.image_token_id
        inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        can_look = not torch.compiler.is_compiling()  # at values: a compiled or exported graph has none yet
        if image_embeds is None:
            if can_look and is_image.any():
                raise ValueError(
                    f"input_ids marks {int(is_image.sum())} image positions but no image was given: pass pixel_values."
                )
            return inputs_embeds
        is_cpu = input_ids.device.type == "cpu"  # a GPU would be waited for
        if can_look and is_cpu and int(is_image.sum()) != image_embeds.shape[0] * image_embeds.shape[1]:
            raise ValueError(
                f"input_ids marks {int(is_image.sum())} image positions but {image_embeds.shape[0]} images of "
                f"{image_embeds.shape[1]} query tokens were given: each <ImageHere> needs exactly one image."
            )
        return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), image_embeds.to(inputs_embeds.dtype))

    # ------------------------------------------------------------------ forward

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        pixel_values: Tensor | None = None,
        query_features: Tensor | None = None,
        image_embeds: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> TinyGPTVOutput:
        """Predict the next token at every position.

        Args:
            input_ids: [B, S] with ``image_token_id`` at image positions; or give ``inputs_embeds``.
            attention_mask: [B, S], 1 for real positions.
            position_ids: [B, S]; None counts 0..S-1, as in training.
            past_key_values: cache to extend.
            inputs_embeds: [B, S, D] assembled embeddings instead of ``input_ids``.
            labels: [B, S] unshifted ids, -100 where the loss does not look; logits at s are scored on labels at s + 1.
            use_cache: return a cache.
            logits_to_keep: compute logits for the last so many positions only; 0 computes all.
            pixel_values: [N, 3, R, R] images for the placeholders, in batch order.
            query_features: [N, Q, F] cached, instead of ``pixel_values``.
            image_embeds: [N, Q, D] instead of either.
            num_items_in_batch: supervised tokens of all accumulated batches, as transformers' ``Trainer`` gives it; the
                loss is then the sum divided by it, so that accumulation changes nothing.
            kwargs: what else transformers hands through to the layers.

        Returns:
            ``TinyGPTVOutput``.
        """
        outputs = self._hidden_states(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            query_features=query_features,
            image_embeds=image_embeds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.compute_logits(cast(Tensor, outputs.last_hidden_state)[:, kept])
        loss = None
        if labels is not None:
            targets = labels[:, 1:].to(logits.device)
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1),
                targets.flatten(),
                ignore_index=IGNORE_INDEX,
                reduction="mean" if num_items_in_batch is None else "sum",
            )
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return TinyGPTVOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_embeds=image_embeds,
        )

    def _hidden_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        query_features: Tensor | None = None,
        image_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds.")
            inputs_embeds = self.embed(input_ids, pixel_values, query_features, image_embeds)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Language head: [..., D] to [..., K] in float32."""
        return self.lm_head(matrix_input(hidden_states, self.lm_head)).float()

    def token_losses(
        self,
        inputs_embeds: Tensor,
        supervised_positions: Tensor,
        supervised_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        scorer: Scorer | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Cross-entropy of each supervised token, with the language head run on supervised positions only.

        ``forward``'s loss is their mean. Training divides the sum once, by the tokens of all micro-batches and workers.

        Args:
            inputs_embeds: [B, S, D] from ``embed``.
            supervised_positions: [M] indices into the flattened [B * S] positions whose *next* token is scored.
            supervised_ids: [M] those next tokens.
            attention_mask: [B, S] or None.
            position_ids: [B, S] or None; where they start again (packed samples), attention starts again too.
            scorer: computes losses without keeping logits (``head_loss``), where the language head is frozen; None
                keeps them.
            kwargs: for the language model, e.g. ``cu_seq_lens_q``.

        Returns:
            [M] float32, in nats.
        """
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            **kwargs,
        )
        hidden_states_MD = outputs.last_hidden_state.flatten(0, 1).index_select(0, supervised_positions)
        if scorer is not None:
            head = self.lm_head
            return frozen_head_losses(hidden_states_MD, head.weight, head.bias, supervised_ids, scorer)
        return nn.functional.cross_entropy(self.compute_logits(hidden_states_MD), supervised_ids, reduction="none")


for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    # Replaces the stand-in that tinygptv.auto_classes may have put there.
    _auto_class.register(TinyGPTVConfig, TinyGPTVForConditionalGeneration, exist_ok=True)
