"""A model's configuration, read off the shapes of foreign tensors (and the config.json beside the language weights)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Blip2QFormerConfig

from tinygptv.checkpoint.file_kinds import FileKindError, read_json_object
from tinygptv.checkpoint.weight_files import WeightFileError
from tinygptv.config import EvaVisionConfig, TinyGPTVConfig, TinyGPTVTextConfig
from tinygptv.json_object import JsonObject

RELEASE_VISION_HEAD = 88
RELEASE_QFORMER_HEAD = 64
PHI2_HEAD = 80
"""Head widths of the release's parts, which no tensor shows."""
_LARGEST_SETTING = 1 << 22


def language_settings(language: str | Path | None) -> JsonObject:
    """config.json beside the language weights; empty where there is none."""
    if language is None:
        return {}
    folder = Path(language) if Path(language).is_dir() else Path(language).parent
    file = folder / "config.json"
    try:
        settings = read_json_object(file) if file.is_file() else {}
    except FileKindError as error:
        raise WeightFileError(str(error)) from error
    for name in ("num_attention_heads", "n_head", "rotary_dim", "max_position_embeddings", "n_positions"):
        value = settings.get(name)
        if value is not None and not (isinstance(value, int) and 0 < value < _LARGEST_SETTING):
            raise WeightFileError(f"{file} has {name}={value!r:.40}; it must be a positive whole number.")
    quantized = settings.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise WeightFileError(
            f"{file} says that the weights are quantized ({method or 'quantization_config'}): give the original ones."
        )
    return settings


class Sizes:
    """Reads a configuration off tensor shapes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], language_settings: JsonObject) -> None:
        self.shapes = shapes
        self.settings = language_settings

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that the model cannot do without."""
        if name not in self.shapes:
            part = name.split(".", maxsplit=1)[0]
            raise WeightFileError(f"no file supplies {name}: give the file that holds the {part} ({WHO_HOLDS[part]}).")
        return self.shapes[name]

    def depth(self, prefix: str) -> int:
        """1 + the largest layer number after a prefix."""
        found = [int(name[len(prefix) :].split(".")[0]) for name in self.shapes if name.startswith(prefix)]
        return max(found, default=-1) + 1

    def config(
        self, image_size: int | None, vision_heads: int | None, qformer_heads: int | None, lora_alpha: int
    ) -> TinyGPTVConfig:
        """The configuration of a model that these tensors fit; arguments as for ``load_release``."""
        text, lora_rank = self.text()
        query_shape = self.shape("qformer.query_tokens")
        projector = "projector.linear_1.weight"
        defaults = TinyGPTVConfig.phi2()
        return TinyGPTVConfig(
            vision_config=self.vision(image_size, vision_heads),
            qformer_config=self.qformer(qformer_heads),
            text_config=text,
            num_query_tokens=query_shape[1],
            projector_hidden_size=self.shape(projector)[0]
            if projector in self.shapes
            else defaults.projector_hidden_size,
            # The row after the last tokenizer entry; a table without spare rows gets an id outside of it.
            image_token_id=min(defaults.image_token_id, text.vocab_size),
            scope=defaults.scope,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=defaults.lora_dropout,
        )

    def vision(self, image_size: int | None, heads: int | None) -> EvaVisionConfig:
        """Sizes of the vision encoder."""
        width, _, patch, _ = self.shape("vision_encoder.vit.patch_embed.proj.weight")
        positions = self.shape("vision_encoder.vit.pos_embed")[1] - 1
        side = round(positions**0.5)
        if side * side != positions:
            raise WeightFileError(f"pos_embed has {positions} patch rows, which is no square grid.")
        return EvaVisionConfig(
            image_size=image_size or side * patch,
            patch_size=patch,
            hidden_size=width,
            num_hidden_layers=self.depth("vision_encoder.vit.blocks."),
            num_attention_heads=heads or _heads(width, RELEASE_VISION_HEAD, "vision_heads"),
            intermediate_size=self.shape("vision_encoder.vit.blocks.0.mlp.fc1.weight")[0],
        )

    def qformer(self, heads: int | None) -> Blip2QFormerConfig:
        """Sizes of the Q-Former; every n-th layer reads the image."""
        prefix = "qformer.encoder.encoder.layer."
        width = self.shape("qformer.query_tokens")[2]
        crossing = sorted(
            {int(n[len(prefix) :].split(".")[0]) for n in self.shapes if n.startswith(prefix) and "crossattention" in n}
        )
        return Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=self.depth(prefix),
            num_attention_heads=heads or _heads(width, RELEASE_QFORMER_HEAD, "qformer_heads"),
            intermediate_size=self.shape(f"{prefix}0.intermediate_query.dense.weight")[0],
            encoder_hidden_size=self.shape(f"{prefix}0.crossattention.attention.key.weight")[1],
            cross_attention_frequency=crossing[1] - crossing[0] if len(crossing) > 1 else max(self.depth(prefix), 1),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )

    def text(self) -> tuple[TinyGPTVTextConfig, int]:
        """Sizes of the language model, and the LoRA rank (0 without)."""
        vocab, width = self.shape("language_model.embed_tokens.weight")
        layer = "language_model.layers.0"
        norm, lora = f"{layer}.self_attn.q_layernorm.weight", f"{layer}.self_attn.qkv_proj.lora_A.weight"
        heads = self.settings.get("num_attention_heads") or self.settings.get("n_head")
        if norm in self.shapes:
            head = self.shape(norm)[0]
            if heads and width // head != heads:
                raise WeightFileError(
                    f"config.json says {heads} heads but q_layernorm has width {head} at hidden size {width}."
                )
            heads = width // head
        heads = heads or _heads(width, PHI2_HEAD, "num_attention_heads in the language folder's config.json")
        rotary = self.settings.get("partial_rotary_factor") or (self.settings.get("rope_parameters") or {}).get(
            "partial_rotary_factor"
        )
        if rotary is None and self.settings.get("rotary_dim"):
            rotary = self.settings["rotary_dim"] / (width // heads)
        end = self.settings.get("eos_token_id")
        end = end if isinstance(end, int) else min(50256, vocab - 1)
        # transformers keeps it among rope_parameters; mypy knows no such argument
        partial_rotary: Any = {"partial_rotary_factor": rotary or 0.4}
        config = TinyGPTVTextConfig(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=self.depth("language_model.layers."),
            num_attention_heads=heads,
            intermediate_size=self.shape(f"{layer}.mlp.fc1.weight")[0],
            resid_pdrop=self.settings.get("resid_pdrop", 0.1),
            max_position_embeddings=self.settings.get("max_position_embeddings")
            or self.settings.get("n_positions")
            or 2048,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
            **partial_rotary,
        )
        return config, self.shape(lora)[0] if lora in self.shapes else 0


def _heads(width: int, head_width: int, setting: str) -> int:
    if width % head_width:
        raise WeightFileError(
            f"a width of {width} does not divide into heads of {head_width}: say how many there are with {setting}."
        )
    return width // head_width


WHO_HOLDS = {
    "vision_encoder": "vision=eva_vit_g.pth; its ln_vision is in BLIP-2's file, qformer=",
    "qformer": "qformer=blip2_pretrained_flant5xxl.pth",
    "projector": "checkpoint=, or projection= for its first layer",
    "language_model": "language=, the Phi-2 folder",
    "lm_head": "language=, the Phi-2 folder",
}
