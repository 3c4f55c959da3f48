"""What a slot keeps of a request's sampling parameters on the device, and what a step reads back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tinygptv.inference.device_sampling import DeviceSampling, read_back
from tinygptv.inference.sampling import SamplingParams

CPU = torch.device("cpu")


def test_a_slot_has_the_options_and_the_numbers_of_its_request():
    sampling = DeviceSampling(3, 12, 20, CPU)
    params = SamplingParams(5, 0.5, 0.75, 4, 0.125, 1.5, 0.25, -0.5, seed=8)
    sampling.admit(1, params, np.array([2, 2, 7]), 4)
    assert sampling.options[1].tolist() == [0.5, 0.75, 4, 0.125, 1.5, 0.25, -0.5]
    draw = random.Random(8).random
    assert sampling.uniforms[1].tolist() == [0] * 3 + [draw() for _ in range(5)] + [0] * 4, "to the last bit"
    assert not sampling.options[[0, 2, 3]].any() and not sampling.uniforms[[0, 2, 3]].any()
    sampling.admit(0, SamplingParams(50, 1.0, seed=8), np.array([2]), 10)
    draw = random.Random(8).random
    assert sampling.uniforms[0].tolist() == [0] * 9 + [draw(), draw(), 0], "no more than there is room for"
    sampling.admit(2, SamplingParams(seed=8), np.array([2]), 4)
    assert not sampling.uniforms[2].any(), "a greedy answer draws no numbers"


def test_penalties_are_kept_from_the_first_request_on_that_asks_for_any():
    sampling = DeviceSampling(2, 8, 6, CPU)
    sampling.admit(0, SamplingParams(), np.array([1]), 1)
    assert sampling.state == [] and sampling.penalties is None
    bias = SamplingParams(logit_bias=((3, 3), (3, -1), (4, -2)))
    sampling.admit(1, bias, np.array([1, 5]), 2)
    seen, counts = sampling.state
    assert seen[1].tolist() == [False, True, False, False, False, True] and not seen[[0, 2]].any()
    assert sampling.penalties.bias[1].tolist() == [0, 0, 0, 2.0, -2.0, 0]
    slots, positions = torch.tensor([1, 0]), torch.tensor([1, 0])
    logits = torch.tensor([[0.0, 1.0, 2.0, 0.5, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 9.0]])
    assert sampling.draw(logits, slots, positions, penalise=False).tolist() == [4, 5] and not counts.any()
    assert sampling.draw(logits, slots, positions, penalise=True).tolist() == [3, 5]
    assert counts[1].tolist() == [0, 0, 0, 1, 0, 0] and counts[0].tolist() == [0, 0, 0, 0, 0, 1] and seen[1, 3]
    sampling.admit(1, SamplingParams(), np.array([2]), 1)
    assert not counts[1].any() and not sampling.penalties.bias[1].any()
    assert seen[1].tolist() == [False, False, True, False, False, False], "nothing of the request before is left"
    assert counts[0].any()


def test_a_frequency_counts_each_time_and_a_presence_once():
    sampling = DeviceSampling(1, 8, 3, CPU)
    sampling.admit(0, SamplingParams(frequency_penalty=0.25, presence_penalty=1.5), np.array([2]), 1)
    slots = torch.zeros(3, dtype=torch.int64)
    sampling.penalties.count(slots, torch.tensor([1, 1, 0]))
    found = sampling.penalties.apply(torch.zeros(1, 3), slots[:1], sampling.options[:1])
    assert found.tolist() == [[-1.75, -2.0, 0.0]], "the prompt does not count"


def test_temperatures_above_2_are_drawn_with():
    assert SamplingParams(temperature=5.0).temperature == 5.0
    with pytest.raises(ValueError, match=r"temperature is -0\.1; it must lie between 0 and inf"):
        SamplingParams(temperature=-0.1)


@pytest.mark.parametrize(
    ("params", "needs"),
    [
        ({}, False),
        ({"temperature": 1.0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 1}, False),
        ({"repetition_penalty": 0.9}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"presence_penalty": 0.1}, True),
        ({"logit_bias": ((1, 0.0),)}, True),
    ],
)
def test_which_requests_need_penalties(params, needs):
    assert SamplingParams(**params).has_penalties is needs


def test_what_a_step_reads_back():
    logits = torch.tensor([[0.0, 2.0, 1.0], [1.0, float("nan"), 0.0], [1.0, 0.0, float("-inf")]])
    tokens = torch.tensor([2, 0, 1])
    assert read_back(logits, tokens, logprobs=False).tolist() == [[2, 1], [0, 0], [1, 0]]
    row = read_back(logits, tokens, logprobs=True)[0]
    known = logits[0].log_softmax(-1)
    assert row[:2].tolist() == [2, 1] and row[3:6].tolist() == [1, 2, 0]
    torch.testing.assert_close(row[[2, 6, 7, 8]], known[[2, 1, 2, 0]])
    assert read_back(torch.zeros(1, 30), torch.tensor([3]), logprobs=True).shape == (1, 3 + 2 * 20)
