"""How the rows and pieces of a step become one forward pass, and whose tokens come out of it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tinygptv.inference.flat_layer import Segment
from tinygptv.inference.runner import Drawn, FlatRunner, Piece, Row
from tinygptv.inference.sampling import SamplingParams


class Decoder:
    """Notes what it is asked for; logits are what the test says."""

    num_slots, device = 4, torch.device("cpu")

    def __init__(self, logits=None):
        self.logits, self.forwarded = logits, []

    def copy_prefix(self, *values):
        return ("copied", *values)

    def clear(self, slot):
        return ("cleared", slot)

    def embed(self, tokens):
        return tokens[:, None].float()

    def decoding_mask(self, lengths, longest):
        return ("decoding", lengths.tolist(), longest)

    def prompt_mask(self, start, end):
        return ("prompt", start, end)

    def cache_rows(self, slots, positions):
        return slots * 100 + positions

    def forward(self, embeds, plan):
        self.forwarded.append((embeds.flatten().tolist(), plan))
        return self.logits


def piece(slot, start, end, *, is_last=False):
    return Piece(slot, start, end, torch.arange(start, end)[:, None].float(), is_last)


@pytest.mark.parametrize(
    ("rows", "segments"),
    [
        ([Row(0, 5)], [(0, 1, 0, 1, 6, None)]),
        ([Row(0, 5), Row(1, 5)], [(0, 2, 0, 2, 6, None)]),
        ([Row(1, 5), Row(2, 4)], [(0, 2, 1, 3, 6, ("decoding", [6, 5], 6))]),
        ([Row(0, 5), Row(2, 4), Row(3, 9)], [(0, 1, 0, 1, 6, None), (1, 3, 2, 4, 10, ("decoding", [5, 10], 10))]),
        ([], []),
    ],
)
def test_neighbouring_slots_are_one_segment_with_a_mask_where_lengths_differ(rows, segments):
    found = FlatRunner(Decoder())._decoding_segments(rows)
    assert found == [Segment(slice(a, b), slice(c, d), length, mask) for a, b, c, d, length, mask in segments]


def test_a_step_has_rows_first_and_each_piece_at_its_own_positions():
    pieces = [piece(2, 0, 3), piece(3, 4, 6, is_last=True), piece(0, 7, 8, is_last=True)]
    plan = FlatRunner(Decoder())._plan([Row(1, 9)], pieces)
    assert plan.positions.tolist() == [9, 0, 1, 2, 4, 5, 7] and plan.num_decoding == 1
    assert plan.cache_rows.tolist() == [109, 200, 201, 202, 304, 305, 7]
    assert plan.output_rows.tolist() == [0, 5, 6], "of the row, and of the last positions of whole prompts"
    assert plan.segments == [
        Segment(slice(0, 1), slice(1, 2), 10, None),
        Segment(slice(1, 4), slice(2, 3), 3, None, is_causal=True),
        Segment(slice(4, 6), slice(3, 4), 6, ("prompt", 4, 6), is_causal=False),
        Segment(slice(6, 7), slice(0, 1), 8, None, is_causal=False),
    ]
    assert FlatRunner(Decoder())._plan([Row(1, 9), Row(2, 3)], []).output_rows is None


def admitted(decoder, *slots, **params):
    runner = FlatRunner(decoder)
    for slot in slots:
        runner.admit(slot, SamplingParams(temperature=0.0, **params), np.array([1, 2]), 2)
    return runner


def test_tokens_are_those_of_the_rows_and_then_of_the_prompts_that_end():
    decoder = Decoder(torch.eye(3)[[2, 0]])
    runner = admitted(decoder, 0, 1, 3)
    runner._last_tokens[1] = 42
    launch = runner.launch([Row(1, 9)], [piece(0, 0, 2), piece(3, 4, 6, is_last=True)])
    assert [drawn.token for drawn in launch.read()] == [2, 0] and all(drawn.is_finite for drawn in launch.read())
    assert decoder.forwarded[0][0] == [42.0, 0.0, 1.0, 4.0, 5.0], "the row's last token, then the prompts' embeddings"
    assert decoder.forwarded[0][1].positions.tolist() == [9, 0, 1, 4, 5]
    assert runner._last_tokens == {1: 2, 3: 0} and runner._samplers[3].prompt_ids == [1, 2]
    runner.launch([Row(1, 10)], [piece(0, 2, 4, is_last=True)])
    assert decoder.forwarded[1][0] == [2.0, 2.0, 3.0], "one piece beside the row"
    assert runner.num_slots == 4 and runner.copy_prefix(1, 2, 3) == ("copied", 1, 2, 3) and runner.clear(2)[1] == 2


class Elsewhere(Decoder):
    """On another device; notes where each tensor is that it gets."""

    device = torch.device("meta")

    def embed(self, tokens):
        self.forwarded.append(tokens)
        return tokens[:, None].float()

    def decoding_mask(self, lengths, longest):
        self.forwarded.append(lengths)

    def cache_rows(self, slots, positions):
        self.forwarded += [slots, positions]

    def forward(self, embeds, plan):
        self.forwarded += [embeds, plan.positions, plan.output_rows]
        return self.logits


def test_all_that_a_step_is_made_of_is_where_the_decoder_is():
    decoder = Elsewhere(torch.eye(2))
    runner = admitted(decoder, 0, 1)
    runner._last_tokens = {0: 7, 1: 8}
    runner.launch([Row(0, 5), Row(1, 4)], [Piece(2, 0, 3, torch.ones(3, 1, device="meta"), is_last=False)])
    assert [tensor.device.type for tensor in decoder.forwarded] == ["meta"] * 7


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_with_a_bad_value_gets_no_token_and_the_others_theirs(bad):
    logits = torch.eye(3)[[2, 1]]
    logits[0, 1] = bad
    runner = admitted(Decoder(logits), 0, 1)
    runner._last_tokens = {0: 7, 1: 8}
    assert runner.launch([Row(0, 3), Row(1, 3)], []).read() == [Drawn(0, is_finite=False), Drawn(1, is_finite=True)]
    assert runner._last_tokens == {0: 7, 1: 1}


def test_probabilities_are_told_where_they_are_asked_for():
    runner = admitted(Decoder(torch.eye(3)[[2]]), 0, logprobs=2)
    runner._samplers[0] = SimpleNamespace(
        params=runner._samplers[0].params, draw=lambda logits: 1, logprobs=lambda logits, token: ("of", token)
    )
    runner._last_tokens[0] = 5
    (drawn,) = runner.launch([Row(0, 3)], []).read()
    assert drawn.logprobs == ("of", drawn.token)


@pytest.mark.parametrize(
    ("params", "is_drawn"),
    [
        ({}, False),
        ({"temperature": 0.7}, True),
        ({"repetition_penalty": 1.5}, True),
        ({"logit_bias": ((0, 1.0),)}, True),
        ({"logprobs": 0}, False),
    ],
)
def test_the_token_of_a_slot_is_the_one_that_was_drawn(params, is_drawn):
    runner = FlatRunner(Decoder(torch.eye(3)[[2]]))
    runner.admit(0, SamplingParams(**params), np.array([1, 2]), 2)
    runner._samplers[0].draw = lambda logits: int(logits.argmin()) + 1
    runner._last_tokens[0] = 5
    (drawn,) = runner.launch([Row(0, 3)], []).read()
    assert runner._last_tokens == {0: drawn.token} and drawn.token == (1 if is_drawn else 2)
    found = drawn.logprobs
    assert (found and (found.token_id, found.alternatives)) == ((2, ()) if "logprobs" in params else None)
