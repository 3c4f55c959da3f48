"""Checkpoint folders and training states: what is written where, and that reading checks it first."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tinygptv.checkpoint import load_model as loading
from tinygptv.checkpoint import model_card as cards
from tinygptv.checkpoint.checkpoint import (
    load_checkpoint,
    load_training_state,
    read_stage,
    save_checkpoint,
    save_training_state,
)
from tinygptv.checkpoint.folders import CheckpointError, verify_folder
from tinygptv.checkpoint.stage_record import StageRecord

STAGE: StageRecord = {"title": "stage 3", "stage": 3, "steps": 40}


class Model:
    """Writes its configuration as its weights."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(template=None)
        self.generation_config = SimpleNamespace(end=None)

    def state_dict(self) -> dict[str, str]:
        return {"encoder": "rounded", "projector": "trained"}

    def save_pretrained(self, folder: Path, state_dict: dict[str, str] | None) -> None:
        weights = "".join(f" {name} {value}" for name, value in (state_dict or {}).items())
        (folder / "model.safetensors").write_text(f"{self.config.template} {self.generation_config.end}{weights}")


class Processor:
    """Has a template and an end symbol."""

    template = "inst"

    def set_end_symbol(self, generation_config: SimpleNamespace) -> None:
        generation_config.end = "###"

    def save_pretrained(self, folder: Path) -> None:
        (folder / "processor_config.json").write_text("{}")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(cards, "model_card", lambda model, stage: f"card of {type(model).__name__}: {stage['title']}")
    return Model()


def test_a_checkpoint_has_the_processors_template_and_end_symbol_its_stage_and_a_card(tmp_path, model):
    folder = save_checkpoint(tmp_path / "deep/checkpoint", model, Processor(), STAGE)
    assert folder == tmp_path / "deep/checkpoint"
    assert sorted(verify_folder(folder).files) == [
        "README.md",
        "model.safetensors",
        "processor_config.json",
        "stage.json",
    ]
    assert (folder / "model.safetensors").read_text() == "inst ###"
    assert (folder / "README.md").read_text() == "card of Model: stage 3"
    text = (folder / "stage.json").read_text()
    assert json.loads(text) == STAGE == read_stage(folder) == read_stage(str(folder))
    assert text.startswith('{\n "title"'), "for people, too"


def test_values_that_are_given_are_written_for_the_models_own(tmp_path, model):
    save_checkpoint(tmp_path / "checkpoint", model, Processor(), STAGE, {"encoder": "stored"})
    written = (tmp_path / "checkpoint/model.safetensors").read_text()
    assert written == "inst ### encoder stored projector trained"


def test_a_checkpoint_is_checked_before_it_is_loaded_with_what_the_caller_asks_for(tmp_path, model, monkeypatch):
    asked = []

    def load_model(folder: Path, dtype: object, **kwargs: Any) -> tuple[str, str]:
        asked.append((folder, dtype, kwargs))
        return "model", "processor"

    monkeypatch.setattr(loading, "load_model", load_model)
    folder = save_checkpoint(tmp_path / "checkpoint", model, Processor(), STAGE)
    assert load_checkpoint(str(folder)) == ("model", "processor", STAGE)
    assert load_checkpoint(folder, torch.float32, attn_implementation="eager")[2] == STAGE
    assert asked == [(folder, "auto", {}), (folder, torch.float32, {"attn_implementation": "eager"})]
    (folder / "model.safetensors").write_text("INST ###")
    with pytest.raises(CheckpointError, match="does not match the hash"):
        load_checkpoint(folder)
    assert len(asked) == 2 and load_checkpoint(folder, verify=False)[0] == "model"
    (folder / "model.safetensors").write_text("inst")
    with pytest.raises(CheckpointError, match=r"cut off"):
        load_checkpoint(folder, verify=False)


def test_a_stage_is_empty_where_there_is_none_and_named_where_it_is_damaged(tmp_path):
    assert read_stage(tmp_path) == {}
    (tmp_path / "stage.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"stage\.json"):
        read_stage(tmp_path)


def test_a_training_state_comes_back_as_it_was(tmp_path):
    weight = torch.arange(6.0, requires_grad=True)
    tensors = {"parameter/a": weight, "parameter/b": torch.arange(6.0).view(2, 3).T, "optimizer/step/a": torch.ones(())}
    tensors |= {
        "half": torch.ones(2, dtype=torch.bfloat16),
        "wide": torch.tensor([1 / 3]).double(),
        "n": torch.tensor(7),
    }
    extra = {"next_step": 7, "scaler": {"scale": 2.0}}
    folder = save_training_state(tmp_path / "state", tensors, extra)
    assert folder == tmp_path / "state"
    assert sorted(verify_folder(folder).files) == ["state.json", "state.safetensors"]
    loaded, record = load_training_state(str(folder))
    assert record == extra and set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert all(loaded[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert not any(tensor.requires_grad for tensor in loaded.values())


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_damaged_training_state_is_refused(tmp_path, name):
    folder = save_training_state(tmp_path / "state", {"parameter/a": torch.ones(3)}, {"next_step": 10})
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-3] + b"?" + data[-2:])
    with pytest.raises(CheckpointError, match=rf"{name} does not match the hash"):
        load_training_state(folder)
