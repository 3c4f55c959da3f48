"""How large a forward pass may be: cut by tokens on a GPU, said before a stage starts, refused where nothing fits."""

from __future__ import annotations

import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from pipelines.data.loader import BatchMaker
from pipelines.miniature.tiny_training import train_settings
from pipelines.settings import SettingsError, TrainSettings
from pipelines.training import run
from pipelines.training.fit import Card, _does_not_fit, computation_of, fit_to_device
from pipelines.training.guard import TrainingStopped
from pipelines.training.job import resolve_job
from pipelines.training.run import run_stage
from tinygptv.config import TinyGPTVConfig
from tinygptv.training.memory_plan import GIB, TrainingMemory


def resolved(world, output, **changes):
    return resolve_job(train_settings(world, output, **changes), 4)[0]


def on_a_gpu(world, output, **changes):
    return resolved(world, output, use_gpu=True, precision="bf16", **changes)


def memory_of(job):
    return TrainingMemory(
        TinyGPTVConfig.from_pretrained(job.settings.init_from), job.stage, computation_of(job.settings)
    )


def card(capacity, **lacks):
    return Card("Tesla T4", capacity, **lacks)


def test_on_a_cpu_nothing_is_cut_by_tokens(world, tmp_path):
    for setting, samples in (("auto", 64), (4, 4)):
        plan = fit_to_device(resolved(world, tmp_path, micro_batch_size=setting), None).plan
        assert (plan.micro_batch_size, plan.micro_batch_tokens) == (samples, 0)


def test_auto_takes_a_whole_step_where_it_fits(world, tmp_path, caplog):
    job = on_a_gpu(world, tmp_path, micro_batch_size="auto")
    with caplog.at_level(logging.INFO):
        fitted = fit_to_device(job, card(24 * GIB))
    plan = fitted.plan
    assert not fitted.settings.gradient_checkpointing and "switched on" not in caplog.text, "it costs time"
    assert plan.micro_batch_size == job.stage.max_step_samples and not plan.padded
    assert "micro-batches of at most 8 samples are cut at" in caplog.text
    assert len(BatchMaker(plan).make(0).micro_batches) == 1


def test_micro_batches_are_cut_where_they_would_not_fit(world, tmp_path, caplog):
    """A capacity for two of the longest samples: shorter ones share a micro-batch by their tokens."""
    job = on_a_gpu(world, tmp_path, micro_batch_size=8)
    capacity = memory_of(job).plan(2).peak
    with caplog.at_level(logging.INFO):
        plan = fit_to_device(job, card(capacity)).plan
    assert "2 samples of the greatest length" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        whole = fit_to_device(on_a_gpu(world, tmp_path, micro_batch_size=99), card(memory_of(job).plan(8).peak)).plan
    assert whole.micro_batch_size == 99 and "micro-batches" not in caplog.text, "a step has no more than 8 samples"
    maker = BatchMaker(plan)
    batches = [batch for step in range(6) for batch in maker.make(step).micro_batches]
    assert any(batch.num_samples > 2 for batch in batches)
    assert all(batch.num_real <= plan.micro_batch_tokens or batch.num_samples == 1 for batch in batches)


def test_what_fits_with_checkpointing_alone_is_computed_with_it(world, tmp_path, caplog):
    job = on_a_gpu(world, tmp_path, micro_batch_size="auto", stage={"limits": {"max_text_tokens": 4000}})
    capacity = memory_of(job).plan(1).peak - 1
    fitted = fit_to_device(job, card(capacity))
    assert fitted.settings.gradient_checkpointing and not job.settings.gradient_checkpointing
    assert "gradient checkpointing, so it is switched on" in caplog.text
    with pytest.raises(TrainingStopped, match=r"stage 4: one sample of 4069 tokens takes .* try gradient_checkpoint"):
        fit_to_device(
            on_a_gpu(world, tmp_path, micro_batch_size=1, stage={"limits": {"max_text_tokens": 4000}}), card(capacity)
        )


def test_what_is_on_already_is_no_advice(world, tmp_path):
    """Just less than the longest sample takes: what is saved by a switch that is off is advised, and nothing else."""
    job = on_a_gpu(world, tmp_path, micro_batch_size=1, gradient_checkpointing=True, features="inline", compile="off")
    memory = memory_of(job)
    message = _does_not_fit(memory, card(memory.plan(1).peak))
    advised = message.partition(": try ")[2]
    assert "gradient_checkpointing" not in advised and "precision" not in advised and "features=cached" in advised
    assert message.startswith(f"stage 4: one sample of {memory.num_tokens} tokens takes ")


SAVERS = {
    "gradient_checkpointing=true": ("gradient_checkpointing", True),
    "compile=on": ("compiled", True),
    "features=cached": ("features", "cached"),
    "precision=bf16": ("precision", "bf16"),
    "frozen_weights=nf4": ("frozen_weights", "nf4"),
}


class Memory:
    """A sample takes 3 GiB, or 2 where one of the savers that help here is on."""

    stage, num_tokens = SimpleNamespace(number=3), 4000

    def __init__(self, helps, **on):
        self.helps, self.on, self.computation = helps, on, f"with {on}"

    def computed(self, **changes):
        return Memory(self.helps, **{**self.on, **changes})

    def plan(self, samples):
        saves = any(self.on.get(field) == value for field, value in map(SAVERS.get, self.helps))
        return SimpleNamespace(peak=(2 if saves else 3) * GIB * samples)


@pytest.mark.parametrize("helps", [*([name] for name in SAVERS), list(SAVERS)[::3], []])
def test_what_would_make_it_fit_is_told(helps):
    fix = f"try {' or '.join(helps)}" if helps else "use a larger GPU, or a smaller stage.limits.max_text_tokens"
    told = f"stage 3: one sample of 4000 tokens takes 3.0 GiB and the GPU has 2.0 GiB (with {{}}): {fix}."
    assert _does_not_fit(Memory(helps), card(2 * GIB)) == told


def test_what_never_fits_is_refused(world, tmp_path):
    with pytest.raises(TrainingStopped, match="use a larger GPU"):
        fit_to_device(on_a_gpu(world, tmp_path), card(2**20))


def test_a_card_without_bfloat16_says_what_to_set(world, tmp_path):
    """Turing: torch would emulate bfloat16, many times slower."""
    turing = card(24 * GIB, has_bfloat16=False, has_flash_attention=False)
    with pytest.raises(TrainingStopped) as told:
        fit_to_device(on_a_gpu(world, tmp_path / "a"), turing)
    assert str(told.value) == "precision=bf16: the GPU (Tesla T4) has no bfloat16; set precision=fp16."
    job = resolved(world, tmp_path / "b", use_gpu=True, precision="fp16", encoder_precision="bf16")
    with pytest.raises(TrainingStopped, match=r"^encoder_precision=bf16: .* set encoder_precision=fp16"):
        fit_to_device(job, turing)


def test_without_flash_attention_padding_counts(world, tmp_path):
    job = resolved(world, tmp_path, use_gpu=True, precision="fp16", micro_batch_size=2)
    for has_it in (True, False):
        assert fit_to_device(job, card(24 * GIB, has_flash_attention=has_it)).plan.padded != has_it


def test_half_precision_is_advised_as_the_card_has_it(world, tmp_path):
    job = resolved(world, tmp_path, use_gpu=True)
    halved = memory_of(job).computed(precision="fp16").plan(1).peak
    for has_it, name in ((True, "bf16"), (False, "fp16")):
        with pytest.raises(TrainingStopped, match=f"precision={name}"):
            fit_to_device(job, card(halved, has_bfloat16=has_it))


def test_auto_trains_as_the_default_size_does(world, tmp_path):
    one = run_stage(train_settings(world, tmp_path / "a", micro_batch_size="auto", max_steps=3), 4)
    other = run_stage(train_settings(world, tmp_path / "b", micro_batch_size=64, max_steps=3), 4)
    assert one["last_loss"] == other["last_loss"]


def test_settings_of_size_and_compilation():
    parse = TrainSettings.load
    assert parse(None, ["micro_batch_size=auto"]).micro_batch_size == "auto"
    assert parse(None, ["micro_batch_size=12"]).micro_batch_size == 12
    with pytest.raises(SettingsError, match="micro_batch_size"):
        parse(None, ["micro_batch_size=0"])
    for written, meant in (("true", "on"), ("on", "on"), ("false", "off"), ("off", "off"), ("auto", "auto")):
        assert parse(None, [f"compile={written}"]).compile == meant
    with pytest.raises(SettingsError, match="'auto', 'on' or 'off'"):
        parse(None, ["compile=maybe"])
    assert not computation_of(TrainSettings()).compiled and computation_of(TrainSettings(use_gpu=True)).compiled
    given = {"precision": "bf16", "features": "cached", "gradient_checkpointing": True}
    found = computation_of(TrainSettings(**given, encoder_precision="fp32", use_gpu=True, compile="off"))
    assert {name: getattr(found, name) for name in given} == given and found.on_gpu and not found.compiled


def test_compiled_training_says_so_and_gives_the_losses_of_the_uncompiled(world, tmp_path, monkeypatch, caplog):
    """By a backend that needs no compiler."""
    from tinygptv.training import compilation, train_step

    with_backend = partial(compilation.compile_layers, backend="eager")
    monkeypatch.setattr(train_step, "compile_layers", with_backend)
    plain = run_stage(train_settings(world, tmp_path / "a", max_steps=2), 4)
    with caplog.at_level(logging.INFO):
        compiled = run_stage(train_settings(world, tmp_path / "b", max_steps=2, compile="on"), 4)
    torch._dynamo.reset()
    assert "in which the layers were compiled" in caplog.text
    assert compiled["last_loss"] == pytest.approx(plain["last_loss"], abs=1e-5)


def test_workers_with_a_gpu_take_memory_in_growing_segments():
    assert run.GPU_ENVIRONMENT["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
