"""The model of a stage: what is asked of the loaded start, in which order."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pipelines.settings import TrainSettings
from pipelines.training import fit
from pipelines.training import stage_model as module
from pipelines.training.guard import TrainingStopped
from pipelines.training.job import TrainJob
from tinygptv.training.memory_plan import CUDA_CONTEXT_BYTES, GIB
from tinygptv.training.stages import get_stage
from tinygptv.training.step_memory import Computation


class Model(torch.nn.Module):
    """Notes what is asked of it."""

    def __init__(self, lora_rank, notes):
        super().__init__()
        self.config = SimpleNamespace(lora_rank=lora_rank, num_query_tokens=5, image_token_id=9)
        self.notes = notes

    def __getattr__(self, name):
        if name in ("set_image_size", "add_lora", "set_lora_dropout", "gradient_checkpointing_enable"):
            return lambda *values: self.notes.append((name, *values))
        return super().__getattr__(name)

    def train(self, mode=True):
        self.notes.append(("train", mode))
        return self


@pytest.fixture
def built(monkeypatch):
    def build(start_rank, stage_rank, start="", **changes):
        notes = []
        model = Model(start_rank, notes)
        processor = SimpleNamespace(tokenizer="tokenizer")

        def load(start, *, dtype, attn_implementation):
            notes.append(("load", start, dtype, attn_implementation))
            return model, processor, {}

        monkeypatch.setattr(module, "local_checkpoint", lambda location: f"local {location}")
        monkeypatch.setattr(module, "load_checkpoint", load)
        monkeypatch.setattr(
            module, "set_trainable", lambda found, parts: notes.append(("trainable", parts)) if found is model else None
        )
        monkeypatch.setattr(
            module,
            "set_dtypes",
            lambda found, device, kind: notes.append(("dtypes", str(device), kind)) if found is model else None,
        )
        monkeypatch.setattr(
            module,
            "restore_rounded",
            lambda found, start, dtype: notes.append(("restore", start, dtype)) if found is model else None,
        )
        monkeypatch.setattr(module, "TinyGPTVImageProcessor", lambda size: ("images", size))
        monkeypatch.setattr(module, "TinyGPTVProcessor", lambda *a, **k: (*a, k))
        stage = replace(get_stage("mini", 4), lora_rank=stage_rank, lora_alpha=7, lora_dropout=0.25)
        settings = TrainSettings(**{"init_from": "start", "attention": "eager", **changes})
        found, processor = module.build_model(TrainJob(settings, stage, None, 12, "out", start=start))
        assert found is model
        return notes, processor, stage

    return build


@pytest.mark.parametrize(
    ("start_rank", "stage_rank", "adapters"),
    [
        (0, 4, [("add_lora", 4, 7, 0.25)]),
        (8, 4, [("set_lora_dropout", 0.25)]),
        (8, 0, []),
        (0, 0, []),
    ],
)
def test_adapters_are_added_once_and_their_dropout_is_the_stages(built, start_rank, stage_rank, adapters):
    notes, processor, stage = built(start_rank, stage_rank, precision="bf16")
    assert notes == [
        ("load", "local start", torch.bfloat16, "eager"),
        ("set_image_size", stage.image_size),
        *adapters,
        ("trainable", stage.trainable),
        ("dtypes", "cpu", "bf16"),
        ("restore", "local start", torch.bfloat16),
        ("train", True),
    ]
    options = {"num_query_tokens": 5, "image_token_id": 9, "template": stage.template}
    assert processor == (("images", stage.image_size), "tokenizer", options)


def test_frozen_matrices_are_packed_last_and_where_they_will_be(built, monkeypatch):
    def pack(model, form, device):
        model.notes.append((form, str(device)))

    monkeypatch.setattr(module, "pack_frozen", pack)
    notes, *_ = built(0, 4, frozen_weights="nf4")
    assert notes[-3:] == [("restore", "local start", torch.float32), ("nf4", "cpu"), ("train", True)]

    def fail(*given):
        raise ValueError("weights of format nf4 need bitsandbytes, which is not installed.")

    monkeypatch.setattr(module, "pack_frozen", fail)
    with pytest.raises(TrainingStopped, match=r"^frozen_weights=nf4: weights of format nf4 need bits"):
        built(0, 4, frozen_weights="nf4")


def test_a_start_that_was_replaced_is_told_before_it_is_loaded(built, monkeypatch):
    monkeypatch.setattr(module, "manifest_digest", {"local start": "as now"}.get)
    assert built(0, 4, start="as now")
    with pytest.raises(TrainingStopped, match=r"^init_from=start was replaced since training began"):
        built(0, 4, start="as before")


def test_the_encoder_has_a_precision_of_its_own_and_layers_are_computed_again_where_asked(built):
    notes, *_ = built(0, 0, precision="bf16", encoder_precision="fp32", gradient_checkpointing=True)
    assert ("dtypes", "cpu", "fp32") in notes
    assert notes[-1] == ("gradient_checkpointing_enable", {"use_reentrant": False}), "after the model is in training"


def test_a_model_trains_on_its_workers_own_gpu(built, monkeypatch):
    moved = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, device: moved.append((model.config, device)) or model)
    notes, *_ = built(0, 0, use_gpu=True)
    assert ("dtypes", "cuda:3", "fp32") in notes and notes[-1] == ("train", True)
    ((config, device),) = moved
    assert config.num_query_tokens == 5 and device == torch.device("cuda", 3)


def test_layers_are_computed_again_by_the_newer_name_where_there_is_one(built, monkeypatch):
    asked = []
    monkeypatch.setattr(Model, "activation_checkpointing_enable", lambda self, how: asked.append(how), raising=False)
    notes, *_ = built(0, 0, gradient_checkpointing=True)
    assert asked == [{"use_reentrant": False}] and notes[-1] == ("train", True)


# ---------------------------------------------------------------------- how it is computed, and on what


def test_the_computation_is_that_of_the_settings():
    settings = TrainSettings(
        precision="fp16", features="cached", gradient_checkpointing=True, use_gpu=True, compile="off"
    )
    assert fit.computation_of(settings) == Computation("fp16", "cached", False, fit.FUSED_LAYERS, True, True)
    assert fit.computation_of(TrainSettings(compile="on")) == Computation(
        "fp32", "inline", True, fit.FUSED_LAYERS, False, False
    )
    assert fit.computation_of(settings).has_no_padding and not fit.computation_of(TrainSettings()).has_no_padding
    eager = settings.model_copy(update={"attention": "eager"})
    assert not fit.computation_of(eager).has_no_padding
    old, new = (fit.Card("card", 0, has_flash_attention=has_it) for has_it in (False, True))
    assert [fit.computation_of(settings, each).has_no_padding for each in (old, new)] == [False, True]


def test_a_gpu_has_what_is_free_and_what_this_process_holds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * GIB, 99 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index else (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert fit.current_card() == fit.Card("card 1", 13 * GIB + CUDA_CONTEXT_BYTES, False, False)


class Memory:
    """A plan in which each way of saving memory takes so many GiB."""

    stage, num_tokens = SimpleNamespace(number=3), 200

    def __init__(self, sizes, changes=()):
        self.sizes, self.changes = sizes, dict(changes)
        self.computation = Computation(**self.changes)

    def computed(self, **changes):
        return Memory(self.sizes, {**self.changes, **changes})

    def plan(self, samples):
        assert samples == 1
        (key,) = self.changes or ("",)
        return SimpleNamespace(peak=int(self.sizes[key] * GIB))


@pytest.mark.parametrize(
    ("sizes", "fix"),
    [
        ((8, 8, 7, 7), "try gradient_checkpointing=true or features=cached"),
        ((9, 9, 9, 8), "use a larger GPU, or a smaller stage.limits.max_text_tokens"),
        ((8, 9, 9, 9), "try gradient_checkpointing=true"),
        ((9, 9, 8.1, 9), "use a larger GPU, or a smaller stage.limits.max_text_tokens"),
    ],
)
def test_a_stage_that_does_not_fit_names_what_helps(sizes, fix):
    """``compile=on`` and ``precision=bf16`` are what it has already, so they cannot help."""
    checkpointed, compiled, cached, half = sizes
    memory = Memory(
        {
            "": 10.25,
            "gradient_checkpointing": checkpointed,
            "compiled": compiled,
            "features": cached,
            "precision": half,
            "frozen_weights": 9,
        }
    )
    assert fit._does_not_fit(memory, fit.Card("card", 8 * GIB)) == (
        f"stage 3: one sample of 200 tokens takes 10.2 GiB and the GPU has 8.0 GiB ({memory.computation}): {fix}."
    )
