"""What all variants of an ablation share and how they are run, and the report's texts, without any training."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import storage
from pipelines.ablation import report, run, variants
from pipelines.ablation.findings import Event, StageOutcome
from pipelines.ablation.report import AblationRow, text_table
from pipelines.ablation.run import _feature_settings, _prepare_world, _run_all, _shared_inputs, _track_report
from pipelines.ablation.variant_run import SharedInputs, StageStatus, VariantOutcome
from pipelines.ablation.variants import Variant, change_config, find_variant, with_precision, write_start
from pipelines.settings import AblateSettings, SettingsError
from pipelines.units import UnitsLostError, Workers
from tinygptv.checkpoint.folders import CheckpointError

SHARED = SharedInputs("/data", "/start", "/bench", "/out", "parent")


# ---------------------------------------------------------------- what all variants share


def test_inputs_that_are_given_are_absolute_and_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "_prepare_world", lambda *given: pytest.fail("drawn"))
    work = storage.WorkFolder(str(tmp_path / "out"))
    settings = AblateSettings(recipe="paper", data="d", init_from="s", benchmark_data="b")
    assert _shared_inputs(settings, work, "p") == SharedInputs(
        f"{tmp_path}/d", f"{tmp_path}/s", f"{tmp_path}/b", f"{tmp_path}/out", "p"
    )
    assert _shared_inputs(settings.model_copy(update={"benchmark_data": ""}), work, "p").benchmark_data == ""


@pytest.mark.parametrize("bench", ["", "/mine"])
def test_the_miniatures_own_world_and_backbones_are_published(tmp_path, monkeypatch, bench):
    from pipelines.miniature import world as _  # noqa: F401 - imported before it is patched
    from tinygptv.miniature import backbones

    place, drawn = f"memory://ablated/{tmp_path.name}", []
    monkeypatch.setattr(backbones, "write_checkpoint", lambda folder: folder.mkdir() or (folder / "b").write_text("b"))

    def draw(settings, world):
        drawn.append(world.name)
        world.mkdir()
        (world / "w").write_text("w")

    monkeypatch.setattr(run, "_prepare_world", draw)
    found = _shared_inputs(AblateSettings(recipe="mini", benchmark_data=bench), storage.WorkFolder(place), "p")
    expected = SharedInputs(f"{place}/world/shards", f"{place}/backbones", bench or f"{place}/world", place, "p")
    assert found == expected and drawn == ["world"]
    assert {file.name for file in storage.find_below(place)} == {"backbones/b", "world/w"}


@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_other_recipes_need_their_data_and_backbones(tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(run, "_prepare_world", lambda *given: None)
    work = storage.WorkFolder(str(tmp_path))
    with pytest.raises(SettingsError, match="give init_from=DIR, the backbones that every variant starts from"):
        _shared_inputs(AblateSettings(recipe=recipe, data="/d"), work, "")
    with pytest.raises(SettingsError, match="give data=DIR, the folder with one prepared shard set per source"):
        _shared_inputs(AblateSettings(recipe=recipe, init_from="/s"), work, "")


@pytest.mark.parametrize(("scenes", "test_scenes"), [(1000, 250), (7, 1), (1, 1)])
def test_a_quarter_as_many_scenes_are_held_out_and_only_what_the_stages_read_is_prepared(
    tmp_path, monkeypatch, scenes, test_scenes
):
    from pipelines.miniature import world

    done = []
    monkeypatch.setattr(world, "draw_world", done.append)
    monkeypatch.setattr(world, "prepare_world", lambda *given: done.append(given))
    settings = AblateSettings(recipe="mini", seed=5, quiet=True, stages=[1, 3], world_scenes=scenes)
    _prepare_world(settings, tmp_path)
    drawn, (folder, target, make, sources) = done
    assert (drawn.output, drawn.train_scenes, drawn.test_scenes) == (str(tmp_path), scenes, test_scenes)
    assert (drawn.seed, drawn.quiet, drawn.recipe, drawn.tracking_uri) == (5, True, "mini", "none")
    assert (folder, target) == (tmp_path, tmp_path / "shards")
    assert sources == {"laion", "cc_sbu", "cc_sbu_align", "llava_detail"}
    made = make(source="laion")
    assert (made.seed, made.quiet, made.tracking_uri, made.source) == (5, True, "none", "laion")


@pytest.mark.parametrize(
    ("num_workers", "use_gpu", "expected"), [(0, False, (0, 0)), (3, True, (1, 1)), (1, False, (1, 0))]
)
def test_features_are_computed_once_for_all(num_workers, use_gpu, expected):
    settings = AblateSettings(num_workers=num_workers, use_gpu=use_gpu, quiet=True)
    made = _feature_settings(settings, SHARED, image_size=28, sources=["a"])
    assert (made.data, made.checkpoint, made.output) == ("/data", "/start", "/out/features")
    assert (made.num_workers, made.gpus_per_worker) == expected
    assert (made.image_size, made.sources, made.quiet, made.tracking_uri) == (28, ["a"], True, "none")


# ---------------------------------------------------------------- running


@pytest.mark.parametrize("output", ["local", "memory"])
def test_variants_are_units_and_lost_ones_fail_at_their_first_stage(tmp_path, monkeypatch, output):
    asked, polled = {}, []
    place = str(tmp_path) if output == "local" else f"memory://lost/{tmp_path.name}"
    shared = SharedInputs("/data", "/start", "", place, "")
    chosen = [with_precision(find_variant(name), "fp32") for name in ("full", "no_lora", "no_qk_norm")]
    storage.make_folder(f"{place}/full/stage2")
    storage.write_atomically(f"{place}/full/stage2/result.json", b"{}")
    outcome = VariantOutcome({2: StageStatus("trained")})

    def map_units(setup, units, workers, settings, name):
        asked.update(setup=setup, units=units, workers=workers, name=name)
        yield units[0], outcome
        raise UnitsLostError(units[1:])

    class poll:
        def __init__(self, action, every_s):
            polled.append(every_s)
            self.action = action

        def __enter__(self):
            self.action()

        def __exit__(self, *_):
            pass

    shown = []
    monkeypatch.setattr(run, "map_units", map_units)
    monkeypatch.setattr(run, "poll", poll)
    monkeypatch.setattr(run.Bar, "update", lambda bar, *now: shown.append(now))
    settings = AblateSettings(stages=[2, 3], num_workers=3, cpus_per_worker=1.5, use_gpu=True, quiet=True)
    found = dict(_run_all(settings, chosen, shared))
    lost = VariantOutcome({2: StageStatus("failed", "its process died, for example for lack of memory")})
    assert found == {"full": outcome, "no_lora": lost, "no_qk_norm": lost}
    assert (asked["units"], asked["workers"], asked["name"]) == (chosen, Workers(3, 1.5, 1), "ablation")
    assert asked["setup"].args == (settings, shared) and shown == [(1, 6)], "one of six stages is there"
    assert polled == [2.0 if output == "local" else 30.0]
    for quiet in (True, False):
        given = settings.model_copy(update={"quiet": quiet})
        runner = run._variant_runner(given, shared)
        assert (runner.func, runner.args, runner.keywords) == (run.run_variant, (given,), {"shared": shared})


def test_what_is_sent_begins_with_the_table():
    told = []
    tracker = SimpleNamespace(
        describe=told.append,
        table=lambda rows, name: told.append((name, rows)),
        artifact=told.append,
        close=lambda: told.append("closed"),
    )
    _track_report(tracker, {"table": [{"variant": "full"}]}, ["/a", "/b"])
    assert told[0].startswith(
        "| variant |\n| --- |\n| full |\n\nA cell is the mean loss (nats per token) of the stage's last 10"
    )
    for said in (
        "stays below 0.001 of the full model's",
        "in the 10 steps from k on",
        "gradients of 10 steps in a row",
    ):
        assert said in told[0]
    assert told[0].endswith("another question's image.\n\nPlots: `report.html` in Artifacts.")
    assert told[1:] == [("ablation", [{"variant": "full"}]), Path("/a"), Path("/b"), "closed"]


# ---------------------------------------------------------------- variants


def test_a_start_is_written_once_for_its_changes(tmp_path, monkeypatch):
    written, stages, digests = [], {}, iter("aaab")
    monkeypatch.setattr(variants, "checkpoint_digest", lambda start: next(digests) if start.name == "given" else "")
    monkeypatch.setattr(variants, "local_checkpoint", {"s": tmp_path / "given", "t": tmp_path / "given"}.__getitem__)
    monkeypatch.setattr(variants, "read_stage", lambda start: stages.get("stage", {}) if start == folder else {})

    def verify(start, hashes):
        assert (start, hashes) == (folder, False)
        if "stage" not in stages:
            raise CheckpointError("missing")

    def save(folder, model, processor, metadata):
        written.append((folder, metadata))
        assert model == (tmp_path / "given", {"config": ("config of given", changes), "local_files_only": True})
        assert processor == (tmp_path / "given", {"local_files_only": True})
        stages["stage"] = metadata
        return folder

    from tinygptv.data import processing
    from tinygptv.model import tinygptv

    loaded = SimpleNamespace(from_pretrained=lambda folder, **more: (folder, more))
    monkeypatch.setattr(variants, "verify_folder", verify)
    monkeypatch.setattr(variants, "save_checkpoint", save)
    monkeypatch.setattr(variants, "change_config", lambda config, changes: (config, changes))
    monkeypatch.setattr(variants.TinyGPTVConfig, "from_pretrained", lambda folder: f"config of {folder.name}")
    monkeypatch.setattr(processing, "TinyGPTVProcessor", loaded)
    monkeypatch.setattr(tinygptv, "TinyGPTVForConditionalGeneration", loaded)
    variant, changes = find_variant("no_qk_norm"), {"text_config.qk_layernorm": False}
    folder = tmp_path / "start"
    for name in ("full", "stage.lora_rank=4", "train.packing=true"):  # the model starts as it is given
        assert write_start(find_variant(name), "s", folder) == tmp_path / "given" and written == []
    for init_from, count in (("s", 1), ("s", 1), ("t", 2), ("t", 3)):  # another folder, other content
        assert write_start(variant, init_from, folder) == folder and len(written) == count
    assert written[0][1] == {
        "title": "start of the ablation without QK norm",
        "init_from": "s",
        "init_digest": "a",
        "changes": {"text_config.qk_layernorm": False},
    }


def test_changes_of_a_configuration_reach_its_sections():
    config = SimpleNamespace(a=1, text_config=SimpleNamespace(b=2))
    assert change_config(config, {"a": 5, "text_config.b": 6}) is config
    assert (config.a, config.text_config.b) == (5, 6)
    for key in ("none", "text_config.none", "none.b", "a.b.c"):
        with pytest.raises(SettingsError, match=f"^config.{key} is no field of the model's configuration"):
            change_config(config, {key: 1})


def test_a_variant_of_changes_has_a_safe_name_and_plain_values():
    found = find_variant("stage.lora_rank=4, train.guard_spike=2.5,config.x.y=false")
    assert found == Variant(
        "stage.lora_rank_4__train.guard_spike_2.5_config.x.y_false",
        "stage.lora_rank=4, train.guard_spike=2.5,config.x.y=false",
        config={"x.y": False},
        stage={"lora_rank": 4},
        train={"guard_spike": 2.5},
    )
    with pytest.raises(
        SettingsError, match=r"^variant 'model\.x=1': 'model\.x' must begin with config\., stage\. or train"
    ):
        find_variant("model.x=1")
    with pytest.raises(
        SettingsError, match=r"^variant 'no_lore' is unknown; did you mean 'no_lora'\? A change is written"
    ):
        find_variant("no_lore")
    bf16 = with_precision(found, "bf16")
    assert bf16.name == f"{found.name}-bf16" and bf16.train == {"guard_spike": 2.5, "precision": "bf16"}
    assert (
        with_precision(found, "fp32").name == found.name and with_precision(found, "fp32").train["precision"] == "fp32"
    )


# ---------------------------------------------------------------- the report


def row(name, precision="fp32", cells=(1.5,), **scores):
    outcomes = [StageOutcome(number + 2, last_loss=loss) for number, loss in enumerate(cells)]
    return AblationRow(Variant(name, name.upper()), precision, outcomes, {}, scores)


def score(value, blind=None, shuffled=None):
    return {"value": value, "blind": blind, "shuffled": shuffled}


def test_a_row_in_the_table_and_in_the_result():
    found = row("full", cells=(1.5, 2.25), vqa=score(51.04), gqa=score(40, 12.34, 0.0))
    assert found.cells() == {
        "variant": "FULL",
        "precision": "fp32",
        "stage 2": "1.500",
        "stage 3": "2.250",
        "vqa": "51.0",
        "gqa": "40.0 (blind 12.3, shuffled 0.0)",
    }
    told = found.to_dict()
    assert (told["variant"], told["title"], told["precision"]) == ("full", "FULL", "fp32")
    assert list(told["stages"]) == ["2", "3"] and told["stages"]["3"]["last_loss"] == 2.25
    assert told["scores"] == found.scores
    assert report._score_cell(score(7, shuffled=3.25)) == "7.0 (shuffled 3.2)"


def test_columns_of_the_text_are_as_wide_as_their_widest_cell():
    rows = [row("a", vqa=score(51.0)), row("longer", "fp16_range", cells=(1.5, 2.0))]
    assert text_table(rows).split("\n") == [
        "variant  precision   stage 2  vqa   stage 3",
        "A        fp32        1.500    51.0",
        "LONGER   fp16_range  1.500          2.000",
    ]


def test_how_it_was_run_in_words():
    settings = AblateSettings(recipe="mini", seed=3, max_steps=7, features="inline", num_workers=0)
    assert report._how(settings, 90) == (
        "Recipe mini, seed 3, 7 steps per stage, inline features, 1 variants at a time, 1.5 minutes."
    )
    settings = settings.model_copy(update={"max_steps": 0, "num_workers": 2})
    assert report._how(settings, 90).startswith("Recipe mini, seed 3, each stage's own number of steps, inline")
    assert ", 2 variants at a time" in report._how(settings, 90)


def test_pages_have_a_table_of_each_precision_and_mark_what_was_lost(tmp_path):
    plots = []
    for name in ("losses_fp32", "gradients_bf16"):
        (tmp_path / f"{name}.png").write_bytes(name.encode())
        plots.append(tmp_path / f"{name}.png")
    failed = AblationRow(Variant("b", "<b>"), "bf16", [StageOutcome(2, "failed", note="no memory")], {}, {})
    vanished = AblationRow(
        Variant("c", "C"), "bf16", [StageOutcome(2, event=Event("vanishing", 4, "projector"))], {}, {}
    )
    columns, settings = ["variant", "stage 2"], AblateSettings()
    full = report._Table("fp32", [row("a")], columns, plots[:1])
    tables = [full, report._Table("bf16", [failed, vanished], columns, plots[1:])]
    page = report._page(tables, settings, 60)
    first, second = page.split("<h2>")[1:]
    assert first.startswith(
        "fp32</h2><table><tr><th>variant</th><th>stage 2</th></tr><tr><td>A</td><td>1.500</td></tr>"
    )
    assert base64.b64encode(b"losses_fp32").decode() in first and "gradients" not in first
    assert (
        '<td>&lt;b&gt;</td><td class="lost">failed</td></tr><tr><td>C</td><td class="lost">gradient vanishing' in second
    )
    assert base64.b64encode(b"gradients_bf16").decode() in second and '<img alt="gradients_bf16"' in second
    assert "<i>Gradient vanishing at step k (part)</i>:" in page and "<i>NaN at step k</i>:" in page
    text = report._markdown(tables, settings, 60)
    assert (
        "## fp32\n\n| variant | stage 2 |\n|---|---|\n| A | 1.500 |\n\n![losses_fp32](losses_fp32.png)\n\n## bf16"
        in text
    )
    assert text.endswith("## Notes\n\n- <b> (bf16), stage 2: no memory\n")
    assert "Notes" not in report._markdown([full], settings, 60)
    lost = [report._cell(text) for text in ("1.5", "NaN at step 3", "not run", "failed", "gradient vanishing")]
    assert ["lost" in cell for cell in lost] == [False, True, True, True, True]
