r"""Steps on a GPU: decoding replayed as CUDA graphs, prompts read beside it, tokens drawn on the device.

The last token and the length of every slot stay on the device, so a step needs nothing from the host, and the next one
is launched before the last one's tokens are read: Python's time is hidden behind the device's. A graph belongs to a
number of rows (a bucket, filled with rows of nobody); its kernels read each sequence's own length, so one graph serves
every context. Graphs share their memory.

    launch   tokens, lengths --graph--> logits, tokens, lengths + 1      the largest logit is drawn in the graph
                                   \--graph--> tokens                    where requests ask for more: sampling
             result --copy--> pinned host memory, event
    read     wait for the event

The same code runs without graphs where there is no GPU; tests compare it there with the step-by-step runner.

Notation: T rows of a bucket, G slots, K vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from tinygptv.inference.cuda_graphs import capture_graph
from tinygptv.inference.decoder import FlatDecoder
from tinygptv.inference.device_sampling import DeviceSampling, read_back
from tinygptv.inference.fused_layers import FusedLayers, Span
from tinygptv.inference.runner import Drawn, Launch, Piece, Row
from tinygptv.inference.sampling import SamplingParams, TokenLogprobs

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128)
"""Numbers of rows for which there is a graph; more rows than the last run in multiples of it."""


@dataclass(frozen=True)
class _Ask:
    """Outputs of a step beside the largest logit."""

    samples: bool = False
    penalises: bool = False
    logprobs: bool = False


class GraphRunner:
    """See ``runner.Runner``; one thread uses it."""

    num_ahead = 1

    def __init__(self, decoder: FlatDecoder, *, use_graphs: bool | None = None, ops: ModuleType | None = None) -> None:
        """Allocate the device's state.

        Args:
            decoder: whose weights and cache are used.
            use_graphs: replay CUDA graphs; None: where the decoder is on a GPU and its layers can be captured.
            ops: kernels (``FusedLayers``).
        """
        self.decoder, self.device = decoder, decoder.device
        self.num_slots = decoder.num_slots
        self.layers = FusedLayers(decoder, ops)
        self.use_graphs = decoder.device.type == "cuda" if use_graphs is None else use_graphs
        self.tokens_G = torch.zeros(self.num_slots + 1, dtype=torch.int64, device=self.device)
        self.lengths_G = torch.zeros_like(self.tokens_G)
        self.slots_T = torch.full((bucket_of(self.num_slots),), self.num_slots, device=self.device)
        vocab_size = decoder.model.config.text_config.vocab_size
        self.sampling = DeviceSampling(self.num_slots, decoder.cache_length, vocab_size, self.device)
        self._params: dict[int, SamplingParams] = {}
        self._rows: list[int] = []
        self._steps: dict[int, _Step] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.use_graphs else None
        self.copy_prefix, self.clear = decoder.copy_prefix, decoder.clear

    def warm_up(self) -> None:
        """Capture the graphs of every number of rows up to the slots, largest first, so that memory is shared."""
        for bucket in reversed(sorted({bucket_of(n) for n in range(1, self.num_slots + 1)})):
            self._step(bucket).run(_Ask())
        self.lengths_G.zero_()
        self._rows = []

    # ------------------------------------------------------------------ the runner's interface

    def admit(self, slot: int, params: SamplingParams, prompt_ids: np.ndarray, num_positions: int) -> None:
        """See ``Runner``."""
        self._params[slot] = params
        self.sampling.admit(slot, params, prompt_ids, num_positions)

    @torch.inference_mode()
    def launch(self, rows: Sequence[Row], pieces: Sequence[Piece]) -> Launch:
        """See ``Runner``."""
        reads = []
        if rows:
            slots = [row.slot for row in rows]
            self._place(slots)
            result = self._step(bucket_of(len(rows))).run(self._ask(slots))
            reads.append((slots, _to_host(result)))
        if pieces:
            complete = [piece.slot for piece in pieces if piece.is_last]
            result = self._prefill(pieces, complete)
            if complete:
                reads.append((complete, _to_host(result)))
        return _Reads([(slots, [self._params[slot] for slot in slots], buffer) for slots, buffer in reads])

    # ------------------------------------------------------------------ decoding

    def _place(self, slots: list[int]) -> None:
        """Put the sequences of the next step into its rows, where they differ from the last one's."""
        if slots == self._rows:
            return
        bucket = bucket_of(len(slots))
        filled = slots + [self.num_slots] * (bucket - len(slots))
        self.slots_T[:bucket].copy_(_pinned(torch.tensor(filled), self.device), non_blocking=True)
        self._rows = slots

    def _step(self, bucket: int) -> _Step:
        if bucket not in self._steps:
            self._steps[bucket] = _Step(self, bucket)
        return self._steps[bucket]

    def decode(self, bucket: int) -> Tensor:
        """One step for the first rows of ``slots_T``; returns logits [T, K], the largest of which is drawn."""
        slots_T = self.slots_T[:bucket]
        logits_TK = self.layers.decode(slots_T, self.tokens_G, self.lengths_G)
        self.lengths_G.index_add_(0, slots_T, (slots_T < self.num_slots).long())
        self.tokens_G.index_copy_(0, slots_T, logits_TK.argmax(-1))
        return logits_TK

    def sample(self, logits_TK: Tensor, slots_T: Tensor, penalise: bool) -> None:
        """Sample again what was taken as the largest logit, for rows that ask for more."""
        positions_T = self.lengths_G.index_select(0, slots_T) - 1
        drawn_T = self.sampling.draw(logits_TK, slots_T, positions_T.clamp(min=0), penalise=penalise)
        self.tokens_G.index_copy_(0, slots_T, drawn_T)

    def result(self, logits_TK: Tensor, slots_T: Tensor, logprobs: bool) -> Tensor:
        """Values for the host: see ``read_back``."""
        return read_back(logits_TK, self.tokens_G.index_select(0, slots_T), logprobs=logprobs)

    def _ask(self, slots: Sequence[int]) -> _Ask:
        params = [self._params[slot] for slot in slots]
        penalises = any(p.has_penalties for p in params)
        return _Ask(
            samples=penalises or any(p.temperature > 0 for p in params),
            penalises=penalises,
            logprobs=any(p.logprobs is not None for p in params),
        )

    def capture(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A graph of ``function`` (``capture_graph``), or the function itself where there are no graphs."""
        if not self.use_graphs:
            return function
        return capture_graph(function, self._pool, [self.tokens_G, self.lengths_G, *self.sampling.state])

    # ------------------------------------------------------------------ prompts

    def _prefill(self, pieces: Sequence[Piece], complete: list[int]) -> Tensor:
        """Read pieces of prompts; the first tokens of those that are complete are drawn."""
        embeds = [piece.inputs_embeds for piece in pieces]
        output_rows, num_rows = [], 0
        for piece in pieces:
            num_rows += piece.end - piece.start
            if piece.is_last:
                output_rows.append(num_rows - 1)
        spans = [Span(piece.slot, piece.start, piece.end) for piece in pieces]
        inputs_embeds = torch.cat(embeds) if len(embeds) > 1 else embeds[0]
        logits_MK = self.layers.prefill(inputs_embeds, spans, output_rows)
        if not complete:
            return logits_MK
        ends = [piece.end for piece in pieces if piece.is_last]
        both = _pinned(torch.tensor([complete, ends]), self.device).to(self.device, non_blocking=True)
        slots_M, ends_M = both.unbind(0)
        self.lengths_G.index_copy_(0, slots_M, ends_M)
        self.tokens_G.index_copy_(0, slots_M, logits_MK.argmax(-1))
        ask = self._ask(complete)
        if ask.samples:
            self.sample(logits_MK, slots_M, ask.penalises)
        return self.result(logits_MK, slots_M, ask.logprobs)


class _Step:
    """The decoding step of one bucket: its graph, and those of what may follow it."""

    def __init__(self, runner: GraphRunner, bucket: int) -> None:
        self.runner, self.bucket = runner, bucket
        self._logits: Tensor | None = None
        self._decode = runner.capture(self._decode_rows)
        self._follow: dict[_Ask, Callable[[], Tensor]] = {}

    def run(self, ask: _Ask) -> Tensor:
        """One step; returns what the host reads of it."""
        result = self._decode()
        if ask == _Ask():
            return result
        if ask not in self._follow:
            self._follow[ask] = self.runner.capture(lambda: self._follow_up(ask))
        return self._follow[ask]()

    def _decode_rows(self) -> Tensor:
        self._logits = self.runner.decode(self.bucket)
        return self.runner.result(self._logits, self._slots_T, logprobs=False)

    def _follow_up(self, ask: _Ask) -> Tensor:
        assert self._logits is not None, "decoding comes first"
        if ask.samples:
            self.runner.sample(self._logits, self._slots_T, ask.penalises)
        return self.runner.result(self._logits, self._slots_T, ask.logprobs)

    @property
    def _slots_T(self) -> Tensor:
        return self.runner.slots_T[: self.bucket]


@dataclass(frozen=True)
class _HostBuffer:
    """A result on its way to the host: the copy, and the event after it."""

    values: Tensor
    event: torch.cuda.Event | None

    def read(self) -> list[list[float]]:
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()


def _to_host(result: Tensor) -> _HostBuffer:
    if not result.is_cuda:
        return _HostBuffer(result.clone(), None)
    host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
    host.copy_(result, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return _HostBuffer(host, event)


@dataclass(frozen=True)
class _Reads:
    """A launched step: rows of each of its results, in order."""

    parts: list[tuple[list[int], list[SamplingParams], _HostBuffer]]

    def read(self) -> list[Drawn]:
        """See ``Launch``."""
        drawn = []
        for slots, params, buffer in self.parts:
            rows = buffer.read()[: len(slots)]
            drawn += [_drawn(row, p) for row, p in zip(rows, params, strict=True)]
        return drawn


def _drawn(row: list[float], params: SamplingParams) -> Drawn:
    token, is_finite = int(row[0]), row[1] > 0
    if params.logprobs is None or not is_finite:
        return Drawn(token, is_finite)
    ids, values = np.split(np.array(row[3:]), 2)
    count = params.logprobs
    alternatives = tuple(zip(ids[:count].astype(int).tolist(), values[:count].tolist(), strict=True))
    return Drawn(token, is_finite, TokenLogprobs(token, row[2], alternatives))


def bucket_of(num_rows: int) -> int:
    """The smallest bucket that holds so many rows."""
    largest = BUCKETS[-1]
    return next((bucket for bucket in BUCKETS if bucket >= num_rows), -(-num_rows // largest) * largest)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor
