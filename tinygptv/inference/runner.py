"""Runners of the engine's steps: the interface, and the one that computes one at a time (CPU).

A runner holds the cache, the last token of each slot and what its request asked for. ``launch`` starts a step and
``Launch.read`` waits for its tokens; a runner on a GPU lets the engine launch the next step before it reads the last
one's tokens (``graph_runner``).

Notation: G slots, D width, K vocabulary, M sequences that get a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tinygptv.inference.decoder import FlatDecoder
from tinygptv.inference.flat_layer import Segment, StepPlan
from tinygptv.inference.sampling import Sampler, SamplingParams, TokenLogprobs


@dataclass(frozen=True)
class Row:
    """A sequence that gets its next token: its slot, and the positions that the slot holds."""

    slot: int
    length: int


@dataclass(frozen=True)
class Piece:
    """Positions [start, end) of a prompt that a step reads.

    Attributes:
        slot: where they are kept.
        start: first position.
        end: one past the last.
        inputs_embeds: [end - start, D].
        is_last: the prompt is complete with this piece, and its first token is wanted.
    """

    slot: int
    start: int
    end: int
    inputs_embeds: Tensor
    is_last: bool


@dataclass(frozen=True)
class Drawn:
    """A token of one sequence; ``is_finite`` is False where its logits hold NaN or Inf."""

    token: int
    is_finite: bool
    logprobs: TokenLogprobs | None = None


class Launch(Protocol):
    """A step on its way."""

    def read(self) -> list[Drawn]:
        """Wait for the step: one token for each row, then one for each piece that is the last of its prompt."""


class Runner(Protocol):
    """Computes steps."""

    num_ahead: int
    """Steps that may be launched before the tokens of an earlier one are read."""
    num_slots: int

    def admit(self, slot: int, params: SamplingParams, prompt_ids: np.ndarray, num_positions: int) -> None:
        """A request takes a slot; its prompt has ``num_positions`` positions, ``prompt_ids`` are its text tokens."""

    def launch(self, rows: Sequence[Row], pieces: Sequence[Piece]) -> Launch:
        """Start a step; the cache is extended."""

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another."""

    def clear(self, slot: int) -> None:
        """Remove what a slot holds."""


@dataclass(frozen=True)
class _Done:
    """A step that was computed when it was launched."""

    drawn: list[Drawn]

    def read(self) -> list[Drawn]:
        return self.drawn


def _finite_and_largest(logits_MK: Tensor | np.ndarray) -> tuple[list[bool], list[int]]:
    """For each row, whether all of its numbers are finite, and where the largest is."""
    is_finite_MK = np.isfinite(logits_MK) if isinstance(logits_MK, np.ndarray) else logits_MK.isfinite()
    return is_finite_MK.all(-1).tolist(), logits_MK.argmax(-1).tolist()


class FlatRunner:
    """Computes each step when it is launched: all rows and pieces in one forward pass (``FlatDecoder``)."""

    num_ahead = 0

    def __init__(self, decoder: FlatDecoder) -> None:
        self.decoder = decoder
        self.num_slots = decoder.num_slots
        self._samplers: dict[int, Sampler] = {}
        self._last_tokens: dict[int, int] = {}
        self.copy_prefix, self.clear = decoder.copy_prefix, decoder.clear

    def admit(self, slot: int, params: SamplingParams, prompt_ids: np.ndarray, num_positions: int) -> None:
        """See ``Runner``."""
        self._samplers[slot] = Sampler(params, prompt_ids.tolist())

    def launch(self, rows: Sequence[Row], pieces: Sequence[Piece]) -> Launch:
        """See ``Runner``; rows are sorted by slot."""
        embeds = [piece.inputs_embeds for piece in pieces]
        if rows:
            last_tokens = torch.tensor([self._last_tokens[row.slot] for row in rows], device=self.decoder.device)
            embeds.insert(0, self.decoder.embed(last_tokens))
        logits_MK = self.decoder.forward(torch.cat(embeds) if len(embeds) > 1 else embeds[0], self._plan(rows, pieces))
        slots = [row.slot for row in rows] + [piece.slot for piece in pieces if piece.is_last]
        # On a CPU by NumPy: torch's threads, which share a vocabulary among them, would spin beside the next step's.
        found = _finite_and_largest(logits_MK.numpy() if logits_MK.device.type == "cpu" else logits_MK)
        return _Done([self._draw(*values) for values in zip(slots, logits_MK, *found, strict=True)])

    def _draw(self, slot: int, logits_K: Tensor, is_finite: bool, largest: int) -> Drawn:
        if not is_finite:
            return Drawn(0, is_finite=False)
        sampler = self._samplers[slot]
        token = largest if sampler.params.is_plain_greedy else sampler.draw(logits_K)
        self._last_tokens[slot] = token
        logprobs = None if sampler.params.logprobs is None else sampler.logprobs(logits_K, token)
        return Drawn(token, is_finite=True, logprobs=logprobs)

    def _plan(self, rows: Sequence[Row], pieces: Sequence[Piece]) -> StepPlan:
        device = self.decoder.device
        positions = [row.length for row in rows]
        slots = [row.slot for row in rows]
        segments = self._decoding_segments(rows)
        outputs = list(range(len(rows)))
        for piece in pieces:
            first, num_tokens = len(positions), piece.end - piece.start
            positions += range(piece.start, piece.end)
            slots += [piece.slot] * num_tokens
            has_triangle = piece.start == 0 or num_tokens == 1
            mask = None if has_triangle else self.decoder.prompt_mask(piece.start, piece.end)
            span, slot = slice(first, len(positions)), slice(piece.slot, piece.slot + 1)
            segments.append(Segment(span, slot, piece.end, mask, is_causal=piece.start == 0))
            if piece.is_last:
                outputs.append(len(positions) - 1)
        position_T = torch.tensor(positions, device=device)
        return StepPlan(
            positions=position_T,
            cache_rows=self.decoder.cache_rows(torch.tensor(slots, device=device), position_T),
            segments=segments,
            num_decoding=len(rows),
            output_rows=torch.tensor(outputs, dtype=torch.int64, device=device) if pieces else None,  # it may be empty
        )

    def _decoding_segments(self, rows: Sequence[Row]) -> list[Segment]:
        """One segment per run of neighbouring slots, so that attention reads the cache where it is."""
        segments: list[Segment] = []
        first = 0
        for i in range(1, len(rows) + 1):
            if i < len(rows) and rows[i].slot == rows[i - 1].slot + 1:
                continue
            run = rows[first:i]
            lengths = [row.length + 1 for row in run]
            longest = max(lengths)
            mask = None
            if min(lengths) < longest:
                mask = self.decoder.decoding_mask(torch.tensor(lengths, device=self.decoder.device), longest)
            segments.append(Segment(slice(first, i), slice(run[0].slot, run[-1].slot + 1), longest, mask))
            first = i
        return segments
