"""What a training step asks of its model, its workers and its optimizer, beside a model that only records."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.recording_model import RecordingModel, batch_of, recording_step
from tests.training_batches import make_sample
from tinygptv.data.collate import collate
from tinygptv.data.flatten import flatten
from tinygptv.data.images import normalise_pixels
from tinygptv.model.head_loss import score_logits
from tinygptv.training import train_step
from tinygptv.training.train_step import TrainStep, images_at_a_time, is_flat, is_fused, set_dtypes

CUDA = torch.device("cuda")


# ---------------------------------------------------------------------- what is computed how


@pytest.mark.parametrize(
    ("patches", "images"), [(256, 64), (64 * 257 - 1, 1), (64 * 257, 1), (32 * 257 - 1, 2), (32 * 257, 1)]
)
def test_images_at_a_time_fill_the_bound_and_are_one_at_least(patches, images):
    assert images_at_a_time(SimpleNamespace(vision_config=SimpleNamespace(num_patches=patches))) == images


def test_batches_are_flat_on_cuda_in_16_bits_with_sdpa(monkeypatch):
    def model(device="cuda", attention="sdpa"):
        config = SimpleNamespace(_attn_implementation=attention)
        return SimpleNamespace(device=torch.device(device), language_model=SimpleNamespace(config=config))

    cards = {0: (8, 0), 1: (7, 5), 2: (12, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cards[device.index or 0])
    precisions = ("bf16", "fp16", "fp32", "fp16_range")
    assert [is_flat(model(), precision) for precision in precisions] == [True, True, False, False]
    assert not is_flat(model("cpu"), "bf16") and not is_flat(model(attention="eager"), "bf16")
    assert is_flat(model("cuda:2"), "fp16") and not is_flat(model("cuda:1"), "fp16"), "FlashAttention begins with 8.0"
    assert not is_fused(model("cuda:1"), "fp16")
    monkeypatch.setattr(train_step, "FUSED_LAYERS", True)
    assert [is_fused(model(), precision) for precision in precisions] == [True, True, False, False]
    monkeypatch.setattr(train_step, "FUSED_LAYERS", False)
    assert not is_fused(model(), "bf16")


def test_what_is_not_said_follows_from_model_and_precision(monkeypatch):
    asked = []
    monkeypatch.setattr(train_step, "is_flat", lambda *given: asked.append(given) or "flat")
    monkeypatch.setattr(train_step, "is_fused", lambda *given: asked.append(given) or "fused")
    monkeypatch.setattr(train_step, "wants_compilation", lambda *given: asked.append(given) or False)
    step = recording_step(precision="bf16")
    assert (step.flat, step.fused, step.compiled) == ("flat", "fused", False)
    assert asked == [(step.model, "bf16"), (step.model, "bf16"), ("off", torch.device("cpu"))]
    monkeypatch.setattr(train_step, "wants_compilation", lambda *given: asked.append(given) or True)
    monkeypatch.setattr(train_step, "compile_layers", asked.append)
    step = recording_step(flat=False, fused=False, compile="on")
    assert (step.flat, step.fused, step.compiled) == (False, False, True)
    assert asked[3:] == [("on", torch.device("cpu")), step.model]


@pytest.mark.parametrize(("device", "frozen"), [("cuda", torch.float16), ("cpu", torch.bfloat16)])
@pytest.mark.parametrize("trained", ["vision_encoder", "qformer", "language_model"])
def test_what_trains_is_float32_and_frozen_parts_take_the_encoders_dtype_on_cuda(device, frozen, trained):
    parts = {
        name: nn.Linear(1, 1, dtype=torch.bfloat16).requires_grad_(name == trained)
        for name in ("vision_encoder", "qformer", "language_model")
    }
    model = nn.Module()
    for name, part in parts.items():
        model.add_module(name, part)
    set_dtypes(model, torch.device(device), "fp16")
    wanted = {"vision_encoder": frozen, "qformer": frozen, "language_model": torch.bfloat16, trained: torch.float32}
    assert {name: part.weight.dtype for name, part in parts.items()} == wanted
    assert {name: part.bias.dtype for name, part in parts.items()} == wanted


@pytest.mark.parametrize(
    ("options", "dtypes"),
    [
        ({}, (torch.float32, torch.float32)),
        ({"precision": "bf16"}, (torch.bfloat16, torch.bfloat16)),
        ({"precision": "bf16", "encoder_precision": "fp32"}, (torch.bfloat16, torch.float32)),
        ({"encoder_precision": "fp16"}, (torch.float32, torch.float16)),
        ({"precision": "fp16_range"}, (torch.float32, torch.float32)),
    ],
)
def test_precisions(monkeypatch, options, dtypes):
    emulated = []
    monkeypatch.setattr(train_step, "emulate_half_range", emulated.append)
    step = recording_step(**options)
    assert (step.autocast_dtype, step.encoder_dtype) == dtypes
    is_emulated = options.get("precision") == "fp16_range"
    assert step.scaler.is_enabled() == is_emulated and emulated == ([step.model] if is_emulated else [])
    assert recording_step(precision="fp16").scaler.is_enabled()


def test_a_precision_that_there_is_not_is_refused_with_those_that_there_are():
    for options in (
        {"precision": "fp8"},
        {"encoder_precision": "fp8"},
        {"precision": "fp8", "encoder_precision": "fp16"},
    ):
        with pytest.raises(ValueError, match="fp8") as caught:
            recording_step(**options)
        assert str(caught.value) == "precision is 'fp8'; choose one of ['bf16', 'fp16', 'fp16_range', 'fp32']."


def test_all_gradients_are_views_of_one_buffer():
    step = recording_step()
    weight, bias = step.model.projector.weight, step.model.projector.bias
    assert [name for name, _ in step.named] == ["projector.weight", "projector.bias"], "what is frozen is left out"
    assert step.gradient.tolist() == [0.0] * 4 and step._sums.dtype == torch.float64
    step.gradient.copy_(torch.arange(4.0))
    assert weight.grad.tolist() == [[0.0], [1.0]] and bias.grad.tolist() == [2.0, 3.0]


def test_gradients_lie_one_after_the_other():
    step = recording_step()
    parameters = [nn.Parameter(torch.zeros(*shape)) for shape in ((2,), (1, 3), (2, 2))]
    step.named = [(str(number), parameter) for number, parameter in enumerate(parameters)]
    step.gradient = torch.arange(9.0)
    step._attach_gradients()
    assert [parameter.grad.tolist() for parameter in parameters] == [[0, 1], [[2, 3, 4]], [[5, 6], [7, 8]]]


def test_what_a_step_keeps_is_on_the_models_device(monkeypatch):
    scalers = []

    def make_scaler(*given, **options):
        scalers.append((given, options))
        return SimpleNamespace(scale=lambda tensor: tensor)

    monkeypatch.setattr(train_step.torch.amp, "GradScaler", make_scaler)
    monkeypatch.setattr(TrainStep, "_scorer", lambda self: "scorer")
    model = RecordingModel().to("meta")
    model.device = torch.device("meta")
    step = recording_step(model, num_sources=3)
    assert scalers == [(("meta",), {"enabled": False})] and step.scorer == "scorer" and step.num_sources == 3
    kept = (step.gradient, step._sums, step._clipped_by)
    assert [(tuple(tensor.shape), tensor.device.type) for tensor in kept] == [
        ((4,), "meta"),
        ((2, 3), "meta"),
        ((), "meta"),
    ]


def test_the_loss_function_without_logits_is_for_cuda_with_a_frozen_head(monkeypatch):
    monkeypatch.setattr(train_step, "compiled_scorer", lambda: "compiled")
    step = recording_step()
    assert step.scorer is None and step._scorer() is None
    step.device = CUDA
    assert step._scorer() is score_logits
    step.compiled = True
    assert step._scorer() == "compiled"
    step.model.lm_head.requires_grad_(True)
    assert step._scorer() is None


def test_as_written_is_left_again_after_an_error(monkeypatch):
    inside = []

    @contextmanager
    def run_eagerly():
        inside.append("eager")
        yield
        inside.append("left")

    monkeypatch.setattr(train_step, "run_eagerly", run_eagerly)
    step = recording_step(flat=True, fused=True)
    step.scorer = score_logits
    with step.as_written():
        assert (step.scorer, step.fused, step.flat) == (None, False, True) and inside == ["eager"]
    assert (step.scorer, step.fused) == (score_logits, True) and inside == ["eager", "left"]
    with pytest.raises(RuntimeError, match="inside"), step.as_written():
        raise RuntimeError("inside")
    assert (step.scorer, step.fused) == (score_logits, True)


# ---------------------------------------------------------------------- the forward pass


def test_a_padded_batch_reaches_the_model_as_it_is():
    step, batch = recording_step(precision="bf16"), batch_of(3, 8, image=True)
    step.scorer = score_logits
    losses = step.forward(batch)
    assert losses.tolist() == pytest.approx((2.0 * batch.supervised_ids).tolist())
    ids, options, in_autocast = step.model.embedded
    assert torch.equal(ids, torch.as_tensor(batch.input_ids)) and in_autocast and list(options) == ["query_features"]
    wanted = normalise_pixels(torch.as_tensor(batch.pixels)).mean(dim=(1, 2, 3)).view(-1, 1, 1)
    torch.testing.assert_close(options["query_features"], wanted)
    inputs, positions, supervised, options, in_autocast = step.model.scored
    assert inputs.shape == (*batch.input_ids.shape, 4) and in_autocast
    assert torch.equal(positions, torch.as_tensor(batch.supervised_positions))
    assert torch.equal(supervised, torch.as_tensor(batch.supervised_ids))
    assert options == {"attention_mask": None, "position_ids": None, "scorer": score_logits}


def test_masks_and_positions_reach_the_model_where_there_are_any():
    step, batch = (
        recording_step(),
        collate([make_sample(3, image=False), make_sample(8, image=False)], 0, pack_length=64),
    )
    batch.attention_mask = np.ones_like(batch.input_ids)
    step.forward(batch)
    options = step.model.scored[3]
    assert torch.equal(options["position_ids"], torch.as_tensor(batch.position_ids))
    assert torch.equal(options["attention_mask"], torch.as_tensor(batch.attention_mask))
    assert step.model.embedded[1] == {"query_features": None} and not step.model.embedded[2]


def test_a_flat_batch_reaches_the_model_as_one_row():
    step, batch = recording_step(precision="bf16", flat=True, fused=True), batch_of(3, 8, image=True)
    step.scorer = score_logits
    flat = flatten(batch, 256)
    step.forward(batch)
    ids, options, in_autocast = step.model.embedded
    assert ids.tolist() == [flat.input_ids.tolist()] and in_autocast
    assert options["image_positions"].tolist() == flat.image_positions.tolist()
    assert options["query_features"].shape == (2, 1, 1) and len(options) == 2
    inputs, positions, supervised, options, in_autocast = step.model.scored
    assert inputs.requires_grad, "the first layer's graph is that of batches with images" and in_autocast
    assert positions.tolist() == flat.supervised_positions.tolist() and in_autocast
    assert supervised.tolist() == flat.supervised_ids.tolist()
    assert options.pop("position_ids").tolist() == [flat.position_ids.tolist()]
    lengths = options.pop("cu_seq_lens_q")
    assert lengths.tolist() == flat.cu_seqlens.tolist() and lengths.dtype == torch.int32
    assert options == {"scorer": score_logits, "fused": True, "max_length_q": flat.max_length}


def test_cached_features_are_taken_instead_of_images():
    step, batch = recording_step(), batch_of(3, image=True)
    batch.query_features = np.full((1, 4, 2), 7, dtype=np.float16)
    assert torch.equal(step._query_features(batch), torch.full((1, 4, 2), 7, dtype=torch.float16))
    assert not step.model.encoded and recording_step()._query_features(batch_of(3)) is None


@pytest.mark.parametrize(
    ("encoder_precision", "weights", "autocast"),
    [
        ("fp32", torch.float32, None),
        ("bf16", torch.float32, torch.bfloat16),
        ("bf16", torch.bfloat16, None),
        ("fp16", torch.bfloat16, torch.float16),
    ],
)
def test_images_are_encoded_in_pieces_and_in_the_encoders_precision(encoder_precision, weights, autocast):
    """Weights that are in 16 bits already need no autocast."""
    step = recording_step(precision="bf16", encoder_precision=encoder_precision)
    step.model.qformer.query_tokens = torch.zeros(1, dtype=weights)
    pixels = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) + np.zeros((5, 3, 2, 2), dtype=np.uint8)
    features = step.encode(pixels)
    assert [(count, enabled) for count, enabled, _ in step.model.encoded] == [
        (count, autocast is not None) for count in (2, 2, 1)
    ]
    if autocast is not None:
        assert {dtype for _, _, dtype in step.model.encoded} == {autocast}
    wanted = normalise_pixels(torch.as_tensor(pixels)).mean(dim=(1, 2, 3)).view(-1, 1, 1)
    torch.testing.assert_close(features, wanted)
    assert not torch.is_autocast_enabled("cpu")
