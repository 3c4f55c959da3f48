"""One training step, however it is computed: padded, packed or flat, compiled or not, peft's forward or ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft.tuners import lora
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training_batches import TRAINED, loss_and_gradient, make_sample, mixed_samples, relative, tiny_model
from tinygptv.config import TinyGPTVConfig
from tinygptv.data.collate import LoadedSample, collate
from tinygptv.data.sample import EncodedSample
from tinygptv.model.head_loss import score_logits
from tinygptv.model.lora import AdaptedLinear
from tinygptv.training import compilation, train_step
from tinygptv.training.compilation import compile_layers, wants_compilation
from tinygptv.training.stages import set_trainable
from tinygptv.training.train_step import TrainStep, set_dtypes


def padded(samples=None):
    return collate(samples or mixed_samples(), 0)


def packed():
    return collate(mixed_samples(), 0, pack_length=64)


@pytest.fixture(scope="module")
def reference():
    """Loss and gradient of the padded batch, as autograd and torch's cross-entropy compute them."""
    return loss_and_gradient(tiny_model(), padded())


@pytest.mark.parametrize(("make", "options"), [(packed, {}), (padded, {"flat": True}), (packed, {"flat": True})])
def test_padded_packed_and_flat_agree(reference, make, options):
    loss, gradient = loss_and_gradient(tiny_model(), make(), **options)
    assert loss == pytest.approx(reference[0], abs=1e-6)
    assert relative(gradient, reference[1]) < 1e-5


def test_flat_samples_do_not_see_each_other():
    """A sample's loss is the same alone and beside others."""
    model = tiny_model()
    step = make_step(model, flat=True)
    first = step.forward(padded([make_sample(9)]))
    both = step.forward(padded([make_sample(30, seed=3), make_sample(9)]))
    torch.testing.assert_close(both[-len(first) :], first)


def test_hidden_tokens_change_nothing_in_the_flat_form():
    """As the released recipe hides the BOS between turns."""
    encoded = EncodedSample()
    encoded.add([0, 5, 6])
    encoded.add([7, 8], learn=True)
    encoded.add([0], attend=False)
    encoded.add([9, 10])
    encoded.add([11, 12, 13], learn=True)
    batch = padded([make_sample(9), LoadedSample(encoded, 0)])
    masked, flat = (loss_and_gradient(tiny_model(), batch, flat=flat) for flat in (False, True))
    assert flat[0] == pytest.approx(masked[0], abs=1e-6) and relative(flat[1], masked[1]) < 1e-5


def test_losses_without_logits_agree(reference, monkeypatch):
    monkeypatch.setattr(TrainStep, "_scorer", lambda self: score_logits)
    for options in ({}, {"flat": True}):
        loss, gradient = loss_and_gradient(tiny_model(), padded(), **options)
        assert loss == pytest.approx(reference[0], abs=1e-6)
        assert relative(gradient, reference[1]) < 1e-5


def make_step(model, **options):
    trained = [p for p in model.parameters() if p.requires_grad]
    return TrainStep(model, torch.optim.SGD(trained, lr=0.0), num_sources=1, **options)


def test_when_layers_are_compiled():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [wants_compilation(setting, cpu) for setting in ("auto", "on", "off")] == [False, True, False]
    assert [wants_compilation(setting, cuda) for setting in ("auto", "on", "off")] == [True, True, False]


def test_a_step_compiles_what_it_is_asked_to(monkeypatch):
    compiled = []
    monkeypatch.setattr("tinygptv.training.train_step.compile_layers", compiled.append)
    assert not make_step(tiny_model()).compiled and not compiled
    assert not make_step(tiny_model(), compile="auto").compiled and not compiled
    assert make_step(tiny_model(), compile="on").compiled and len(compiled) == 1


def test_compiled_kernels_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(compilation, "CACHE_DIR", tmp_path)
    model = tiny_model()
    compile_layers(model, backend="eager")
    assert compilation.os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


class _NoWaiting(TorchDispatchMode):
    """Fails on what makes the host wait for a GPU."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


def test_a_flat_step_does_not_wait_for_the_device(monkeypatch):
    monkeypatch.setattr(TrainStep, "_scorer", lambda self: score_logits)
    num_tokens = torch.ones(())
    flat, rows = (make_step(tiny_model(), flat=flat) for flat in (True, False))
    with _NoWaiting():
        flat._accumulate(padded(), num_tokens)
    with pytest.raises(AssertionError, match="waits for the device"), _NoWaiting():
        rows._accumulate(padded(), num_tokens)  # searches image positions


# ------------------------------------------------------------------ LoRA


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_compute_what_peft_does(autocast):
    model = tiny_model(dtype=torch.bfloat16 if autocast else torch.float32)
    layer = model.language_model.layers[0].self_attn.qkv_proj
    assert isinstance(layer, AdaptedLinear)
    layer.scaling["default"] = 0.5
    x = torch.randn(7, 32, dtype=layer.weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = layer(x), lora.Linear.forward(layer, x)
    assert ours.dtype == theirs.dtype == layer.weight.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2 if autocast else 1e-6, atol=1e-2 if autocast else 1e-6)
    without = layer.base_layer(x)
    assert not torch.allclose(ours, without)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), without)


def test_wide_adapters_work_on_low_precision_weights_without_autocast():
    model = tiny_model(dtype=torch.bfloat16)
    layer = model.language_model.layers[0].self_attn.dense
    assert layer(torch.randn(3, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


# ------------------------------------------------------------------ precision


def test_what_trains_is_float32_and_the_encoder_takes_its_own_dtype():
    model = tiny_model(dtype=torch.bfloat16)
    set_trainable(model, ("qformer", "lora"))
    set_dtypes(model, torch.device("cuda"), "fp16")
    assert {p.dtype for p in model.qformer.parameters()} == {torch.float32}
    assert {p.dtype for p in model.vision_encoder.parameters()} == {torch.float16}
    set_trainable(model, TRAINED)
    set_dtypes(model, torch.device("cpu"), "bf16")
    assert {p.dtype for p in model.vision_encoder.parameters()} == {torch.float16}


@pytest.mark.parametrize("precision", ["bf16"])
def test_an_encoder_in_half_precision_is_near_the_float32_one(precision):
    exact = make_step(tiny_model())._query_features(padded())
    step = make_step(tiny_model(dtype=torch.bfloat16), precision=precision)
    features = step._query_features(padded())
    assert features.dtype == torch.bfloat16
    assert relative(features.float(), exact) < 0.03


def test_images_are_encoded_a_few_at_a_time(monkeypatch):
    """The number that is encoded together bounds memory, and changes no feature."""
    assert train_step.images_at_a_time(TinyGPTVConfig.phi2()) == 64
    assert train_step.images_at_a_time(TinyGPTVConfig.phi2(image_size=448)) == 16
    step = make_step(tiny_model())
    together = step._query_features(padded())
    monkeypatch.setattr(train_step, "MOST_PATCHES", 2 * 5)
    seen = []
    step.model.vision_encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    torch.testing.assert_close(step._query_features(padded()), together)
    assert seen == [2, 2]


@pytest.mark.parametrize("flat", [False, True])
def test_only_arrays_are_sent_to_the_device(monkeypatch, flat):
    """On a GPU they are pinned first, which tensors that are there already cannot be."""
    sent = []
    original = TrainStep._to_device
    monkeypatch.setattr(TrainStep, "_to_device", lambda self, array: sent.append(type(array)) or original(self, array))
    batch = padded()
    make_step(tiny_model(), flat=flat).run([batch], 0.0)
    batch.query_features, batch.pixels = np.zeros((4, 4, 24), dtype=np.float16), None
    make_step(tiny_model(), flat=flat).run([batch], 0.0)
    assert set(sent) == {np.ndarray}


def test_hooks_see_every_layer_of_a_step_as_written(monkeypatch):
    monkeypatch.setattr(TrainStep, "_scorer", lambda self: score_logits)
    model = tiny_model()
    step, called = make_step(model, flat=True), []
    model.lm_head.register_forward_hook(lambda *arguments: called.append("lm_head"))
    step.forward(padded())
    assert not called
    with step.as_written():
        step.forward(padded())
    assert called == ["lm_head"] and step.scorer is score_logits
