"""Arguments of the step's operations: groups of tensors, with their shapes.

Notation: P partial products, T tokens, D width, N heads, H head width, G slots, L cache length, O outputs and I inputs
of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Branch:
    """Output of one branch of a layer, before it is added to the residual stream.

    Attributes:
        partials: [P, T, D]; their sum is the matrix product, without bias.
        bias: float32 [D], or None.
        rms_weight: float32 [D] of the RMSNorm that follows; None where there is none.
        rms_eps: its epsilon.
    """

    partials: Tensor
    bias: Tensor | None
    rms_weight: Tensor | None = None
    rms_eps: float = 0.0


@dataclass(frozen=True)
class AttentionWeights:
    """Parameters between the q/k/v product and the cache.

    Attributes:
        bias: float32 [3 * N * H], or None.
        q_norm: LayerNorm weight and bias, float32 [H] each; (None, None) where there is none.
        k_norm: the same for keys.
        eps: of both norms.
        cos: float32 [L, H]; 1 beyond the rotary part.
        sin: float32 [L, H], signed; 0 beyond the rotary part.
        rotary_dim: numbers of a head that are rotated.
        scale: factor of the scores.
    """

    bias: Tensor | None
    q_norm: tuple[Tensor | None, Tensor | None]
    k_norm: tuple[Tensor | None, Tensor | None]
    eps: float
    cos: Tensor
    sin: Tensor
    rotary_dim: int
    scale: float


@dataclass(frozen=True)
class Cache:
    """One layer's keys and values, [G, N, L, H] each, contiguous."""

    keys: Tensor
    values: Tensor


BLOCK_INPUTS, BLOCK_WORDS = 128, 16
"""Inputs of a block of 4-bit codes, and its words."""


@dataclass(frozen=True)
class PackedWeight:
    """A matrix [O, I] in low bits.

    4-bit codes stand for the 16 values of a table: a weight is ``table[code] * scale + offset``. Eight codes form a
    word, and the inputs are laid out in blocks of 128: bits 4k to 4k + 3 of word j of a block are the code of its input
    16k + j. So the codes that a kernel takes apart together belong to inputs that are read together. Inputs are padded
    with zeros to whole blocks. 8-bit codes are numbers themselves: ``code * scale``.

    Attributes:
        codes: int32 [O, ceil(I / 128) * 16]; of 8 bits int8 [O, I].
        scale: float [O, groups], one for each ``group`` inputs, padded like them; of 8 bits [O, 1].
        offset: as ``scale``, added to each weight; None where there is none.
        table: float32 [16]; None for 8 bits.
        group: inputs that share a scale: 16, 32, 64 or 128; of 8 bits all.
        inputs: I.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    table: Tensor | None
    group: int
    inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.codes.shape[0], self.inputs


def pack_codes(codes_OI: Tensor) -> Tensor:
    """4-bit codes, uint8 [O, I] within 0..15, to the words of ``PackedWeight``."""
    padded = nn.functional.pad(codes_OI, (0, -codes_OI.shape[1] % BLOCK_INPUTS)).to(torch.int32)
    planes = padded.unflatten(1, (-1, 8, BLOCK_WORDS))  # [O, blocks, k, j]
    words = planes[:, :, 0].clone()
    for k in range(1, 8):
        words |= planes[:, :, k] << (4 * k)
    return words.flatten(1)


def pad_groups(groups_OG: Tensor, group: int) -> Tensor:
    """Scales or offsets [O, I / group], padded with zeros to whole blocks of inputs."""
    return nn.functional.pad(groups_OG, (0, -groups_OG.shape[1] % (BLOCK_INPUTS // group))).contiguous()


def unpack_codes(words: Tensor, inputs: int) -> Tensor:
    """The inverse of ``pack_codes``: int32 [O, I] within 0..15."""
    blocks = words.unflatten(1, (-1, 1, BLOCK_WORDS))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)[:, None]
    return ((blocks >> shifts) & 15).flatten(1)[:, :inputs]
