"""A model and a tokenizer of a few kilobytes, made in memory: tests and benchmarks need no files and no network."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tinygptv.config import TinyGPTVConfig

BOS = "<|endoftext|>"


def tiny_config(**changes: Any) -> TinyGPTVConfig:
    """Two small layers of everything; the tokenizer is ``tiny_tokenizer``."""
    fields: dict[str, Any] = {
        "vision_config": {
            "image_size": 28, "patch_size": 14, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 48,
        },
        "qformer_config": {
            "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
            "encoder_hidden_size": 32, "cross_attention_frequency": 2,
        },
        "text_config": {
            "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 48, "partial_rotary_factor": 0.5, "max_position_embeddings": 512, "resid_pdrop": 0.0,
            "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
        },
        "num_query_tokens": 4,
        "projector_hidden_size": 40,
        "image_token_id": 256,
        "lora_rank": 4,
        "lora_dropout": 0.0,
    }  # fmt: skip
    return TinyGPTVConfig.mini(**{**fields, **changes})


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte (the byte-level alphabet), and ``<|endoftext|>`` = 0 = BOS = EOS = PAD."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:255]
    vocabulary = {BOS: 0, **{character: i + 1 for i, character in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS, model_max_length=512
    )
