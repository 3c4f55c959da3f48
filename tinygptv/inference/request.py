"""Input and output of the engine: requests, deltas, counters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor

from tinygptv.inference.sampling import SamplingParams, TokenLogprobs

FinishReason = Literal["stop", "length", "cancelled", "error"]


class PromptTooLong(ValueError):
    """The prompt leaves no room for an answer."""


@dataclass(eq=False)
class Request:
    """A prompt and what to do with it.

    Attributes:
        ids: [S] int64 token ids; an image position holds a negative number that names the image.
        inputs_embeds: [S, D].
        params: how to answer.
        salt: requests reuse each other's prompts only where this number is equal.
        continues: the prompt ends within an answer: white space at the start of its rest belongs to it.
    """

    ids: np.ndarray
    inputs_embeds: Tensor
    params: SamplingParams = field(default_factory=SamplingParams)
    salt: int = 0
    continues: bool = False


@dataclass
class Delta:
    """Tokens that one step added to one answer.

    Attributes:
        text: text that may be shown; empty while a character or a possible stop string is incomplete.
        token_ids: tokens that were drawn.
        logprobs: where asked for, one entry per token of the answer, once its text is known not to be of a stop string.
        finish_reason: ``stop``, ``length``, ``cancelled`` or ``error``; None while the answer continues.
        error: one sentence, with ``finish_reason`` ``error``.
        num_reused: prompt positions that were taken from the cache (set with the first delta).
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str = ""
    num_reused: int = 0


@dataclass
class EngineStats:
    """Counters since the start, and what is at hand now."""

    steps: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    answer_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    running: int = 0
    waiting: int = 0
