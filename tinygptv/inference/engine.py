"""Continuous batching: requests join and leave a running batch between steps.

The engine gets token ids and embeddings and gives back tokens and text. It knows no HTTP, no images and no threads: one
call of ``step`` is one forward pass for every sequence at hand (see ``decoder``), with a bounded share for prompts that
are being read, so that reading a long prompt never stops the others' answers.

    waiting --(slot free)--> reading its prompt, piece by piece --> answering, a token a step --> finished

Notation: S prompt length, D width, K vocabulary.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tinygptv.inference.decoder import CACHE_DTYPES, FlatDecoder
from tinygptv.inference.prefix_cache import KVSlots
from tinygptv.inference.runner import Drawn, FlatRunner, Launch, Piece, Row, Runner
from tinygptv.inference.sampling import SamplingParams, TokenLogprobs
from tinygptv.inference.text_stream import TextStream, TokenBytes
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

log = logging.getLogger(__name__)


class PromptTooLong(ValueError):
    """The prompt leaves no room for an answer."""


@dataclass(eq=False)
class Request:
    """A prompt and what to do with it.

    Attributes:
        ids: [S] int64 token ids; an image position holds a negative number that names the image.
        inputs_embeds: [S, D].
        params: how to answer.
    """

    ids: np.ndarray
    inputs_embeds: Tensor
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass
class Delta:
    """What one step added to one answer.

    Attributes:
        text: text that may be shown; empty while a character or a possible stop string is incomplete.
        token_ids: tokens that were drawn.
        logprobs: one entry per token, where asked for.
        finish_reason: ``stop``, ``length``, ``cancelled`` or ``error``; None while the answer goes on.
        error: one sentence, with ``finish_reason`` ``error``.
        num_reused: prompt positions that were taken from the cache (set with the first delta).
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
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


@dataclass(eq=False)
class _Sequence:
    """A request in the engine."""

    id: int
    request: Request
    sampler: Sampler
    stream: TextStream
    max_tokens: int
    slot: int = -1
    num_reused: int = 0
    length: int = 0  # positions in the cache
    last_token: int = -1
    num_answered: int = 0
    cancelled: bool = False

    @property
    def prompt_length(self) -> int:
        return len(self.request.ids)


class Engine:
    """Answers many requests at once with one model.

    Not thread-safe: one thread calls ``add``, ``cancel`` and ``step`` (``engine_thread.EngineLoop`` does).
    """

    def __init__(
        self,
        model: TinyGPTVForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch_size: int = 16,
        context_length: int = 0,
        prefill_tokens: int = 128,
        kv_cache_dtype: str = "auto",
        stop: tuple[str, ...] = (),
    ) -> None:
        """Allocate the cache.

        Args:
            model: in evaluation mode.
            tokenizer: a byte-level one.
            max_batch_size: answers generated together; also the number of cache slots.
            context_length: most tokens of prompt and answer; 0 takes the model's, at most 2,048.
            prefill_tokens: most prompt tokens of a step in which answers are waiting for their next token.
            kv_cache_dtype: key of ``CACHE_DTYPES``.
            stop: strings that end every answer (the template's end symbol).

        Raises:
            ValueError: ``context_length`` is more than the model's positions, or ``kv_cache_dtype`` is unknown.
        """
        positions = model.config.text_config.max_position_embeddings
        if context_length > positions:
            raise ValueError(f"context_length is {context_length}, but the model was built for {positions} positions.")
        if kv_cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"kv_cache_dtype is {kv_cache_dtype!r}; choose one of {', '.join(CACHE_DTYPES)}.")
        self.context_length = context_length or min(positions, 2048)
        self.prefill_tokens = prefill_tokens
        self.stop = stop
        self.token_bytes = TokenBytes(tokenizer)
        self.end_ids = frozenset({tokenizer.eos_token_id, model.config.text_config.eos_token_id} - {None})
        self.decoder = FlatDecoder(model, max_batch_size, self.context_length, CACHE_DTYPES[kv_cache_dtype])
        self.slots = KVSlots(max_batch_size, self.context_length)
        self.stats = EngineStats()
        self._waiting: deque[_Sequence] = deque()
        self._reading: list[_Sequence] = []
        self._answering: list[_Sequence] = []
        self._by_id: dict[int, _Sequence] = {}
        self._ids = itertools.count()

    # ------------------------------------------------------------------ requests

    def check_length(self, num_prompt_tokens: int) -> None:
        """Refuse a prompt that leaves no room for an answer.

        Raises:
            PromptTooLong: with both numbers.
        """
        if num_prompt_tokens >= self.context_length:
            raise PromptTooLong(
                f"the prompt has {num_prompt_tokens} tokens (images included) but the model's context is "
                f"{self.context_length} tokens and the answer needs room in it: shorten the conversation."
            )

    def check(self, request: Request) -> None:
        """Refuse what cannot be answered.

        Raises:
            PromptTooLong: the prompt leaves no room for an answer.
            ValueError: ``logit_bias`` names a token that does not exist.
        """
        self.check_length(len(request.ids))
        vocab_size = self.decoder.model.config.text_config.vocab_size
        unknown = [token for token, _ in request.params.logit_bias if not 0 <= token < vocab_size]
        if unknown:
            raise ValueError(f"logit_bias names token {unknown[0]}; the vocabulary ends at {vocab_size - 1}.")

    def add(self, request: Request) -> int:
        """Queue a request; returns its id.

        Raises:
            ValueError: as ``check`` says.
        """
        self.check(request)
        params = request.params
        sequence = _Sequence(
            id=next(self._ids),
            request=request,
            sampler=Sampler(params, request.ids[request.ids >= 0].tolist()),
            stream=TextStream(self.token_bytes, params.stop if params.ignore_end else (*self.stop, *params.stop)),
            max_tokens=min(params.max_tokens, self.context_length - len(request.ids)),
        )
        self._by_id[sequence.id] = sequence
        self._waiting.append(sequence)
        return sequence.id

    def cancel(self, request_id: int) -> None:
        """End a request; its slot is free before the next step. Unknown and finished ids are ignored."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            sequence.cancelled = True

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do anything."""
        return bool(self._by_id)

    # ------------------------------------------------------------------ one step

    def step(self) -> list[tuple[int, Delta]]:
        """Run one forward pass for all sequences.

        Returns:
            What each request got, by request id. Where the pass fails, every sequence in it ends with an error and the
            engine goes on with the others.
        """
        results = self._drop_cancelled()
        self._admit()
        pieces = self._cut_pieces()
        if not self._answering and not pieces:
            return results
        try:
            sequences, logits_MK = self._forward(pieces)
            is_finite = logits_MK.isfinite().all(-1).tolist()
            largest = logits_MK.argmax(-1).tolist()
        except Exception as error:  # one bad batch must not end the service
            log.exception("a step failed")
            return results + self._fail_all(f"the model could not compute this answer: {error}")
        self.stats.steps += 1
        for i, sequence in enumerate(sequences):
            if is_finite[i]:
                delta = self._advance(sequence, logits_MK[i], largest[i])
            else:
                delta = self._fail(sequence, "the model's output is not finite (NaN or Inf): its weights are damaged.")
            results.append((sequence.id, delta))
        self._answering = [s for s in self._answering if s.id in self._by_id]
        self._update_stats()
        return results

    def _drop_cancelled(self) -> list[tuple[int, Delta]]:
        cancelled = [s for s in self._by_id.values() if s.cancelled]
        for sequence in cancelled:
            self._remove(sequence)
            self.stats.cancelled += 1
        if cancelled:
            self._waiting = deque(s for s in self._waiting if not s.cancelled)
            self._reading = [s for s in self._reading if not s.cancelled]
            self._answering = [s for s in self._answering if not s.cancelled]
            self._update_stats()
        return [(s.id, Delta(finish_reason="cancelled")) for s in cancelled]

    def _admit(self) -> None:
        while self._waiting and self.slots.num_free:
            sequence = self._waiting.popleft()
            placement = self.slots.take(sequence.request.ids)
            if placement.copy_from is not None:
                self.decoder.copy_prefix(placement.copy_from, placement.slot, placement.num_reused)
            sequence.slot = placement.slot
            sequence.length = sequence.num_reused = placement.num_reused
            self.stats.prompt_tokens += sequence.prompt_length
            self.stats.reused_tokens += placement.num_reused
            self._reading.append(sequence)

    def _cut_pieces(self) -> list[tuple[_Sequence, int, int]]:
        """Pieces [start, end) of prompts that this step reads, first come first served."""
        budget = self.prefill_tokens if self._answering else max(self.prefill_tokens, 512)
        pieces = []
        for sequence in self._reading:
            end = min(sequence.prompt_length, sequence.length + budget)
            pieces.append((sequence, sequence.length, end))
            budget -= end - sequence.length
            if budget <= 0:
                break
        return pieces

    def _forward(self, pieces: list[tuple[_Sequence, int, int]]) -> tuple[list[_Sequence], Tensor]:
        """Compute the step; returns the M sequences that get a token, and its logits [M, K]."""
        answering = self._answering
        plan = self._plan(pieces)
        embeds = [piece.request.inputs_embeds[start:end] for piece, start, end in pieces]
        if answering:
            last_tokens = torch.tensor([s.last_token for s in answering], device=self.decoder.device)
            embeds.insert(0, self.decoder.embed(last_tokens))
        logits_MK = self.decoder.forward(torch.cat(embeds) if len(embeds) > 1 else embeds[0], plan)

        for sequence in answering:
            sequence.length += 1
            self.slots.extend(sequence.slot, sequence.length, sequence.last_token)
        for sequence, _, end in pieces:
            sequence.length = end
            self.slots.extend(sequence.slot, end)
        complete = [s for s, _, end in pieces if end == s.prompt_length]
        self._reading = [s for s in self._reading if s not in complete]
        self._answering = sorted(answering + complete, key=lambda s: s.slot)
        return answering + complete, logits_MK

    def _plan(self, pieces: list[tuple[_Sequence, int, int]]) -> StepPlan:
        answering, device = self._answering, self.decoder.device
        positions = [s.length for s in answering]
        slots = [s.slot for s in answering]
        segments = self._decoding_segments()
        outputs = list(range(len(answering)))
        for sequence, start, end in pieces:
            first = len(positions)
            positions += range(start, end)
            slots += [sequence.slot] * (end - start)
            mask = None if start == 0 or end - start == 1 else self.decoder.prompt_mask(start, end)
            rows, slot = slice(first, len(positions)), slice(sequence.slot, sequence.slot + 1)
            segments.append(Segment(rows, slot, end, mask, is_causal=start == 0))
            if end == sequence.prompt_length:
                outputs.append(len(positions) - 1)
        position_T = torch.tensor(positions, device=device)
        return StepPlan(
            positions=position_T,
            cache_rows=self.decoder.cache_rows(torch.tensor(slots, device=device), position_T),
            segments=segments,
            num_decoding=len(answering),
            output_rows=torch.tensor(outputs, device=device) if pieces else None,
        )

    def _decoding_segments(self) -> list[Segment]:
        """One segment per run of neighbouring slots, so that attention reads the cache where it lies."""
        segments: list[Segment] = []
        answering = self._answering  # sorted by slot
        first = 0
        for i in range(1, len(answering) + 1):
            if i < len(answering) and answering[i].slot == answering[i - 1].slot + 1:
                continue
            run = answering[first:i]
            lengths = [s.length + 1 for s in run]
            longest = max(lengths)
            mask = None
            if min(lengths) < longest:
                mask = self.decoder.decoding_mask(torch.tensor(lengths, device=self.decoder.device), longest)
            segments.append(Segment(slice(first, i), slice(run[0].slot, run[-1].slot + 1), longest, mask))
            first = i
        return segments

    # ------------------------------------------------------------------ what a token does to its sequence

    def _advance(self, sequence: _Sequence, logits_K: Tensor, largest: int) -> Delta:
        params = sequence.request.params
        token = largest if params.is_plain_greedy else sequence.sampler.draw(logits_K)
        delta = Delta(token_ids=[token], num_reused=0 if sequence.num_answered else sequence.num_reused)
        sequence.last_token = token
        sequence.num_answered += 1
        self.stats.answer_tokens += 1
        ended = token in self.end_ids and not params.ignore_end
        if not ended:
            delta.text = sequence.stream.push(token)
            if params.logprobs is not None:
                delta.logprobs = [sequence.sampler.logprobs(logits_K, token)]
        if ended or sequence.stream.stopped:
            delta.finish_reason = "stop"
        elif sequence.num_answered >= sequence.max_tokens:
            delta.finish_reason = "length"
        if delta.finish_reason:
            delta.text += sequence.stream.finish()
            self._remove(sequence)
            self.stats.finished += 1
        return delta

    def _remove(self, sequence: _Sequence) -> None:
        del self._by_id[sequence.id]
        if sequence.slot >= 0:
            self.slots.release(sequence.slot)

    def _fail(self, sequence: _Sequence, message: str) -> Delta:
        self.decoder.clear(sequence.slot)
        self.slots.extend(sequence.slot, 0)
        self._remove(sequence)
        self.stats.failed += 1
        return Delta(finish_reason="error", error=message)

    def _fail_all(self, message: str) -> list[tuple[int, Delta]]:
        """End every sequence that has a slot; those that wait are not to blame."""
        failed = [s for s in self._by_id.values() if s.slot >= 0]
        results = [(s.id, self._fail(s, message)) for s in failed]
        self._reading, self._answering = [], []
        self._update_stats()
        return results

    def _update_stats(self) -> None:
        self.stats.running = len(self._answering) + len(self._reading)
        self.stats.waiting = len(self._waiting)
