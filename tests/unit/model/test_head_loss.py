"""The language head's loss without logits: the numbers of torch's cross-entropy, and little is kept."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tinygptv.model import head_loss
from tinygptv.model.head_loss import frozen_head_losses, score_logits


def inputs(dtype=torch.float64, rows=13, width=8, vocabulary=50):
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(vocabulary, width, dtype=dtype), torch.randn(vocabulary, dtype=dtype)
    return hidden, weight, bias, torch.randint(0, vocabulary, (rows,))


@pytest.mark.parametrize("chunk_rows", [4, 13, 512])
def test_losses_and_gradients_are_those_of_cross_entropy(monkeypatch, chunk_rows):
    monkeypatch.setattr(head_loss, "CHUNK_ROWS", chunk_rows)
    hidden, weight, bias, targets = inputs(torch.float32)
    upstream = torch.rand(len(targets))
    expected = functional.cross_entropy(functional.linear(hidden, weight, bias), targets, reduction="none")
    (gradient,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    losses = frozen_head_losses(hidden, weight, bias, targets)
    (own,) = torch.autograd.grad((losses * upstream).sum(), hidden)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(own, gradient)


def test_autocast_does_not_round_what_the_head_computes():
    hidden, weight, bias, targets = inputs(torch.float32)
    exact = frozen_head_losses(hidden, weight, bias, targets)
    with torch.autocast("cpu", torch.bfloat16):
        losses = frozen_head_losses(hidden, weight, bias, targets)
    assert torch.equal(losses, exact)
    assert torch.equal(*(torch.autograd.grad(each.sum(), hidden)[0] for each in (losses, exact)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_differ_by_rounding(dtype):
    hidden, weight, bias, targets = inputs(torch.float32, vocabulary=5000)
    exact = functional.cross_entropy(functional.linear(hidden, weight, bias), targets, reduction="none")
    (gradient,) = torch.autograd.grad(exact.sum() * 1e-3, hidden)
    losses = frozen_head_losses(hidden, weight.to(dtype), bias.to(dtype), targets)
    (own,) = torch.autograd.grad(losses.sum() * 1e-3, hidden)
    assert losses.dtype == own.dtype == torch.float32
    torch.testing.assert_close(losses, exact, rtol=0.01, atol=0.05)
    assert (own - gradient).norm() < 0.02 * gradient.norm()


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float16, 1024.0)])
def test_the_scorer_gets_rows_of_logits_in_the_heads_dtype_and_the_scale_of_its_gradient(monkeypatch, dtype, scale):
    monkeypatch.setattr(head_loss, "CHUNK_ROWS", 8)
    hidden, weight, bias, targets = inputs(torch.float32)
    seen = []

    def scorer(logits, some, factor):
        seen.append((logits.shape, logits.dtype, some.tolist(), factor))
        losses, slope = score_logits(logits, some, factor)
        return losses + 1, slope

    losses = frozen_head_losses(hidden, weight.to(dtype), bias.to(dtype), targets, scorer)
    ids = targets.tolist()
    assert seen == [((8, 50), dtype, ids[:8], scale), ((5, 50), dtype, ids[8:], scale)]
    assert torch.equal(losses, frozen_head_losses(hidden, weight.to(dtype), bias.to(dtype), targets) + 1)


def test_improbable_tokens_count_in_fp16():
    """Their probabilities are below fp16's smallest number, and there are many of them."""
    logits = torch.zeros(1, 60_000, dtype=torch.float16)
    logits[0, 0] = 9.0
    _, slope = score_logits(logits, torch.tensor([0]), 1024.0)
    assert slope[0, 1:].float().sum() / 1024 == pytest.approx(1 - float(logits[0].float().softmax(-1)[0]), rel=0.01)
    assert float(slope[0, 0]) / 1024 == pytest.approx(float(logits[0].float().softmax(-1)[0]) - 1, rel=0.01)


def test_only_the_gradient_of_the_hidden_states_is_kept():
    hidden, weight, bias, targets = inputs(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        frozen_head_losses(hidden, weight, bias, targets)
    assert kept == [hidden.shape]
