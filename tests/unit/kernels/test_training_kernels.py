"""Triton kernels of a training step against plain torch, through the interpreter on a CPU; and their autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tinygptv.kernels import training_functions, training_reference

rows = pytest.importorskip("tinygptv.kernels.training_rows")
heads = pytest.importorskip("tinygptv.kernels.training_heads")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, N, H, ROTARY = 7, 2, 20, 8
D = N * H
DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]


def _random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def _same(actual, expected):
    """The same numbers, and the same ones missing; masks of dropout decide between 0 and something."""
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            tolerance = 2e-5 if a.dtype == torch.float32 else 1e-2
            torch.testing.assert_close(a.float(), b.float(), atol=tolerance, rtol=tolerance)


@pytest.fixture
def seeds():
    return training_functions.draw_seeds(1, torch.device(DEVICE))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("trains", [True, False])
def test_norm_and_drop(seeds, dtype, p, trains):
    hidden, weight, bias = _random(1, T, D), _random(D), _random(D)
    expected = training_reference.norm_and_drop(hidden, weight, bias, 0.25, seeds, 0, p, dtype)
    _same(rows.norm_and_drop(hidden, weight, bias, 0.25, seeds, 0, p, dtype), expected)
    grads = (_random(1, T, D), *(_random(1, T, D, dtype=dtype) for _ in range(2)), None)
    grads = (*grads[:3], _random(1, T, D, dtype=dtype)) if p else grads
    arguments = (hidden, weight, *expected[2:], seeds, 0, p, grads, trains, trains)
    results = [ops.norm_and_drop_backward(*arguments) for ops in (rows, training_reference)]
    _same(*results)
    assert (results[0][1] is not None) == trains


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_add_branches(seeds, dtype, p):
    hidden, weight = _random(1, T, D), _random(D)
    attention, mlp = _random(1, T, D, dtype=dtype), _random(1, T, D, dtype=dtype)
    arguments = (hidden, attention, weight, 0.5, mlp, seeds, (2, 3), p)
    expected = training_reference.add_branches(*arguments)
    _same(rows.add_branches(*arguments), expected)
    arguments = (_random(1, T, D), attention, weight, expected[1], seeds, (2, 3), p, True)
    _same(rows.add_branches_backward(*arguments), training_reference.add_branches_backward(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_drop(seeds, dtype):
    x, passed = _random(1, T, D, dtype=dtype), _random(1, T, D, dtype=dtype)
    _same([rows.drop(x, seeds, 1, 0.3)], [training_reference.drop(x, seeds, 1, 0.3)])
    results = [ops.drop_backward(passed, x, seeds, 1, 0.3) for ops in (rows, training_reference)]
    _same([results[0]], [results[1]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate_heads(dtype):
    qkv = _random(1, T, 3 * D, dtype=dtype)
    norms = [(_random(H), _random(H)) for _ in range(2)]
    angles = torch.rand(1, T, ROTARY // 2, device=DEVICE) * 6
    cos, sin = (torch.cat((x, x), -1) for x in (angles.cos(), angles.sin()))
    arguments = (qkv, *norms, 0.25, cos, sin, N)
    _same(heads.rotate_heads(*arguments), training_reference.rotate_heads(*arguments))
    grads = tuple(_random(T, N, H, dtype=dtype) for _ in range(3))
    for trains in ((True, True), (True, False), (False, True)):
        arguments = (qkv, norms[0][0], norms[1][0], 0.25, cos, sin, grads, *trains)
        results = [ops.rotate_heads_backward(*arguments) for ops in (heads, training_reference)]
        _same(*results)
        assert [[part is not None for part in result[1:]] for result in results] == [list(trains)] * 2


def test_dropout_drops_its_share_and_depends_on_seed_and_site(seeds):
    shape = torch.Size((400, 500))
    kept = [training_reference.is_kept(shape, seeds, site, 0.1) for site in range(4)]
    for mask in kept:
        assert abs(float(mask.float().mean()) - 0.9) < 0.003  # 4 deviations
        for dim in (0, 1):
            assert float(mask.float().mean(dim).sub(0.9).abs().max()) < 0.08
    both = (kept[0] & kept[1]).float().mean()
    assert abs(float(both) - 0.81) < 0.004
    neighbours = (kept[0][:, 1:] & kept[0][:, :-1]).float().mean()
    assert abs(float(neighbours) - 0.81) < 0.004
    assert not torch.equal(training_reference.is_kept(shape, seeds + 1, 0, 0.1), kept[0])


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_dropout_outside_0_to_1_is_refused(seeds, p):
    with pytest.raises(ValueError, match=f"dropout is {p}"):
        training_reference.drop_threshold(p)


def test_gradients_are_those_of_autograd(seeds):
    """In float32 against the same formulas written with torch's own operations; masks are those of the seeds."""
    p, rms_eps = 0.3, 0.5
    hidden, weight, bias, rms = (_random(*s).requires_grad_() for s in ((1, T, D), (D,), (D,), (D,)))
    attention, mlp = _random(1, T, D).requires_grad_(), _random(1, T, D).requires_grad_()
    masks = [training_reference.is_kept(hidden.shape, seeds, site, p) / (1 - p) for site in range(4)]
    factors = [_random(1, T, D) for _ in range(3)]

    def fused():
        stream, first, second, dropped = training_functions.NormAndDrop.apply(
            hidden, weight, bias, seeds, 0.25, p, torch.float32
        )
        passed, again = training_functions.DropForAdapter.apply(attention, seeds, p)
        output = training_functions.AddBranches.apply(stream, passed, rms, mlp, seeds, rms_eps, p)
        return output + first * factors[0] + second * factors[1] + dropped * factors[2] + again

    def plain():
        normed = nn.functional.layer_norm(hidden, (D,), weight, bias, 0.25)
        scaled = attention * torch.rsqrt(attention.square().mean(-1, keepdim=True) + rms_eps) * rms
        output = hidden + scaled * masks[2] + mlp * masks[3]
        output = output + normed * (factors[0] + factors[1]) + normed * masks[0] * factors[2]
        return output + attention * masks[1]

    inputs, results = (hidden, weight, bias, rms, attention, mlp), []
    for function in (fused, plain):
        output = function()
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-4)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_normalised_is_of_the_matrices_dtype_and_the_stream_stays_as_it_is(seeds, dtype, p):
    hidden, weight, bias = _random(1, T, D), _random(D), _random(D)
    stream, first, second, *dropped = training_functions.NormAndDrop.apply(hidden, weight, bias, seeds, 0.25, p, dtype)
    assert torch.equal(stream, hidden) and torch.equal(first, second) and len(dropped) == (p > 0)
    assert {x.dtype for x in (first, second, *dropped)} == {dtype}


@pytest.mark.parametrize("trains", [(True, False), (False, True)], ids=["weight", "bias"])
def test_only_what_trains_has_a_gradient(seeds, trains):
    hidden = _random(1, T, D).requires_grad_()
    weight, bias = (_random(D).requires_grad_(wanted) for wanted in trains)
    _, first, second = training_functions.NormAndDrop.apply(hidden, weight, bias, seeds, 0.25, 0.0, torch.float32)
    (first + second).sum().backward()
    assert [x.grad is not None for x in (hidden, weight, bias)] == [True, *trains]


@pytest.mark.parametrize("trained", range(4))
def test_each_part_of_the_heads_norms_can_train_alone(trained):
    qkv, cos, sin = _random(1, T, 3 * D).requires_grad_(), _random(1, T, ROTARY), _random(1, T, ROTARY)
    factors = [_random(T, N, H) for _ in range(3)]

    def gradients(*wanted):
        norms = [part.clone().requires_grad_(index in wanted) for index, part in enumerate(values)]
        made = training_functions.RotateHeads.apply(qkv, *norms, cos, sin, 0.25, N)
        sum((part * factor).sum() for part, factor in zip(made, factors, strict=True)).backward()
        return [part.grad for part in norms]

    values = [_random(H) for _ in range(4)]
    all_of_them, alone = gradients(0, 1, 2, 3), gradients(trained)
    assert [part is not None for part in alone] == [index == trained for index in range(4)]
    assert torch.equal(alone[trained], all_of_them[trained]) and alone[trained].any()


@pytest.mark.parametrize("drops", [False, True])
def test_adapted_product_is_the_adapted_linear_layer(drops):
    x = _random(1, T, D).requires_grad_()
    dropped = _random(1, T, D).requires_grad_() if drops else None
    weight, bias = _random(3 * D, D), _random(3 * D)
    down, up = _random(4, D).requires_grad_(), _random(3 * D, 4).requires_grad_()
    fused = training_functions.AdaptedProduct.apply(x, dropped, weight, bias, down, up, 0.5)
    plain = nn.functional.linear(x, weight, bias) + (x if dropped is None else dropped) @ down.T @ up.T * 0.5
    torch.testing.assert_close(fused, plain, atol=1e-4, rtol=1e-4)
    factor = torch.randn_like(plain)
    inputs = (x, down, up) if dropped is None else (x, dropped, down, up)
    for a, b in zip(*(torch.autograd.grad((y * factor).sum(), inputs) for y in (fused, plain)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
