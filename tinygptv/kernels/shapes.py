"""What the step's operations take: bundles of tensors, with their shapes.

Notation: P partial products, T tokens, D width, N heads, H head width, G slots, L cache length, O outputs and I inputs
of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


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
    """What stands between the q/k/v product and the cache.

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


@dataclass(frozen=True)
class PackedWeight:
    """A matrix [O, I] in low bits.

    ====  =============================================================  ==========================
    kind  codes                                                          value
    ====  =============================================================  ==========================
    nf4   uint8 [O, I / 2], input 2i in the high half of byte i          table[code] * scale
    int4  the same                                                       (code - 8) * scale + offset
    int8  int8 [O, I]                                                    code * scale
    ====  =============================================================  ==========================

    Sources: nf4 is that of arXiv 2305.14314 in bitsandbytes' layout; int4 that of torch's ``_weight_int4pack_mm``.

    Attributes:
        kind: see above.
        codes: see above.
        scale: float [O, I / group]; of int8 [O, 1].
        offset: of int4, as ``scale``; None elsewhere.
        table: of nf4, 16 float32 values; None elsewhere.
        group: inputs that share a scale; of int8 all.
    """

    kind: Literal["nf4", "int4", "int8"]
    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    table: Tensor | None
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows, columns = self.codes.shape
        return rows, columns * (1 if self.kind == "int8" else 2)
