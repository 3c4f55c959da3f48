"""Training on a CUDA card: the numbers of the CPU, in every precision, compiled and not, with and without padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.training_batches import TRAINED, loss_and_gradient, make_sample, mixed_samples, relative, tiny_model
from tinygptv.data.collate import collate
from tinygptv.model.varlen_attention import runs_flash_attention
from tinygptv.quantization.frozen_linear import FrozenLinear, pack_frozen
from tinygptv.training.compilation import run_eagerly
from tinygptv.training.stages import set_trainable
from tinygptv.training.train_step import TrainStep, set_dtypes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]

WIDE = {"hidden_size": 160, "intermediate_size": 320, "num_attention_heads": 2, "num_hidden_layers": 2}
"""Heads of 80 as in Phi-2, which FlashAttention pads inside."""


def wide_model(device, dtype, **changes):
    from tinygptv.miniature.tiny import tiny_config

    text = {**tiny_config().text_config.to_dict(), **WIDE}
    return tiny_model(device, dtype, text_config=text, **changes)


def batch(pack_length=0):
    return collate(mixed_samples(), 0, pack_length=pack_length)


@pytest.fixture(scope="module")
def reference():
    """On the CPU in float32."""
    return loss_and_gradient(wide_model("cpu", torch.float32), batch())


def test_float32_is_the_cpus(reference):
    loss, gradient = loss_and_gradient(wide_model("cuda", torch.float32), batch())
    assert loss == pytest.approx(reference[0], abs=1e-5)
    assert relative(gradient, reference[1]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pack_length", [0, 64])
@pytest.mark.parametrize("flat", [False, True])
def test_sixteen_bits_padded_packed_and_flat(reference, dtype, pack_length, flat):
    if flat and not runs_flash_attention(torch.device("cuda")):
        pytest.skip("the card has no FlashAttention")
    precision = "bf16" if dtype == torch.bfloat16 else "fp16"
    model = wide_model("cuda", dtype)
    step = make_step(model, precision, flat=flat)
    losses = step.forward(batch(pack_length))
    losses.mean().backward()
    assert float(losses.mean()) == pytest.approx(reference[0], abs=0.03)
    assert relative(step.gradient, reference[1]) < (0.05 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("options", [{}, {"flat": True}, {"flat": True, "compile": "on"}])
def test_frozen_matrices_in_low_bits_are_as_their_unpacked_ones(form, options):
    if options and not runs_flash_attention(torch.device("cuda")):
        pytest.skip("the card has no FlashAttention")
    packed, full = wide_model("cuda", torch.bfloat16), wide_model("cuda", torch.bfloat16)
    pack_frozen(packed, form, torch.device("cuda"))
    for name, layer in packed.named_modules():
        if isinstance(layer, FrozenLinear):
            full.get_submodule(name).weight.data.copy_(layer.unpacked())
    results = []
    for model in (packed, full):
        torch.manual_seed(7)
        results.append(loss_and_gradient(model, batch(), precision="bf16", **options))
    assert results[0][0] == pytest.approx(results[1][0], abs=0.01)
    assert relative(results[0][1], results[1][1]) < 0.02


def make_step(model, precision, lr=0.0, **options):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, fused=trained[0].is_cuda)
    return TrainStep(model, optimizer, num_sources=1, precision=precision, **options)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_steps_are_the_uncompiled_ones(dropout):
    """The same weights, masks and batches of other lengths."""
    model = wide_model("cuda", torch.bfloat16, lora_dropout=dropout)
    step = make_step(model, "bf16", compile="on")
    for samples in (mixed_samples(), mixed_samples()[:3], [make_sample(90), make_sample(3)]):
        found = []
        for eager in (False, True):
            step.gradient.zero_()
            torch.manual_seed(7)
            with run_eagerly() if eager else torch.enable_grad():
                losses = step.forward(collate(samples, 0))
                losses.mean().backward()
            found.append((float(losses.mean()), step.gradient.clone()))
        assert found[0][0] == pytest.approx(found[1][0], abs=0.01)
        assert relative(found[0][1], found[1][1].cpu()) < 0.05
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("precision", "compile_", "flat"),
    [
        ("fp32", "off", None),
        ("bf16", "off", None),
        ("bf16", "on", None),
        ("fp16", "off", None),
        ("fp16", "on", None),
        ("fp16", "on", False),  # as on a card without FlashAttention
    ],
)
def test_thirty_steps_learn(precision, compile_, flat):
    """The loss of a batch falls, alike in all precisions; the scaler of fp16 settles within a few steps."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model = wide_model("cuda", dtype)
    set_trainable(model, TRAINED)
    set_dtypes(model, model.device, precision)
    step = make_step(model, precision, max_grad_norm=1.0, compile=compile_, flat=flat)
    results = [step.run([batch()], 3e-3) for _ in range(30)]
    losses = [float(result.loss) for result in results]
    assert np.isfinite(losses).all()
    assert sum(float(result.skipped) for result in results) <= 4
    assert losses[-1] < 0.8 * losses[0]
    if compile_ == "on":
        torch._dynamo.reset()


def test_features_computed_on_the_card_are_the_cpus():
    exact = make_step(tiny_model(), "fp32")._query_features(batch())
    for precision, dtype, limit in (("fp32", torch.float32, 1e-4), ("bf16", torch.bfloat16, 0.03)):
        step = make_step(tiny_model("cuda", dtype), precision)
        assert relative(step._query_features(batch()).float(), exact) < limit


def test_a_step_does_not_wait_for_the_card():
    step = make_step(wide_model("cuda", torch.bfloat16), "bf16")
    step.run([batch()], 0.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run([batch()], 0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
