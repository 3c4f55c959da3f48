"""How far a quantized model is from the full one: loss on held-out answers, and whether greedy answers stay the same.

Both models see the same samples: canonical rows of any data set, or drawn scenes where none is given. The wording of
each sample is drawn once, from the seed.

Notation: N images, Q query tokens, D language width, M supervised tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import cast

import numpy as np
import torch
from torch import Tensor

from tinygptv.data.images import open_image
from tinygptv.data.processing import TinyGPTVProcessor
from tinygptv.data.sample import SampleEncoder, SampleRow, TextLimits, chooser, render_sample
from tinygptv.inference.batch import Answerer, Prompt
from tinygptv.inference.sample_losses import sample_losses
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.quantization.metadata import DriftRecord

MAX_TEXT_TOKENS = 160
MAX_NEW_TOKENS = 24
_BATCH = 8


@dataclass(frozen=True)
class HeldOut:
    """Losses and answers of one model on the samples.

    Attributes:
        losses: [M] cross-entropy of each supervised token, in nats.
        answers: the greedy answer to each sample's first instruction.
    """

    losses: Tensor
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Drift:
    """Quantized against full.

    Attributes:
        loss: rise of the held-out loss, in nats per token; negative where the quantized model is better.
        full_loss: held-out loss of the full model.
        quantized_loss: the same of the quantized one.
        full_perplexity: exp of ``full_loss``.
        quantized_perplexity: exp of ``quantized_loss``.
        answer_agreement: share of greedy answers that are equal, character by character.
        num_tokens: supervised tokens behind the losses.
        num_answers: answers compared.
    """

    loss: float
    full_loss: float
    quantized_loss: float
    full_perplexity: float
    quantized_perplexity: float
    answer_agreement: float
    num_tokens: int
    num_answers: int

    def to_dict(self) -> DriftRecord:
        """Rounded, for ``quantization.json``."""
        return cast(DriftRecord, {key: round(value, 6) for key, value in asdict(self).items()})


def compare(full: HeldOut, quantized: HeldOut) -> Drift:
    """The drift between two measurements of the same samples."""
    before, after = full.losses.double().mean().item(), quantized.losses.double().mean().item()
    same = [a == b for a, b in zip(full.answers, quantized.answers, strict=True)]
    return Drift(
        loss=after - before,
        full_loss=before,
        quantized_loss=after,
        full_perplexity=float(np.exp(before)),
        quantized_perplexity=float(np.exp(after)),
        answer_agreement=sum(same) / len(same),
        num_tokens=len(full.losses),
        num_answers=len(same),
    )


@torch.inference_mode()
def measure(
    model: TinyGPTVForConditionalGeneration,
    processor: TinyGPTVProcessor,
    rows: Sequence[SampleRow],
    seed: int = 0,
) -> HeldOut:
    """Losses and answers of one model.

    Args:
        model: in evaluation mode.
        processor: goes with it.
        rows: samples; at least one.
        seed: wordings follow from it.

    Raises:
        ValueError: a row's image cannot be decoded, or its task is unknown.
    """
    choose = chooser(np.random.default_rng(seed))
    rendered = [render_sample(row, choose) for row in rows]
    images = [None if row.image is None else open_image(row.image) for row in rows]
    answerer = Answerer(model, processor, batch_size=_BATCH)
    encoded = answerer.encode([image for image in images if image is not None])
    number = count()
    shown = [None if image is None else next(number) for image in images]
    encoder = SampleEncoder(processor.layout(), TextLimits(MAX_TEXT_TOKENS))
    samples = [encoder.encode(exchanges) for exchanges in rendered]
    embeds = [None if index is None else encoded[index] for index in shown]
    losses = sample_losses(model, samples, embeds, processor.tokenizer.pad_token_id)
    prompts = [
        Prompt(exchanges[0].instruction, index, max_new_tokens=MAX_NEW_TOKENS)
        for exchanges, index in zip(rendered, shown, strict=True)
    ]
    replies = answerer.answer(prompts, encoded)
    return HeldOut(torch.cat(losses), tuple(reply.text + reply.error for reply in replies))
