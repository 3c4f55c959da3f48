"""What is compiled, how, and where it is kept; no compiler runs."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from tinygptv.model.head_loss import score_logits
from tinygptv.training import compilation
from tinygptv.training.compilation import compile_layers, compiled_scorer, keep_compiled_layers, wants_compilation


class Layer:
    """Notes how it is compiled."""

    def __init__(self):
        self.options = []

    def compile(self, **options):
        self.options.append(options)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "CACHE_DIR", tmp_path / "a" / "b")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return tmp_path / "a" / "b"


@pytest.mark.parametrize("options", [{}, {"backend": "eager", "fullgraph": True}])
def test_each_layer_is_a_graph_and_only_the_language_models_have_any_number_of_tokens(folder, options):
    layers, blocks = [Layer(), Layer()], [Layer(), Layer(), Layer()]
    vision = SimpleNamespace(vit=SimpleNamespace(blocks=blocks))
    model = SimpleNamespace(language_model=SimpleNamespace(layers=layers), vision_encoder=vision)
    with torch._dynamo.config.patch(specialize_float=False):
        compile_layers(model, **options)
        assert torch._dynamo.config.specialize_float, "a scale is no input of a graph"
    given = {"backend": "inductor", "fullgraph": False, **options}
    assert [layer.options for layer in layers] == [[{"dynamic": True, **given}]] * 2
    assert [block.options for block in blocks] == [[given]] * 3
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder), "and what is compiled is kept"


def test_what_is_compiled_is_kept_where_the_environment_says_else_at_home(folder):
    keep_compiled_layers()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder) and folder.is_dir()
    folder.rmdir()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = "/elsewhere"
    keep_compiled_layers()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere" and not folder.exists()


def test_the_folder_is_in_the_users_own_cache(folder, monkeypatch, tmp_path):
    monkeypatch.undo()
    assert str(compilation.CACHE_DIR) == "~/.cache/tinygptv/torchinductor"
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path)})
    keep_compiled_layers()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / ".cache/tinygptv/torchinductor")


def test_a_folder_that_cannot_be_made_is_torchs_to_choose(folder, caplog):
    folder.parent.write_text("a file where the folder would be")
    keep_compiled_layers()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert caplog.messages[0].startswith(f"compiled layers cannot be kept in {folder} (")


def test_inside_layers_run_as_they_are_written(monkeypatch):
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: ("stance", stance))
    assert compilation.run_eagerly() == ("stance", "force_eager")


@pytest.mark.parametrize("options", [{}, {"backend": "eager"}])
def test_the_loss_of_any_number_of_rows_is_compiled(monkeypatch, options):
    monkeypatch.setattr(torch, "compile", lambda function, **how: (function, how))
    assert compiled_scorer(**options) == (score_logits, {"dynamic": True, "backend": "inductor", **options})


@pytest.mark.parametrize(
    ("setting", "on_cpu", "on_cuda"), [("auto", False, True), ("on", True, True), ("off", False, False)]
)
def test_layers_are_compiled_on_gpus_unless_the_settings_say_otherwise(setting, on_cpu, on_cuda):
    found = [wants_compilation(setting, torch.device(kind)) for kind in ("cpu", "cuda")]
    assert found == [on_cpu, on_cuda]
