"""What is checked, merged and moved as a folder is loaded for inference; the loaders themselves are stubs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tinygptv import hub
from tinygptv.checkpoint import config_file, folders, load_model
from tinygptv.inference.loading import load_for_inference
from tinygptv.quantization import artifact


class Model(nn.Linear):
    """Notes that its adapters are merged."""

    def __init__(self, lora_rank):
        super().__init__(2, 2)
        self.config, self.merged = SimpleNamespace(lora_rank=lora_rank), 0

    def merge_lora(self):
        self.merged += 1


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What is asked of the loaders, in order; ``model`` is what they load and ``is_artifact`` says which kind."""
    notes = SimpleNamespace(calls=[], model=Model(0), is_artifact=False)

    def note(name, answer=None):
        return lambda *given: notes.calls.append((name, *given)) or answer

    monkeypatch.setattr(hub, "local_folder", lambda path: tmp_path / path)
    monkeypatch.setattr(config_file, "read_config", note("read_config"))
    monkeypatch.setattr(folders, "verify_folder", note("verify_folder"))
    monkeypatch.setattr(artifact, "is_artifact", lambda folder: notes.is_artifact)
    monkeypatch.setattr(artifact, "load_artifact", note("load_artifact", ("model", "processor", "metadata")))
    monkeypatch.setattr(artifact, "compute_dtype", lambda device: f"dtype on {device.type}")
    monkeypatch.setattr(load_model, "load_model", note("load_model", (notes.model, "processor")))
    return notes


@pytest.mark.parametrize(("device", "given"), [("cpu", ()), ("meta", ("meta",))])
def test_a_checkpoint_is_checked_against_its_manifest_loaded_and_moved(asked, tmp_path, caplog, device, given):
    (tmp_path / "manifest.json").write_text("{}")
    model, processor = load_for_inference(".", *given)
    assert asked.calls == [
        ("read_config", tmp_path),
        ("verify_folder", tmp_path),
        ("load_model", tmp_path, f"dtype on {device}"),
    ]
    assert model is asked.model and processor == "processor" and model.weight.device == torch.device(device)
    assert not any(p.requires_grad for p in model.parameters()) and model.merged == 0 and not caplog.messages


def test_without_a_manifest_a_warning_says_that_nothing_is_compared(asked, tmp_path, caplog):
    load_for_inference(".")
    assert [name for name, *_ in asked.calls] == ["read_config", "load_model"]
    assert caplog.messages == [f"{tmp_path} has no manifest.json: the hashes of its files are not checked."]


def test_adapters_are_merged_once(asked):
    asked.model.config.lora_rank = 4
    assert load_for_inference(".")[0].merged == 1


def test_an_artifact_is_loaded_where_it_is_wanted(asked, tmp_path):
    asked.is_artifact = True
    assert load_for_inference(".", "cuda") == ("model", "processor")
    assert asked.calls == [("read_config", tmp_path), ("load_artifact", tmp_path, "cuda")]
