"""Sizes and switches of the model: one configuration object, two presets.

``TinyGPTVConfig.phi2()`` is the paper's system (3.9 billion parameters); ``TinyGPTVConfig.mini()`` is the embedded
default, a few million parameters with the same code path. Source: arXiv 2312.16862 section 3 and the release.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from transformers import AutoConfig, Blip2QFormerConfig, PhiConfig
from transformers.configuration_utils import PretrainedConfig

ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
"""Attention of transformers that the language model runs with; others could name code to download."""

LORA_TARGETS = ("qkv_proj", "dense")
"""Linear layers of each language layer that carry a LoRA adapter: the fused q/k/v projection and the output one."""


_FROM_MAPPING: Any = None
"""Default of a part's configuration, which may also be given as a mapping; ``__post_init__`` fills in the object."""


class EvaVisionConfig(PretrainedConfig):
    """EVA ViT-g as BLIP-2 uses it: no final norm inside the ViT, one LayerNorm (``ln_vision``) after it.

    Attributes:
        image_size: side R of the square input, in pixels; a multiple of ``patch_size``.
        intermediate_size: width of the MLP (EVA writes it as ratio 4.3637 of ``hidden_size``, truncated).
        output_layer_norm_eps: epsilon of ``ln_vision``.
    """

    model_type = "tinygptv_vision"
    base_config_key = "vision_config"

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1408
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    intermediate_size: int = 6144
    layer_norm_eps: float = 1e-6
    output_layer_norm_eps: float = 1e-5

    @property
    def num_patches(self) -> int:
        """Number of patch tokens, without the class token."""
        return (self.image_size // self.patch_size) ** 2


class TinyGPTVTextConfig(PhiConfig):
    """Phi plus the norms that TinyGPT-V adds; each can be switched off for ablations (paper Table 3).

    Attributes:
        qk_layernorm: LayerNorm on every query and key head before rotary embedding.
        attention_rmsnorm: RMSNorm on the attention branch before the residual sum.
        input_layernorm: Phi's own LayerNorm at the start of each layer.
        attention_rmsnorm_eps: epsilon of that RMSNorm.
    """

    model_type = "tinygptv_text"
    base_config_key = "text_config"
    # Phi's plans of parallel layouts name its three projections; ours are one.
    base_model_tp_plan = None  # type: ignore[assignment]
    base_model_pp_plan = None  # type: ignore[assignment]

    qk_layernorm: bool = True
    attention_rmsnorm: bool = True
    input_layernorm: bool = True
    attention_rmsnorm_eps: float = 1e-6
    # The fused form of Phi-2's gelu_new (tanh approximation): the same formula, one kernel.
    hidden_act: str = "gelu_pytorch_tanh"


class TinyGPTVConfig(PretrainedConfig):
    """The whole model: vision encoder, Q-Former, projector, language model, LoRA.

    Attributes:
        num_query_tokens: vectors that stand for one image in the language model's input (Q).
        projector_hidden_size: width between the projector's two linear layers; 4096 lets a MiniGPT-4 projection load.
        image_token_id: id that marks one of the Q image positions in ``input_ids``; never embedded.
        template: key of ``prompts.TEMPLATES`` that the weights were last trained with; chat, evaluation and serving use
            it.
        scope: images that the weights know, as the web page tells it; empty where nobody said.
        lora_rank: rank of the LoRA adapters; 0 builds a model without them.
        lora_alpha: LoRA scale numerator; the adapter's output is multiplied by ``lora_alpha / lora_rank``.
        lora_dropout: dropout on the adapter's input, active in training only.
        lora_merged: adapters were folded into the weights, which are no longer Phi-2's.
    """

    model_type = "tinygptv"
    # It names no code in a folder. TRL reads it of configurations whose models transformers itself does not have.
    auto_map: ClassVar[dict[str, str]] = {}
    sub_configs = {
        "vision_config": EvaVisionConfig,
        "qformer_config": Blip2QFormerConfig,
        "text_config": TinyGPTVTextConfig,
    }

    vision_config: EvaVisionConfig = _FROM_MAPPING
    qformer_config: Blip2QFormerConfig = _FROM_MAPPING
    text_config: TinyGPTVTextConfig = _FROM_MAPPING
    num_query_tokens: int = 32
    projector_hidden_size: int = 4096
    image_token_id: int = 50295
    template: str = "human"
    scope: Literal["", "photographs", "drawn scenes"] = ""
    lora_rank: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_merged: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name, config_class in self.sub_configs.items():
            value = getattr(self, name)
            if not isinstance(value, PretrainedConfig):
                setattr(self, name, config_class(**{**_DEFAULTS[name], **(value or {})}))
        vision_width = self.vision_config.hidden_size
        if self.qformer_config.encoder_hidden_size != vision_width:
            raise ValueError(
                f"qformer_config.encoder_hidden_size is {self.qformer_config.encoder_hidden_size} but "
                f"vision_config.hidden_size is {vision_width}: the Q-Former reads the vision encoder's output, "
                "so set both to the same width."
            )
        super().__post_init__(**kwargs)

    @classmethod
    def phi2(cls, image_size: int = 224, **overrides: Any) -> TinyGPTVConfig:
        """The paper's sizes: EVA ViT-g (39 blocks), BLIP-2 Q-Former, Phi-2.

        Args:
            image_size: 224 for stages 1 to 3, 448 for stage 4.
            overrides: other fields of ``TinyGPTVConfig``.
        """
        fields: dict[str, Any] = {"vision_config": EvaVisionConfig(image_size=image_size), "scope": "photographs"}
        return cls(**{**fields, **overrides})

    @classmethod
    def mini(cls, image_size: int = 64, vocab_size: int = 640, **overrides: Any) -> TinyGPTVConfig:
        """The miniature's sizes: the same parts at a few million parameters, for laptops and tests.

        Args:
            image_size: 64 for stages 1 to 3, 128 for stage 4.
            vocab_size: rows of the token embedding; the miniature's tokenizer has fewer tokens.
            overrides: other fields of ``TinyGPTVConfig``.
        """
        fields: dict[str, Any] = {
            "vision_config": {
                "image_size": image_size,
                "patch_size": 8,
                "hidden_size": 128,
                "num_hidden_layers": 5,
                "num_attention_heads": 4,
                "intermediate_size": 384,
            },
            "qformer_config": {
                "hidden_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "intermediate_size": 256,
                "encoder_hidden_size": 128,
            },
            "text_config": {
                "vocab_size": vocab_size,
                "hidden_size": 192,
                "num_hidden_layers": 5,
                "num_attention_heads": 6,
                "intermediate_size": 576,
                "max_position_embeddings": 512,
                "resid_pdrop": 0.0,
                "bos_token_id": 0,
                "eos_token_id": 0,
                "pad_token_id": 0,
            },
            "num_query_tokens": 16,
            "projector_hidden_size": 256,
            "image_token_id": vocab_size - 1,
            "scope": "drawn scenes",
            "lora_rank": 16,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
        }
        return cls(**{**fields, **overrides})


_DEFAULTS: dict[str, dict[str, Any]] = {
    "vision_config": {},
    # Dropouts are listed by BERT's configuration, but the frozen Q-Former always runs in evaluation mode.
    "qformer_config": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "text_config": {
        "vocab_size": 51200,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "partial_rotary_factor": 0.4,
        "resid_pdrop": 0.1,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": 50256,
    },
}

AutoConfig.register("tinygptv", TinyGPTVConfig)
AutoConfig.register("tinygptv_vision", EvaVisionConfig)
AutoConfig.register("tinygptv_text", TinyGPTVTextConfig)
