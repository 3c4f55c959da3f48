"""Sampling against transformers' logits processors, which define what the parameters mean."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tinygptv.inference import sampling
from tinygptv.inference.sampling import Sampler, SamplingParams, _invert


def frequencies(params, logits, draws=250):
    """How often each token is drawn, by numbers that are spread evenly over 0..1."""
    counts = torch.zeros(len(logits))
    sampler = Sampler(SamplingParams(**params), [])
    for number in range(draws):
        sampler._random = SimpleNamespace(random=lambda number=number: (number + 0.5) / draws)
        counts[sampler.draw(logits)] += 1
    return counts / draws


@pytest.mark.parametrize("candidates", [1024, 4])
@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"temperature": 1.0}, []),
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"temperature": 1.0, "top_k": 3}, [TopKLogitsWarper(3)]),
        ({"temperature": 1.0, "top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_p": 0.05}, [TopPLogitsWarper(0.05)]),
        ({"temperature": 1.0, "top_p": 0.0}, [TopPLogitsWarper(0.0)]),
        ({"temperature": 1.0, "min_p": 0.3}, [MinPLogitsWarper(0.3)]),
        ({"temperature": 1.0, "min_p": 0.01}, [MinPLogitsWarper(0.01)]),
        ({"temperature": 1.0, "min_p": 1.0}, [MinPLogitsWarper(1.0)]),
        ({"temperature": 1.5, "min_p": 0.05}, [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.05)]),
        ({"temperature": 1.0, "top_p": 0.9, "min_p": 0.02}, [TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)]),
        ({"temperature": 1.0, "top_p": 0.7, "min_p": 0.3}, [TopPLogitsWarper(0.7), MinPLogitsWarper(0.3)]),
        ({"temperature": 1.0, "top_k": 6, "min_p": 0.2}, [TopKLogitsWarper(6), MinPLogitsWarper(0.2)]),
        ({"temperature": 1.3, "top_p": 0.95}, [TemperatureLogitsWarper(1.3), TopPLogitsWarper(0.95)]),
        (
            {"temperature": 0.8, "top_k": 8, "top_p": 0.6},
            [TemperatureLogitsWarper(0.8), TopKLogitsWarper(8), TopPLogitsWarper(0.6)],
        ),
    ],
)
def test_distribution_is_that_of_transformers(params, warpers, candidates, monkeypatch):
    monkeypatch.setattr(sampling, "NUCLEUS_CANDIDATES", candidates)
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 1.5, 16).astype(np.float32))
    wanted = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0].softmax(-1)
    got = frequencies(params, logits)
    assert not got[wanted == 0].any(), "a token was drawn that transformers would never draw"
    assert (got - wanted).abs().max() < 0.005


def test_a_seed_gives_the_same_draws_and_none_gives_others():
    logits = torch.zeros(10_000)

    def draws(seed):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [])
        return [sampler.draw(logits) for _ in range(4)]

    assert draws(0) == draws(0) and draws(-3) == draws(-3), "0 is a seed as any other"
    assert len({tuple(draws(seed)) for seed in (0, 1, 2**40, None, None)}) == 5


def test_what_a_request_leaves_out_is_256_tokens_drawn_greedily():
    assert SamplingParams() == SamplingParams(256, 0.0, 1.0, 0, 0.0, 1.0, 0.0, 0.0, (), None, (), None, False)


def test_repetition_penalty_is_that_of_transformers():
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 2, 40).astype(np.float32))
    seen = [3, 9, 9, 21]
    params = SamplingParams(repetition_penalty=1.7)
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits[None])[0]
    sampler = Sampler(params, seen)
    torch.testing.assert_close(sampler._penalise(logits), wanted)
    token = sampler.draw(logits)
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[*seen, token]]), logits[None])[0]
    torch.testing.assert_close(sampler._penalise(logits), wanted)


def test_frequency_and_presence_penalties_count_the_answer_only():
    logits = torch.tensor([2.0, 1.9, 1.0])
    sampler = Sampler(SamplingParams(frequency_penalty=0.05, presence_penalty=0.06), prompt_ids=[0, 0, 0])
    assert [sampler.draw(logits) for _ in range(4)] == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("penalties", "drawn"),
    [
        ({"presence_penalty": 0.3}, [0, 1, 0, 0]),
        ({"frequency_penalty": 0.3}, [0, 1, 0, 1]),
        ({"frequency_penalty": 0.3, "presence_penalty": -0.3}, [0, 0, 1, 1]),
        ({"repetition_penalty": 1.5}, [0, 1, 0, 0]),
        ({"repetition_penalty": 2.0}, [0, 1, 0, 0]),
        ({"repetition_penalty": 0.5}, [0, 0, 0, 0]),
        ({"logit_bias": ((1, 0.3),)}, [1, 1, 1, 1]),
        ({}, [0, 0, 0, 0]),
    ],
)
def test_each_penalty_counts_as_it_says(penalties, drawn):
    """Logits of 2, 1.8 and -9, four tokens in a row: a presence counts once, a frequency each time."""
    logits = torch.tensor([2.0, 1.8, -9.0])
    sampler = Sampler(SamplingParams(**penalties), [])
    assert [sampler.draw(logits) for _ in range(4)] == drawn
    assert logits.tolist() == pytest.approx([2.0, 1.8, -9.0])


@pytest.mark.parametrize(("asked", "told"), [(0, 0), (1, 1), (2, 2), (20, 3)])
def test_as_many_alternatives_as_are_asked_for(asked, told):
    logits = torch.tensor([1.0, 3.0, 2.0])
    found = Sampler(SamplingParams(logprobs=asked, logit_bias=((0, 9.0),)), []).logprobs(logits, 0)
    expected = logits.log_softmax(-1).tolist()
    assert (found.token_id, found.logprob) == (0, pytest.approx(expected[0])), "of the model, before the bias"
    assert found.alternatives == tuple((token, pytest.approx(expected[token])) for token in [1, 2, 0][:told])


def test_bias_forbids_and_forces():
    logits = torch.tensor([3.0, 2.0, 1.0])
    assert Sampler(SamplingParams(logit_bias=((0, -100.0),)), []).draw(logits) == 1
    assert Sampler(SamplingParams(logit_bias=((2, 100.0),)), []).draw(logits) == 2
    assert logits.tolist() == [3.0, 2.0, 1.0], "the engine's logits must stay as they are"


@pytest.mark.security
def test_the_cost_of_a_token_does_not_grow_with_the_biases():
    """A loop over so many entries took half a second per token, on the thread that answers everybody."""
    logits = torch.zeros(51_200)
    sampler = Sampler(SamplingParams(logit_bias=tuple((token, 1.0 + (token == 7)) for token in range(51_200))), [])
    assert sampler.draw(logits) == 7
    started = time.process_time()
    assert [sampler.draw(logits) for _ in range(5)] == [7] * 5
    assert time.process_time() - started < 1.5


def test_a_seed_repeats_an_answer():
    logits = torch.zeros(50)
    draw = lambda seed: [Sampler(SamplingParams(temperature=1, seed=seed), []).draw(logits) for _ in range(1)]  # noqa: E731
    assert draw(4) == draw(4)
    assert len({tuple(draw(seed)) for seed in range(20)}) > 5


def test_without_a_seed_every_answer_is_drawn_anew():
    logits = torch.zeros(50)
    drawn = {
        tuple(s.draw(logits) for _ in range(6)) for s in (Sampler(SamplingParams(temperature=1), []) for _ in range(8))
    }
    assert len(drawn) == 8


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"stop": ("",)},
        {"stop": ("a", "")},
        {"max_tokens": float("inf")},
    ],
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must lie between 1 and inf."),
        ({"top_p": 2}, "top_p is 2; it must lie between 0 and 1."),
    ],
)
def test_a_refusal_names_the_range(wrong, told):
    with pytest.raises(ValueError) as caught:
        SamplingParams(**wrong)
    assert str(caught.value) == told


@pytest.mark.parametrize(("uniform", "index"), [(0.0, 1), (0.49, 1), (0.5, 3), (0.99, 3), (1.0, 4)])
def test_a_number_finds_its_token_by_shares_of_whatever_they_sum_to(uniform, index):
    """Rounded probabilities need not sum to 1; what has none is never drawn below the end."""
    for total in (1.0, 0.5, 2.0):
        assert _invert(torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]) * total, uniform) == index
