"""Drawing the next tokens of a whole batch on the device, in static shapes: nothing is read back to the host.

The same steps as ``sampling.Sampler``, with the same uniform numbers from the same seeds: penalties, temperature,
top-k, top-p, min-p, inversion of the cumulative distribution. What each slot's request asked for is kept in tensors of
G + 1 rows; the last row belongs to nobody.

Notation: T sequences of a step, G slots, K vocabulary, L cache length, A alternatives of a token.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from tinygptv.inference.sampling import SamplingParams

MOST_ALTERNATIVES = 20
"""Alternatives per token that are read back where log-probabilities are asked for."""

TEMPERATURE, TOP_P, TOP_K, MIN_P, REPETITION, FREQUENCY, PRESENCE = range(7)


class DeviceSampling:
    """Sampling parameters of the requests in the slots, and drawing with them."""

    def __init__(self, num_slots: int, length: int, vocab_size: int, device: torch.device) -> None:
        self.num_slots, self.length, self.vocab_size, self.device = num_slots, length, vocab_size, device
        rows = num_slots + 1
        self.options = torch.zeros(rows, 7, device=device)
        self.uniforms = torch.zeros(rows, length, dtype=torch.float64, device=device)
        self.penalties: _Penalties | None = None

    def admit(self, slot: int, params: SamplingParams, prompt_ids: np.ndarray, num_positions: int) -> None:
        """Set a slot's row.

        Args:
            slot: row.
            params: what is asked for.
            prompt_ids: text tokens of the prompt, for the repetition penalty.
            num_positions: length S of the prompt; the token drawn after position S - 1 + i uses the i-th number.
        """
        p = params
        penalties = (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
        self.options[slot] = torch.tensor([p.temperature, p.top_p, p.top_k, p.min_p, *penalties])
        if p.temperature > 0:
            draw = random.Random(p.seed).random
            count = min(p.max_tokens, self.length - num_positions)
            numbers = torch.tensor([draw() for _ in range(count)], dtype=torch.float64)
            self.uniforms[slot, num_positions - 1 : num_positions - 1 + count] = numbers.to(self.device)
        if p.has_penalties or self.penalties is not None:
            if self.penalties is None:
                self.penalties = _Penalties(self.num_slots + 1, self.vocab_size, self.device)
            self.penalties.admit(slot, p, prompt_ids)

    @property
    def state(self) -> list[Tensor]:
        """Tensors that drawing changes."""
        return [] if self.penalties is None else [self.penalties.seen, self.penalties.counts]

    def draw(self, logits_TK: Tensor, slots_T: Tensor, positions_T: Tensor, *, penalise: bool) -> Tensor:
        """Choose the next tokens.

        Args:
            logits_TK: float32; left as they are.
            slots_T: int64 slots of the sequences; G for nobody.
            positions_T: int64 positions of the tokens that the logits follow.
            penalise: apply penalties and bias, and count the drawn tokens; else no row may ask for any.

        Returns:
            int64 [T].
        """
        options = self.options.index_select(0, slots_T)
        if penalise:
            assert self.penalties is not None, "admit makes it"
            logits_TK = self.penalties.apply(logits_TK, slots_T, options)
        temperature = options[:, TEMPERATURE, None]
        greedy = logits_TK.argmax(-1)
        scaled = logits_TK / torch.where(temperature > 0, temperature, 1.0)
        drawn = _draw(scaled, options, self.uniforms[slots_T, positions_T])
        tokens = torch.where(temperature[:, 0] > 0, drawn, greedy)
        if penalise:
            assert self.penalties is not None, "admit makes it"
            self.penalties.count(slots_T, tokens)
        return tokens


class _Penalties:
    """Which tokens each slot's prompt and answer hold, and the numbers added to logits."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self.seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)
        self.counts = torch.zeros(rows, vocab_size, device=device)
        self.bias = torch.zeros(rows, vocab_size, device=device)

    def admit(self, slot: int, params: SamplingParams, prompt_ids: np.ndarray) -> None:
        for tensor in (self.seen, self.counts, self.bias):
            tensor[slot].zero_()
        self.seen[slot, torch.from_numpy(prompt_ids).to(self.seen.device)] = True
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            device = self.bias.device
            self.bias[slot].index_add_(0, torch.tensor(ids, device=device), self.bias.new_tensor(values))

    def apply(self, logits_TK: Tensor, slots_T: Tensor, options: Tensor) -> Tensor:
        repetition = options[:, REPETITION, None]
        penalised = torch.where(logits_TK < 0, logits_TK * repetition, logits_TK / repetition)
        logits_TK = torch.where(self.seen[slots_T], penalised, logits_TK)
        counts_TK = self.counts[slots_T]
        frequency, presence = options[:, FREQUENCY, None], options[:, PRESENCE, None]
        return logits_TK - (frequency * counts_TK + presence * (counts_TK > 0)) + self.bias[slots_T]

    def count(self, slots_T: Tensor, tokens_T: Tensor) -> None:
        places_T = slots_T * self.seen.shape[1] + tokens_T
        self.seen.view(-1).index_fill_(0, places_T, True)
        self.counts.view(-1).index_add_(0, places_T, torch.ones_like(places_T, dtype=torch.float32))


def _draw(logits_TK: Tensor, options: Tensor, uniforms_T: Tensor) -> Tensor:
    """Draw from top-k, top-p and min-p by inverting the cumulative distribution at one uniform number a row.

    Rows that keep every token are inverted in the vocabulary's order, the others from the most probable down.
    """
    top_p, top_k, min_p = (options[:, column, None] for column in (TOP_P, TOP_K, MIN_P))
    sorted_TK, ids_TK = torch.sort(logits_TK, dim=-1, descending=True, stable=True)
    rank_K = torch.arange(logits_TK.shape[-1], device=logits_TK.device)
    is_kept = (top_k == 0) | (rank_K < top_k)
    kept_TK = sorted_TK.masked_fill(~is_kept, -torch.inf)
    probabilities = kept_TK.softmax(-1)  # after top-k the kept tokens are normalised among themselves
    before = probabilities.cumsum(-1) - probabilities
    is_kept &= (top_p >= 1) | (before < top_p) | (rank_K == 0)
    is_kept &= sorted_TK >= sorted_TK[:, :1] + min_p.log()  # all of them where it is 0
    keeps_all = (top_p >= 1) & (top_k == 0) & (min_p == 0)
    chosen_TK = torch.where(keeps_all, logits_TK, sorted_TK.masked_fill(~is_kept, -torch.inf))
    cumulative = chosen_TK.softmax(-1).double().cumsum(-1)
    target = cumulative[:, -1:] * uniforms_T[:, None]
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=logits_TK.shape[-1] - 1)
    return torch.where(keeps_all, index, ids_TK.gather(-1, index))[:, 0]


def read_back(logits_TK: Tensor, tokens_T: Tensor, *, logprobs: bool) -> Tensor:
    """Values of a step for the host, as one float32 tensor: a token id fits it exactly.

    Returns:
        [T, 2] token and whether its logits are finite; with ``logprobs`` [T, 3 + 2 A]: also the token's
        log-probability, then ids and log-probabilities of the A most probable tokens.
    """
    low, high = logits_TK.aminmax(dim=-1)  # NaN passes through
    columns = [tokens_T.float()[:, None], (low.isfinite() & high.isfinite()).float()[:, None]]
    if logprobs:
        total_T1 = logits_TK.logsumexp(-1, keepdim=True)
        values, ids = logits_TK.topk(min(MOST_ALTERNATIVES, logits_TK.shape[-1]))
        columns += [logits_TK.gather(-1, tokens_T[:, None]) - total_T1, ids.float(), values - total_T1]
    return torch.cat(columns, dim=-1)
