"""Ablations: which event a record shows, what a variant changes, and what the report says."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

from pipelines.ablation import report
from pipelines.ablation.findings import WINDOW, Event, StageOutcome, depth_norms, find_event, outcome_of, typical_norms
from pipelines.ablation.report import AblationRow, text_table, write_report
from pipelines.ablation.run import ablate
from pipelines.ablation.variants import VARIANTS, change_config, find_variant, with_precision, write_start
from pipelines.settings import AblateSettings, SettingsError
from pipelines.training.job import apply_stage_settings
from pipelines.training.record import StepRecord, read_record
from tinygptv.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from tinygptv.data.processing import TinyGPTVProcessor
from tinygptv.miniature.tiny import tiny_config, tiny_tokenizer
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.training.stages import RECIPES, get_stage, set_trainable

# ---------------------------------------------------------------------- events


def record(step, loss=2.0, grad_norm=1.0, **parts):
    norms = {"projector": 1.0, "lora": 0.5, "lora/layer_00": 0.3, "language_norms/layer_00": 0.4, "lora/layer_01": 0.2}
    return {"step": step, "loss": loss, "grad_norm": grad_norm, "part_norms": {**norms, **parts}}


def healthy(count):
    return [record(step, loss=2.0 - 0.01 * step) for step in range(count)]


def test_norms_are_gathered_per_depth_input_end_first():
    assert depth_norms(record(0)) == pytest.approx({"projector": 1.0, "layer_00": 0.5, "layer_01": 0.2})
    assert list(depth_norms(record(0))) == ["projector", "layer_00", "layer_01"]


def test_a_healthy_run_has_no_event():
    records = healthy(50)
    assert find_event(records, typical_norms(records)) is None


def test_vanishing_is_dated_to_its_first_step_and_named_by_its_part():
    records = healthy(17) + [record(step, **{"projector": 5e-4}) for step in range(17, 40)]
    assert find_event(records, typical_norms(healthy(20))) == Event("vanishing", 17, "projector")
    assert str(find_event(records, typical_norms(healthy(20)))) == "gradient vanishing at step 17 (projector)"


def test_a_dip_shorter_than_the_window_is_no_event():
    records = healthy(60)
    for step in range(20, 20 + WINDOW - 1):
        records[step] = record(step, **{"projector": 0.0})
    assert find_event(records, typical_norms(healthy(20))) is None
    records[20 + WINDOW - 1] = record(20 + WINDOW - 1, **{"projector": 0.0})
    assert find_event(records, typical_norms(healthy(20))).step == 20
    records[25] = healthy(60)[25]  # two dips that make up a window are none
    records[30:34] = [record(step, **{"projector": 0.0}) for step in range(30, 34)]
    assert find_event(records, typical_norms(healthy(20))) is None


def test_the_reference_is_the_median_of_the_first_steps():
    """``WINDOW`` of them: what comes later, and what is not finite, does not count."""
    early = [record(step, **{"projector": norm}) for step, norm in enumerate([1.0] * 4 + [3.0] * 6)]
    late = [record(step, **{"projector": 100.0}) for step in range(WINDOW, 40)]
    assert typical_norms(early + late)["projector"] == 3.0
    assert typical_norms([record(0, projector=math.inf)] * WINDOW + early + late)["projector"] == 3.0
    assert typical_norms(early[:3])["projector"] == 1.0


def test_vanishing_is_below_a_thousandth_of_the_reference():
    reference = {"projector": 2.0}
    for norm, event in ((2e-3, None), (1.999e-3, Event("vanishing", 0, "projector"))):
        assert find_event([record(step, **{"projector": norm}) for step in range(WINDOW)], reference) == event


def test_gradients_that_are_small_from_the_start_are_seen_by_the_full_models_measure():
    records = [record(step, **{"lora/layer_01": 1e-5}) for step in range(30)]
    assert find_event(records, typical_norms(healthy(30))) == Event("vanishing", 0, "layer_01")
    assert find_event(records, typical_norms(records)) is None, "by its own measure it would not be"


def test_nan_loss_is_an_event_at_once():
    records = healthy(30)
    records[12] = record(12, loss=math.nan, grad_norm=math.nan, projector=math.nan)
    assert find_event(records, typical_norms(records)) == Event("nan", 12)


def test_single_overflows_are_no_event_but_a_window_of_them_is():
    records = [
        record(step, grad_norm=math.inf if step in (0, 1, 2, 40) else 1.0, projector=math.inf) for step in range(60)
    ]
    assert find_event(records, {}) is None
    records = healthy(30) + [record(step, grad_norm=math.inf) for step in range(30, 60)]
    assert find_event(records, {}) == Event("nan", 30)


def test_a_short_stage_is_judged_by_all_of_its_steps():
    gone = [record(step, **{"projector": 0.0}) for step in range(4)]
    assert find_event(gone, typical_norms(healthy(4))) == Event("vanishing", 0, "projector")
    assert find_event(gone[:3] + healthy(4)[3:], typical_norms(healthy(4))) is None
    assert find_event([], typical_norms(healthy(4))) is None


def test_the_earlier_of_two_events_counts():
    records = healthy(10) + [record(step, **{"projector": 0.0}) for step in range(10, 30)]
    records[25]["loss"] = math.nan
    assert find_event(records, typical_norms(healthy(10))).kind == "vanishing"
    for step in range(7, 30):
        records[step]["part_norms"]["lora/layer_01"] = 0.0
    assert find_event(records, typical_norms(healthy(10))) == Event("vanishing", 7, "layer_01")


def test_outcome_of_a_stage():
    outcome = outcome_of(2, healthy(40), typical_norms(healthy(40)))
    assert outcome.first_loss == pytest.approx(1.955) and outcome.last_loss == pytest.approx(1.655)
    assert outcome.cell == "1.655" and outcome.steps == 40 and outcome.depth["layer_00"] == pytest.approx(0.5)
    assert json.loads(json.dumps(outcome.to_dict()))["event"] is None
    assert [StageOutcome(1, status, last_loss=1.5).cell for status in ("failed", "not run", "trained")] == [
        "failed",
        "not run",
        "1.500",
    ]
    odd = [record(step, projector=norm) for step, norm in enumerate((1.0, 2.0, 90.0))]
    assert outcome_of(2, odd, {}).depth["projector"] == 2.0, "the median"
    lost = outcome_of(2, [record(s, loss=math.nan) for s in range(3)], {})
    assert lost.cell == "NaN at step 0" and lost.to_dict()["last_loss"] is None


def test_records_are_read_from_disk_with_their_not_a_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written = StepRecord(path, 0)
    for entry in (record(0), record(1, math.nan, math.inf, projector=math.nan)):
        written.write(entry)
    written.close()
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # valid JSON has no NaN
    found = read_record(path)
    assert found[0] == record(0) and math.isnan(found[1]["loss"]) and math.isnan(found[1]["grad_norm"])
    assert math.isnan(found[1]["part_norms"]["projector"])
    assert read_record(tmp_path / "nothing.jsonl") == []


# ---------------------------------------------------------------------- variants


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    torch.manual_seed(0)
    model = TinyGPTVForConditionalGeneration(tiny_config(lora_rank=0))
    processor = TinyGPTVProcessor.from_config(model.config, tiny_tokenizer())
    return save_checkpoint(tmp_path_factory.mktemp("start") / "backbones", model, processor, {})


def trained_names(variant, number, backbones, folder):
    """What a variant trains in a stage, through the very settings that the job uses."""
    model = load_checkpoint(write_start(variant, str(backbones), folder))[0]
    stage = get_stage("mini", number)
    stage = apply_stage_settings(stage, variant.stage_changes(stage))
    if stage.lora_rank:
        model.add_lora(2, 2, 0.0)
    set_trainable(model, stage.trainable)
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "lost", "in_model"),
    [
        ("no_lora", "lora_", False),
        ("no_rms_norm", "attention_rmsnorm", False),
        ("no_qk_norm", "q_layernorm", False),
        ("no_input_norm", "input_layernorm", False),
        ("frozen_input_norm", "input_layernorm", True),
    ],
)
def test_a_variant_loses_what_its_name_says_and_nothing_else(name, lost, in_model, backbones, tmp_path):
    full = trained_names(VARIANTS["full"], 2, backbones, tmp_path / "a")
    found = trained_names(VARIANTS[name], 2, backbones, tmp_path / "b")

    def belongs(parameter):
        return lost in parameter or (name == "no_qk_norm" and "k_layernorm" in parameter)

    assert found == {n for n in full if not belongs(n)} != full
    model = load_checkpoint(write_start(VARIANTS[name], str(backbones), tmp_path / "b"))[0]
    assert any(belongs(n) for n, _ in model.named_parameters()) == in_model


def test_variants_start_from_the_same_backbones(backbones, tmp_path):
    assert write_start(VARIANTS["full"], str(backbones), tmp_path / "x") == backbones
    start = write_start(VARIANTS["no_qk_norm"], str(backbones), tmp_path / "x")
    before, after = (load_checkpoint(folder)[0] for folder in (backbones, start))
    assert after.config.text_config.qk_layernorm is False
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]), name
    made = 10**9
    os.utime(start / "manifest.json", ns=(made, made))
    write_start(VARIANTS["no_qk_norm"], str(backbones), tmp_path / "x")
    assert (start / "manifest.json").stat().st_mtime_ns == made, "it is kept"
    write_start(VARIANTS["no_rms_norm"], str(backbones), tmp_path / "x")
    assert (start / "manifest.json").stat().st_mtime_ns != made, "another variant's is not"


def test_no_variant_is_without_a_stage_to_differ_in():
    for recipe in RECIPES:
        for stage in RECIPES[recipe]:
            for variant in VARIANTS.values():
                apply_stage_settings(stage, variant.stage_changes(stage))
    assert VARIANTS["no_lora"].stage_changes(get_stage("paper", 1)) == {"lora_rank": 0}
    assert "lora" not in VARIANTS["no_lora"].stage_changes(get_stage("paper", 2))["trainable"]


def test_any_switch_can_be_a_variant():
    variant = find_variant("stage.lora_rank=4,config.text_config.qk_layernorm=false, train.precision=bf16")
    assert variant.stage == {"lora_rank": 4} and variant.config == {"text_config.qk_layernorm": False}
    assert variant.train == {"precision": "bf16"} and "/" not in variant.name and " " not in variant.name
    config = change_config(tiny_config(), {"text_config.qk_layernorm": False, "num_query_tokens": 8})
    assert config.text_config.qk_layernorm is False and config.num_query_tokens == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_qk_nrom", "did you mean 'no_qk_norm'"),
        ("nonsense", "known: full"),
        ("lora_rank=4", "must begin with config., stage. or train."),
    ],
)
def test_mistaken_variants_are_told_in_a_sentence(text, message):
    with pytest.raises(SettingsError, match=message):
        find_variant(text)


def test_a_field_that_is_not_there_is_told_in_a_sentence():
    with pytest.raises(SettingsError, match=r"config\.text_config\.qk_norm is no field"):
        change_config(tiny_config(), {"text_config.qk_norm": False})


def test_precision_is_part_of_the_name():
    assert with_precision(VARIANTS["full"], "fp32").name == "full"
    variant = with_precision(VARIANTS["full"], "fp16_range")
    assert variant.name == "full-fp16_range" and variant.train == {"precision": "fp16_range"}


# ---------------------------------------------------------------------- report


def test_report_has_table_3s_shape(tmp_path):
    def row(name, records):
        outcomes = [outcome_of(n, records, typical_norms(healthy(30))) for n in (1, 2)]
        scores = {"miniature_vqa": {"value": 51.25, "blind": 33.0, "shuffled": None}}
        return AblationRow(VARIANTS[name], "fp32", outcomes, {1: records, 2: records}, scores)

    lost = healthy(12) + [record(s, **{"projector": 0.0}) for s in range(12, 30)]
    rows = [row("full", healthy(30)), row("no_qk_norm", lost)]
    entry = write_report(tmp_path, rows, AblateSettings(), seconds=90)
    text = (tmp_path / "report.md").read_text()
    assert "| variant | stage 1 | stage 2 | miniature_vqa |" in text
    assert "| full | 1.755 | 1.755 | 51.2 (blind 33.0) |" in text
    assert "| without QK norm | gradient vanishing at step 12 (projector)" in text
    page = (tmp_path / "report.html").read_text()
    assert 'class="lost">gradient vanishing at step 12' in page and page.count("data:image/png") == 2
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("losses_fp32.png", "gradients_fp32.png"))
    assert len(entry["plots"]) == 2
    assert "without QK norm  fp32" in text_table(rows)


def test_a_report_has_a_table_plots_and_notes_per_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw_losses", lambda path, rows, title: path.write_bytes(title.encode()) and path)
    monkeypatch.setattr(report, "draw_depths", lambda path, rows, title: path.write_bytes(title.encode()) and path)
    rows = [
        AblationRow(
            with_precision(VARIANTS[name], precision),
            precision,
            [StageOutcome(2, last_loss=1.5), StageOutcome(3, status, note=note)],
            {},
            {"vqa": {"value": 50.0, "blind": 30.0, "shuffled": 31.25}} if not note else {},
        )
        for precision in ("fp32", "bf16")
        for name, status, note in (("full", "trained", ""), ("no_lora", "failed", f"lost in {precision}"))
    ]
    files = write_report(tmp_path, rows, AblateSettings(seed=3, max_steps=0, num_workers=0), seconds=90)
    plots = ["losses_fp32.png", "gradients_fp32.png", "losses_bf16.png", "gradients_bf16.png"]
    assert files["plots"] == [str(tmp_path / name) for name in plots]
    text = (tmp_path / "report.md").read_text()
    assert (
        "Recipe mini, seed 3, each stage's own number of steps, cached features, 1 variants at a time, 1.5 min" in text
    )
    first, second = text.split("## bf16")
    assert "| variant | stage 2 | stage 3 | vqa |\n|---|---|---|---|\n" in first
    assert "| full | 1.500 | nan | 50.0 (blind 30.0, shuffled 31.2) |\n| without LoRA | 1.500 | failed |  |" in first
    assert "![losses_fp32](losses_fp32.png)\n![gradients_fp32](gradients_fp32.png)\n" in first and "bf16" not in first
    assert "fp32.png" not in second and "losses_bf16.png" in second
    assert second.split("## Notes\n\n")[1].splitlines() == [
        "- without LoRA (fp32), stage 3: lost in fp32",
        "- without LoRA (bf16), stage 3: lost in bf16",
    ]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<h2>") == 2 and page.count('<td class="lost">failed</td>') == 2 and page.count("<img") == 4
    assert rows[1].to_dict()["stages"]["3"]["note"] == "lost in fp32" and rows[1].to_dict()["variant"] == "no_lora"
    assert text_table(rows).splitlines()[0].split() == ["variant", "precision", "stage", "2", "stage", "3", "vqa"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "/nowhere"}, "data=/nowhere does not exist: give the folder of prepared shard sets"),
        ({"benchmark_data": "/nowhere"}, "benchmark_data=/nowhere does not exist"),
        ({"init_from": "/nowhere"}, "checkpoint /nowhere does not exist"),
        ({"benchmark": "miniature_vaq"}, "did you mean 'miniature_vqa'"),
        ({"data": "."}, "give benchmark_data=DIR"),
        ({"precisions": ["fp12"]}, "precision='fp12' is not usable"),
        ({"train": {"log_evry": 1}}, "unknown key 'log_evry'; did you mean 'log_every'"),
    ],
)
def test_inputs_of_an_ablation_are_checked_before_it_draws_or_trains(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("pipelines.ablation.run.start_ray", lambda _: pytest.fail("Ray was started"))
    settings = AblateSettings(output=str(tmp_path / "out"), num_workers=0, tracking_uri="none", **changes)
    with pytest.raises(ValueError, match=message):
        ablate(settings)
    assert not (tmp_path / "out").exists()
