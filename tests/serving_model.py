"""A model that serving tests talk to: random weights, made on the spot, no files, no network."""

from __future__ import annotations

import base64
import copy
import io
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tinygptv import TinyGPTVConfig, TinyGPTVForConditionalGeneration, TinyGPTVProcessor

VOCAB_SIZE = 400
IMAGE_SIZE = 32


@cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's alphabet; ``<|endoftext|>`` is id 0 and every id has a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "###Human: ###Assistant: <Img></Img> [vqa] [refer] what colour is the red circle? {<12><34><56><78>} héllo"
    more = " ".join(a + b for a in "bcdfghklmnprst" for b in ("all", "est", "ing", "ound", "ent", "ick"))
    tokenizer.train_from_iterator([words, more] * 50, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end, model_max_length=512
    )


def make_config(**overrides) -> TinyGPTVConfig:
    return TinyGPTVConfig.mini(
        vision_config={
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 192,
        },
        qformer_config={
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "encoder_hidden_size": 128,
        },
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "max_position_embeddings": 256,
            "resid_pdrop": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
        },
        image_token_id=VOCAB_SIZE,
        num_query_tokens=4,
        **overrides,
    )


def make_model(seed: int = 0, lora: bool = False) -> TinyGPTVForConditionalGeneration:
    """A copy of the model with random weights, large enough that the next token depends on all of the prompt."""
    return copy.deepcopy(_model(seed, lora))


@cache
def _model(seed: int, lora: bool) -> TinyGPTVForConditionalGeneration:
    torch.manual_seed(seed)
    model = TinyGPTVForConditionalGeneration(make_config(lora_rank=4 if lora else 0)).eval()
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.25)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
        model.lm_head.weight.normal_(0, 0.5)
        model.projector.linear_2.weight.normal_(0, 0.3)
        torch.manual_seed(seed + 3)  # with which answers of a few tokens tell images and prompts apart
        for parameter in model.qformer.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.1)
    return model.requires_grad_(False)


@cache
def make_processor() -> TinyGPTVProcessor:
    return TinyGPTVProcessor.from_config(make_config(), make_tokenizer())


def save_checkpoint(path: Path, seed: int = 0, lora: bool = False) -> Path:
    make_model(seed, lora).save_pretrained(path)
    make_processor().save_pretrained(path)
    return path


def make_image(seed: int = 0, width: int = 60, height: int = 40, kind: str = "PNG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
