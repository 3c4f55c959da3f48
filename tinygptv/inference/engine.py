"""Continuous batching: requests join and leave a running batch between steps.

The engine gets token ids and embeddings and gives back tokens and text. It knows no HTTP, no images and no threads. One
call of ``step`` launches one step for every sequence at hand (see ``runner``), with a bounded share for prompts that
are being read, so that reading a long prompt never stops the others' answers. On a GPU the tokens of a step are read
after the next one is launched; a sequence that ended in the meantime was computed once in vain.

    waiting --(slot free)--> reading its prompt, piece by piece --> answering, a token a step --> finished

Notation: S prompt length, D width, K vocabulary.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from tinygptv.inference.decoder import CACHE_DTYPES, FlatDecoder, slots_that_fit
from tinygptv.inference.prefix_cache import PrefixCache
from tinygptv.inference.request import Delta, EngineStats, PromptTooLong, Request
from tinygptv.inference.runner import Drawn, FlatRunner, Launch, Piece, Row, Runner
from tinygptv.inference.sampling import TokenLogprobs
from tinygptv.inference.text_stream import TextStream, TokenBytes
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Sequence:
    """A request in the engine.

    Attributes:
        length: positions of the cache after every launched step.
        num_launched: tokens that were read or are on their way.
        num_answered: tokens that were read.
        logprobs: of tokens that may yet be a part of a stop string, each with the character where its text begins.
    """

    id: int
    request: Request
    stream: TextStream
    max_tokens: int
    slot: int = -1
    num_reused: int = 0
    length: int = 0
    last_token: int = -1
    num_launched: int = 0
    num_answered: int = 0
    logprobs: deque[tuple[int, TokenLogprobs]] = field(default_factory=deque)
    is_cancelled: bool = False
    has_ended: bool = False

    @property
    def prompt_length(self) -> int:
        return len(self.request.ids)

    def take_logprobs(self, *, is_last: bool) -> list[TokenLogprobs]:
        """Log-probabilities of tokens that have become a part of the answer; those of a stop string never do."""
        if is_last and not self.stream.stopped:
            taken = len(self.logprobs)
        else:
            taken = sum(start < self.stream.num_kept for start, _ in self.logprobs)
        return [self.logprobs.popleft()[1] for _ in range(taken)]


@dataclass(frozen=True)
class _InFlight:
    """A launched step: who gets a token, and the length of each one's cache after it."""

    launch: Launch
    sequences: list[_Sequence]
    lengths: list[int]


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
        prefill_tokens: int = 0,
        kv_cache_dtype: str = "auto",
        stop: tuple[str, ...] = (),
        runner: Literal["auto", "flat", "graph"] = "auto",
    ) -> None:
        """Allocate the cache.

        Args:
            model: in evaluation mode.
            tokenizer: a byte-level one.
            max_batch_size: answers generated together, also the number of cache slots; fewer where a GPU's memory is
                too small for them, which is logged.
            context_length: most tokens of prompt and answer; 0 takes the model's, at most 2,048.
            prefill_tokens: most prompt tokens of a step in which answers are waiting for their next token; 0 takes 128
                on a CPU and 512 on a GPU.
            kv_cache_dtype: key of ``CACHE_DTYPES``.
            stop: strings that end every answer (the template's end symbol).
            runner: ``graph`` on a GPU and ``flat`` elsewhere, or one of them (see ``runner``).

        Raises:
            ValueError: ``context_length`` is more than the model's positions, ``kv_cache_dtype`` is unknown, or a GPU's
                memory is too small for one sequence.
        """
        positions = model.config.text_config.max_position_embeddings
        if context_length > positions:
            raise ValueError(f"context_length is {context_length}, but the model was built for {positions} positions.")
        if kv_cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"kv_cache_dtype is {kv_cache_dtype!r}; choose one of {', '.join(CACHE_DTYPES)}.")
        self.context_length = context_length or min(positions, 2048)
        cache_dtype = CACHE_DTYPES[kv_cache_dtype]
        self.max_batch_size = slots_that_fit(model, max_batch_size, self.context_length, cache_dtype)
        self.stop = stop
        self.token_bytes = TokenBytes(tokenizer)
        self.end_ids = frozenset({tokenizer.eos_token_id, model.config.text_config.eos_token_id} - {None})
        self.decoder = FlatDecoder(model, self.max_batch_size, self.context_length, cache_dtype)
        is_cuda = self.decoder.device.type == "cuda"
        self.prefill_tokens = prefill_tokens or (512 if is_cuda else 128)
        self.runner = _build_runner(self.decoder, use_graph=runner == "graph" or (runner == "auto" and is_cuda))
        self.prefix_cache = PrefixCache(self.max_batch_size, self.context_length)
        self.stats = EngineStats()
        self._waiting: deque[_Sequence] = deque()
        self._reading: list[_Sequence] = []
        self._answering: list[_Sequence] = []
        self._in_flight: deque[_InFlight] = deque()
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
                # Clients such as LiteLLM know the case by the first words, which are OpenAI's.
                f"This model's maximum context length is {self.context_length} tokens, and the answer needs room in "
                f"it. The prompt has {num_prompt_tokens} tokens with images: shorten the question or the conversation."
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
            stream=TextStream(
                self.token_bytes, params.stop if params.ignore_end else (*self.stop, *params.stop), request.continues
            ),
            max_tokens=min(params.max_tokens, self.context_length - len(request.ids)),
        )
        self._by_id[sequence.id] = sequence
        self._waiting.append(sequence)
        return sequence.id

    def cancel(self, request_id: int) -> None:
        """End a request; its slot is free before the next step. Unknown and finished ids are ignored."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            sequence.is_cancelled = True

    @property
    def device(self) -> torch.device:
        """Where embeddings of requests are expected."""
        return self.decoder.device

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do anything."""
        return bool(self._by_id)

    def forget(self) -> None:
        """Drop what earlier prompts left in the cache; nothing may be running."""
        assert not self._by_id, "sequences are running"
        self.prefix_cache = PrefixCache(self.max_batch_size, self.context_length)

    # ------------------------------------------------------------------ one step

    def step(self) -> list[tuple[int, Delta]]:
        """Launch one step for all sequences, and read the steps that are due.

        Returns:
            What each request got, by request id. Where the pass fails, every sequence in it ends with an error and the
            engine continues with the others.
        """
        results = self._drop_cancelled()
        self._admit()
        pieces = self._cut_pieces()
        rows = [s for s in self._answering if s.num_launched < s.max_tokens]
        try:
            if rows or pieces:
                self._launch(rows, pieces)
            num_ahead = self.runner.num_ahead if rows or pieces else 0
            while len(self._in_flight) > num_ahead:
                results += self._read(self._in_flight.popleft())
        except Exception as error:  # one bad batch must not end the service
            logger.exception("a step failed")
            results += self._fail_all(f"the model could not compute this answer: {error}")
        self._answering = [s for s in self._answering if not s.has_ended]
        self._update_stats()
        return results

    def _drop_cancelled(self) -> list[tuple[int, Delta]]:
        cancelled = [s for s in self._by_id.values() if s.is_cancelled]
        for sequence in cancelled:
            self._remove(sequence)
            self.stats.cancelled += 1
        if cancelled:
            self._waiting = deque(s for s in self._waiting if not s.has_ended)
            self._reading = [s for s in self._reading if not s.has_ended]
            self._answering = [s for s in self._answering if not s.has_ended]
        return [(s.id, Delta(finish_reason="cancelled")) for s in cancelled]

    def _admit(self) -> None:
        while self._waiting and self.prefix_cache.num_free:
            sequence = self._waiting.popleft()
            request = sequence.request
            placement = self.prefix_cache.take(request.ids, request.salt)
            if placement.copy_from is not None:
                self.runner.copy_prefix(placement.copy_from, placement.slot, placement.num_reused)
            self.runner.admit(placement.slot, request.params, request.ids[request.ids >= 0], len(request.ids))
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

    def _launch(self, rows: list[_Sequence], pieces: list[tuple[_Sequence, int, int]]) -> None:
        """Start a step, and count what it will have done."""
        launch = self.runner.launch(
            [Row(s.slot, s.length) for s in rows],
            [
                Piece(s.slot, start, end, s.request.inputs_embeds[start:end], is_last=end == s.prompt_length)
                for s, start, end in pieces
            ],
        )
        self.stats.steps += 1
        for sequence in rows:
            sequence.length += 1
        for sequence, _, end in pieces:
            sequence.length = end
            self.prefix_cache.extend(sequence.slot, end)
        complete = [s for s, _, end in pieces if end == s.prompt_length]
        for sequence in (*rows, *complete):
            sequence.num_launched += 1
        self._reading = [s for s in self._reading if s not in complete]
        self._answering = sorted(self._answering + complete, key=lambda s: s.slot)
        sequences = rows + complete
        self._in_flight.append(_InFlight(launch, sequences, [s.length for s in sequences]))

    # ------------------------------------------------------------------ what a token does to its sequence

    def _read(self, step: _InFlight) -> Iterator[tuple[int, Delta]]:
        """Tokens of a launched step, one by one, so that those before a failure are delivered; those of sequences that
        ended in the meantime are dropped."""
        for sequence, length, drawn in zip(step.sequences, step.lengths, step.launch.read(), strict=True):
            if sequence.has_ended:
                continue
            if sequence.num_answered:  # the step wrote the position of the token that was read before
                self.prefix_cache.extend(sequence.slot, length, sequence.last_token)
            yield sequence.id, self._advance(sequence, drawn)

    def _advance(self, sequence: _Sequence, drawn: Drawn) -> Delta:
        if not drawn.is_finite:
            return self._fail(sequence, "the model's output is not finite (NaN or Inf): its weights are damaged.")
        params = sequence.request.params
        delta = Delta(token_ids=[drawn.token], num_reused=0 if sequence.num_answered else sequence.num_reused)
        sequence.last_token = drawn.token
        sequence.num_answered += 1
        self.stats.answer_tokens += 1
        ended = drawn.token in self.end_ids and not params.ignore_end
        if not ended:
            if drawn.logprobs is not None:
                sequence.logprobs.append((sequence.stream.num_characters, drawn.logprobs))
            delta.text = sequence.stream.push(drawn.token)
        if ended or sequence.stream.stopped:
            delta.finish_reason = "stop"
        elif sequence.num_answered >= sequence.max_tokens:
            delta.finish_reason = "length"
        if delta.finish_reason:
            delta.text += sequence.stream.finish()
            self._remove(sequence)
            self.stats.finished += 1
        delta.logprobs = sequence.take_logprobs(is_last=delta.finish_reason is not None)
        return delta

    def _remove(self, sequence: _Sequence) -> None:
        sequence.has_ended = True
        del self._by_id[sequence.id]
        if sequence.slot >= 0:
            self.prefix_cache.release(sequence.slot)

    def _fail(self, sequence: _Sequence, message: str) -> Delta:
        self.runner.clear(sequence.slot)
        self.prefix_cache.extend(sequence.slot, 0)
        self._remove(sequence)
        self.stats.failed += 1
        return Delta(finish_reason="error", error=message)

    def _fail_all(self, message: str) -> list[tuple[int, Delta]]:
        """End every sequence that has a slot; those that wait were in no step, and stay."""
        failed = [s for s in self._by_id.values() if s.slot >= 0]
        results = [(s.id, self._fail(s, message)) for s in failed]
        self._reading, self._answering = [], []
        self._in_flight.clear()
        return results

    def _update_stats(self) -> None:
        self.stats.running = len(self._answering) + len(self._reading)
        self.stats.waiting = len(self._waiting)


def _build_runner(decoder: FlatDecoder, use_graph: bool) -> Runner:
    if not use_graph:
        return FlatRunner(decoder)
    from tinygptv.inference.graph_runner import GraphRunner

    runner = GraphRunner(decoder)
    runner.warm_up()
    return runner
