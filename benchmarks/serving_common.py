"""What the serving benchmarks share: models of two sizes with random weights, a workload, and percentiles."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tinygptv import TinyGPTVConfig, TinyGPTVForConditionalGeneration, TinyGPTVProcessor

WORDS = [
    "what", "where", "how", "many", "red", "blue", "green", "circle", "square", "star", "left", "right", "of", "the",
    "is", "are", "there", "in", "this", "picture",
]  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One request of the workload.

    Attributes:
        text: the question.
        image: encoded image.
        num_tokens: length of its answer.
    """

    text: str
    image: bytes
    num_tokens: int


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows the workload's words, as a trained tokenizer knows its language."""
    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(["###Human: <Img></Img> [vqa]", *WORDS, " ###Assistant: "])] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end, model_max_length=2048
    )


def make_config(size: str) -> TinyGPTVConfig:
    """``mini``: the miniature. ``width``: Phi-2's width and vocabulary, 2 of its 32 layers, a small vision encoder."""
    if size == "mini":
        return TinyGPTVConfig.mini(lora_rank=0)
    vision = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    qformer = {"encoder_hidden_size": 256, "num_hidden_layers": 2}
    return TinyGPTVConfig(
        vision_config=vision, qformer_config=qformer, text_config={"num_hidden_layers": 2}, lora_rank=0
    )


def make_checkpoint(path: Path, size: str = "mini", seed: int = 0) -> Path:
    """Save a model with random weights, large enough that its answers depend on the question and the image."""
    torch.manual_seed(seed)
    config = make_config(size)
    model = TinyGPTVForConditionalGeneration(config)
    with torch.no_grad():
        for module in (*model.language_model.modules(), model.projector.linear_2, model.lm_head):
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(0, 2 / module.in_features**0.5)
        model.language_model.embed_tokens.weight.normal_(0, 1)
    model.save_pretrained(path)
    TinyGPTVProcessor.from_config(config, make_tokenizer()).save_pretrained(path)
    return path


def make_questions(count: int, num_images: int, seed: int = 0) -> list[Question]:
    """Questions of 4 to 9 words about images of 160 x 120 pixels, answers of 8 to 40 tokens."""
    rng = np.random.default_rng(seed)
    images = [_make_image(rng) for _ in range(num_images)]
    return [
        Question(
            "[vqa] " + " ".join(rng.choice(WORDS, int(rng.integers(4, 10)))),
            images[i % num_images],
            int(rng.integers(8, 41)),
        )
        for i in range(count)
    ]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies; NaN of none."""
    return float(np.quantile(values, share)) if values else float("nan")


def _make_image(rng: np.random.Generator) -> bytes:
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()
