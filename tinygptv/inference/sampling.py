"""From logits to the next token: what a request may ask for, and how it is drawn.

The steps and their order are those of transformers' logits processors: penalties, temperature, top-k, top-p, min-p,
draw. Each request draws from a generator of its own, so its answer does not depend on who shares the batch.

Notation: K vocabulary.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

NUCLEUS_CANDIDATES = 1024
"""Most probable tokens among which top-p looks first; sorting a whole vocabulary takes milliseconds on a CPU."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    Attributes:
        max_tokens: most tokens of the answer.
        temperature: 0 is greedy.
        top_p: smallest set of tokens whose probabilities reach this sum; 1 keeps all, 0 one.
        top_k: so many most probable tokens; 0 keeps all.
        min_p: tokens that are at least so many times as probable as the most probable one; 0 keeps all.
        repetition_penalty: divides (or multiplies, where negative) the logit of every token of the prompt and answer.
        frequency_penalty: taken off a token's logit for each time it stands in the answer.
        presence_penalty: taken off once if it stands there at all.
        logit_bias: pairs (token id, number added to its logit).
        seed: None draws differently each time.
        stop: strings that end the answer; they are not part of it.
        logprobs: None, or so many alternatives with log-probabilities per token (0 gives the chosen token alone).
        ignore_end: continue past the end symbol and EOS, for benchmarks.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_end: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_tokens", 1, math.inf),
            ("temperature", 0, math.inf),
            ("top_p", 0, 1),
            ("top_k", 0, math.inf),
            ("min_p", 0, 1),
            ("repetition_penalty", 1e-6, math.inf),
        ):
            value = getattr(self, name)
            if not (low <= value <= high) or value == math.inf:
                raise ValueError(f"{name} is {value}; it must lie between {low} and {high}.")
        if any(not text for text in self.stop):
            raise ValueError("stop holds an empty string, which would end every answer at once: leave it out.")

    @property
    def has_penalties(self) -> bool:
        """Whether logits are changed, by a penalty or a bias, before a token is drawn."""
        has_penalty = self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty
        return bool(has_penalty or self.logit_bias)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is simply the largest logit."""
        return self.temperature == 0 and not self.has_penalties


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model itself (before penalties and temperature)."""

    token_id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass
class Sampler:
    """Draws the tokens of one request.

    Attributes:
        params: what was asked for.
        prompt_ids: tokens of the prompt, for the repetition penalty.
    """

    params: SamplingParams
    prompt_ids: list[int]
    _random: random.Random = field(init=False)
    _seen: Tensor | None = field(init=False, default=None)
    _counts: Tensor | None = field(init=False, default=None)
    _bias: tuple[Tensor, Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._random = random.Random(self.params.seed)

    def draw(self, logits_K: Tensor) -> int:
        """Choose the next token from float32 logits [K]; the logits are left as they are."""
        params = self.params
        if params.is_plain_greedy:
            return int(logits_K.argmax())
        logits_K = self._penalise(logits_K)
        token = int(logits_K.argmax()) if params.temperature == 0 else self._draw_from(logits_K / params.temperature)
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        return token

    def logprobs(self, logits_K: Tensor, token: int) -> TokenLogprobs:
        """Log-probabilities of a drawn token and of the most probable ones."""
        logprobs_K = logits_K.log_softmax(-1)
        values, ids = logprobs_K.topk(min(self.params.logprobs or 0, logits_K.shape[-1]))
        return TokenLogprobs(token, float(logprobs_K[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

    def _penalise(self, logits_K: Tensor) -> Tensor:
        params = self.params
        logits_K = logits_K.clone()
        if params.repetition_penalty != 1:
            if self._seen is None:
                self._seen = torch.zeros_like(logits_K, dtype=torch.bool)
                self._seen[self.prompt_ids] = True
            penalised = torch.where(
                logits_K < 0, logits_K * params.repetition_penalty, logits_K / params.repetition_penalty
            )
            logits_K = torch.where(self._seen, penalised, logits_K)
        if params.frequency_penalty or params.presence_penalty:
            if self._counts is None:
                self._counts = torch.zeros_like(logits_K)
            logits_K -= params.frequency_penalty * self._counts + params.presence_penalty * (self._counts > 0)
        if params.logit_bias:
            if self._bias is None:
                ids, values = zip(*params.logit_bias, strict=True)
                self._bias = torch.tensor(ids, device=logits_K.device), logits_K.new_tensor(values)
            logits_K.index_add_(0, *self._bias)
        return logits_K

    def _draw_from(self, logits_K: Tensor) -> int:
        """Draw by inverting the cumulative distribution at one uniform number."""
        params = self.params
        if params.top_k == 0 and params.top_p == 1 and params.min_p == 0:
            return _invert(logits_K.softmax(-1), self._random.random())
        num_tokens = logits_K.shape[-1]
        logits, ids = logits_K.topk(min(params.top_k or NUCLEUS_CANDIDATES, num_tokens))
        # After top-k the kept tokens are normalised among themselves, as transformers does.
        total = logits.logsumexp(-1) if params.top_k else logits_K.logsumexp(-1)
        probabilities = (logits - total).exp()
        least = logits[0] + math.log(params.min_p) if params.min_p else -math.inf
        if not params.top_k and float(probabilities.sum()) < params.top_p and float(logits[-1]) >= least:
            logits, ids = logits_K.sort(descending=True)
            probabilities = logits.softmax(-1)
        is_kept = logits >= least
        if params.top_p < 1:
            is_kept &= probabilities.cumsum(-1) - probabilities < params.top_p
        num_kept = max(1, int(is_kept.sum()))
        return int(ids[_invert(logits[:num_kept].softmax(-1), self._random.random())])


def _invert(probabilities: Tensor, uniform: float) -> int:
    cumulative = probabilities.double().cumsum(-1)
    index = int(torch.searchsorted(cumulative, float(cumulative[-1]) * uniform, right=True))
    return min(index, probabilities.shape[-1] - 1)
