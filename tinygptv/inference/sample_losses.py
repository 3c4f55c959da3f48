"""Encoded samples -> the loss of each of their supervised tokens: ranking of choices and the drift measurement.

Notation: Q query tokens, D language width, M supervised tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinygptv.data.collate import LoadedSample, collate
from tinygptv.data.sample import EncodedSample
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

_PADDED_TOKENS = 8192


@torch.inference_mode()
def sample_losses(
    model: TinyGPTVForConditionalGeneration,
    samples: Sequence[EncodedSample],
    image_embeds: Sequence[Tensor | None],
    pad_token_id: int,
) -> list[Tensor]:
    """Cross-entropy of every supervised token.

    Args:
        model: in evaluation mode.
        samples: sequences of any lengths.
        image_embeds: [Q, D] of each sample's image; None where it has none.
        pad_token_id: fills the ends of shorter rows.

    Returns:
        [M] float32 per sample, in nats, on the CPU, in the order of the samples.
    """
    losses: list[Tensor] = [torch.zeros(0)] * len(samples)
    for members in _batches_by_length([len(sample.input_ids) for sample in samples]):
        batch = collate([LoadedSample(samples[i], source=row) for row, i in enumerate(members)], pad_token_id)
        shown = [embeds for i in members if (embeds := image_embeds[i]) is not None]
        ids, positions, targets = (
            torch.from_numpy(array).to(model.device)
            for array in (batch.input_ids, batch.supervised_positions, batch.supervised_ids)
        )
        inputs_embeds = model.embed(ids, image_embeds=torch.stack(shown) if shown else None)
        losses_M = model.token_losses(inputs_embeds, positions, targets).float().cpu()
        owner_M = torch.from_numpy(batch.supervised_sources)
        for row, i in enumerate(members):
            losses[i] = losses_M[owner_M == row]
    return losses


def _batches_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Samples of like length together, each batch within a bound of padded tokens."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > _PADDED_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches
