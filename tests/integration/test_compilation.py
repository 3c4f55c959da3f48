"""Layers under torch.compile: whole graphs, the eager layers' numbers, and the memory that the plan counts.

Compiling takes seconds even where no kernel is made, so these tests are not among the unit tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch._dynamo
from torch import Tensor

from tests.language_layers import assert_close, layer_model, layer_results
from tests.saved_activations import TOKENS, adapter_copies, counted, kept_by_the_compiler
from tests.training_batches import loss_and_gradient, make_sample, mixed_samples, relative, tiny_model
from tinygptv.data.collate import LoadedSample, MicroBatch, collate
from tinygptv.training.compilation import compile_layers, run_eagerly


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def padded(samples: Sequence[LoadedSample] | None = None) -> MicroBatch:
    return collate(samples or mixed_samples(), 0)


@pytest.fixture(scope="module")
def reference() -> tuple[float, Tensor]:
    """Loss and gradient of the padded batch, as autograd and torch's cross-entropy compute them."""
    return loss_and_gradient(tiny_model(), padded())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_compiled_fused_layer_is_the_eager_one(rank, dropout):
    """One graph; the same masks, and no gradient lost or counted twice. One layer is compiled: each costs seconds."""
    model = layer_model(rank, dropout)
    expected = layer_results(model, True)
    model.layers[0].compile(dynamic=True, backend="aot_eager", fullgraph=True)
    assert_close(layer_results(model, True), expected, 1e-4)


def test_compiled_layers_are_whole_graphs_and_change_no_loss(reference):
    """Other lengths and numbers of images compile the encoder's block once more, the language layer never."""
    model = tiny_model()
    compile_layers(model, backend="aot_eager", fullgraph=True)
    loss, gradient = loss_and_gradient(model, padded(), flat=True)
    assert loss == pytest.approx(reference[0], abs=1e-6)
    assert relative(gradient, reference[1]) < 1e-5
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for samples in (mixed_samples()[:3], [make_sample(90), make_sample(3), make_sample(4)]):
        compiled = loss_and_gradient(model, padded(samples), flat=True)
        with run_eagerly():
            eager = loss_and_gradient(model, padded(samples), flat=True)
        assert compiled[0] == pytest.approx(eager[0], abs=1e-6)
        assert relative(compiled[1], eager[1]) < 1e-5
    assert graphs["unique_graphs"] - before == 1


def test_compiled_layers_can_be_computed_again_in_the_backward_pass(reference):
    model = tiny_model(lora_rank=4)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for layer in model.language_model.layers:
        layer.compile(dynamic=True, backend="aot_eager", fullgraph=True)
    loss, gradient = loss_and_gradient(model, padded(), flat=True)
    assert loss == pytest.approx(reference[0], abs=1e-6)
    assert relative(gradient, reference[1]) < 1e-5


@pytest.mark.slow
def test_compiled_by_inductor(reference):
    """The real compiler; a minute, as it calls a C++ compiler for each kernel."""
    model = tiny_model()
    compile_layers(model)
    loss, gradient = loss_and_gradient(model, padded(), flat=True)
    assert loss == pytest.approx(reference[0], abs=1e-5)
    assert relative(gradient, reference[1]) < 1e-4


@pytest.mark.parametrize(
    ("rank", "dropout"), [(64, 0.1), *(pytest.param(rank, 0.0, marks=pytest.mark.slow) for rank in (0, 64))]
)
def test_counted_activations_are_what_a_compiled_layer_keeps(rank, dropout):
    kept = kept_by_the_compiler(rank, dropout) / TOKENS
    assert kept == pytest.approx(counted(rank, dropout, compiled=True) + adapter_copies(rank), rel=0.01)
