"""Jobs of the miniature without their work: what is claimed, which parts and steps are asked for, what is counted."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipelines.fingerprint import OtherInputsError
from pipelines.miniature import demo, jobs, world
from pipelines.miniature.jobs import run_miniature
from pipelines.settings import MiniatureSettings, PrepareDataSettings, SettingsError
from tinygptv.config import TinyGPTVConfig
from tinygptv.miniature import backbones, writers


@pytest.fixture
def asked(monkeypatch):
    """Pretraining that only notes what it is asked for."""
    found = []

    def pretrain(task, part, cycles, rate, orthogonalized, settings, tracker):
        found.append((part, cycles, rate, orthogonalized))
        return {f"{part}/loss": 1.0}

    def task(part, settings, config, *more):
        assert settings.task == "pretrain" and config.to_dict() == TinyGPTVConfig.mini(lora_rank=0).to_dict()
        assert more == ((jobs._tokenizer(None, 0, 0),) if part == "language" else ())
        return SimpleNamespace(module=part)

    for part in ("vision", "language"):
        monkeypatch.setattr(jobs, f"_{part}_task", partial(task, part))
    monkeypatch.setattr(jobs, "_pretrain", pretrain)
    monkeypatch.setattr(jobs, "_tokenizer", lambda folder, seed, size: "tokenizer")
    monkeypatch.setattr(backbones, "assemble_backbones", lambda to, config, *parts: found.append(parts[:3]) or to)
    return found


def settings(output, **changes):
    return MiniatureSettings(output=str(output), tracking_uri="none", quiet=True, **changes)


def test_both_parts_are_pretrained_and_put_together(asked, tmp_path):
    result = run_miniature(settings(tmp_path, task="pretrain"))
    assert asked == [
        ("vision", (3_000,), 1e-3, ""),
        ("language", (2_600, 2_400), 2e-3, "layers."),
        ("vision", "language", "tokenizer"),
    ]
    assert result["scores"] == {"vision/loss": 1.0, "language/loss": 1.0}
    assert result["checkpoint"] == f"{tmp_path}/backbones"
    assert json.loads((tmp_path / "result.json").read_text())["checkpoint"] == result["checkpoint"]
    for changes, text in (({"seed": 1}, "seed was 0, is now 1"), ({"max_steps": 2}, "max_steps was 0, is now 2")):
        with pytest.raises(OtherInputsError, match=text):
            run_miniature(settings(tmp_path, task="pretrain", **changes))


def test_what_pretraining_writes_is_cleared_where_it_begins_again(asked, tmp_path):
    names = ("vision", "language", "tokenizer", "backbones", "result.json", "run.json", "unsent.jsonl")
    run_miniature(settings(tmp_path, task="pretrain"))
    for name in (*names, "mine.txt"):
        (tmp_path / name).write_text("earlier")
    run_miniature(settings(tmp_path, task="pretrain", seed=1, overwrite=True))
    assert [name for name in names if (tmp_path / name).exists()] == ["result.json"], "the new one"
    assert (tmp_path / "mine.txt").read_text() == "earlier"


def test_one_part_alone_takes_the_steps_asked_for_and_writes_no_checkpoint(asked, tmp_path):
    result = run_miniature(settings(tmp_path, task="pretrain", parts="language", max_steps=7))
    assert asked == [("language", (7,), 2e-3, "layers.")] and "checkpoint" not in result


def test_a_world_is_drawn_once(tmp_path, monkeypatch):
    drawn = []

    def write_world(output, train, test, seed, workers, progress):
        drawn.append((train, test, seed))
        (output / "sources.json").write_text("{}")

    monkeypatch.setattr(writers, "write_world", write_world)
    fields = {"task": "draw", "train_scenes": 5, "test_scenes": 2, "seed": 3}
    for _ in range(2):
        result = run_miniature(settings(tmp_path, **fields))
        assert result["folder"] == str(tmp_path) and 0 <= result["seconds"] < 60
    assert drawn == [(5, 2, 3)]
    with pytest.raises(OtherInputsError, match="test_scenes was 2, is now 4"):
        run_miniature(settings(tmp_path, **{**fields, "test_scenes": 4}))
    run_miniature(settings(tmp_path, **{**fields, "test_scenes": 4}, overwrite=True))
    assert drawn[1:] == [(5, 4, 3)]


def test_rows_of_all_sets_are_counted_and_only_those_named_are_prepared(tmp_path, monkeypatch):
    from pipelines.data.ingest import job

    given = []

    def ingest(settings, replaces_other):
        given.append((settings.source, settings.input, settings.images, settings.output, replaces_other))
        return {"rows_out": {"laion": 3, "gqa": 4, "refcoco": 5}[settings.source]}

    monkeypatch.setattr(job, "ingest", ingest)
    sources = {
        "laion": {"input": "laion/*.tar", "images": ""},
        "gqa": {"input": "gqa/a.json", "images": "gqa/images"},
        "refcoco": {"input": "refs", "images": "train2014"},
    }
    (tmp_path / "sources.json").write_text(json.dumps(sources))
    assert world.prepare_world(tmp_path, tmp_path / "shards", PrepareDataSettings) == 12
    assert given[1] == ("gqa", f"{tmp_path}/gqa/a.json", f"{tmp_path}/gqa/images", f"{tmp_path}/shards/gqa", True)
    assert given[0][2] == "", "a set without an image folder"
    assert world.prepare_world(tmp_path, tmp_path / "shards", PrepareDataSettings, {"laion", "refcoco"}) == 8
    assert world.prepare_world(tmp_path, tmp_path / "shards", PrepareDataSettings, set()) == 0


def test_mean_losses_are_those_of_the_first_and_last_tenth(tmp_path):
    def means(count):
        lines = [{"step": n, "loss": float(n), "grad_norm": 1.0} for n in range(count)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return demo.mean_losses(tmp_path / "metrics.jsonl")

    assert means(40) == {"first_tenth": 1.5, "last_tenth": 37.5}
    assert means(5) == {"first_tenth": 0.0, "last_tenth": 4.0}


def test_stages_and_backbones_are_shipped_as_asked_for(tmp_path, monkeypatch):
    shipped = []
    monkeypatch.setattr(backbones, "DATA", tmp_path / "package")
    monkeypatch.setattr(backbones, "ship_backbones", shipped.append)
    monkeypatch.setattr(backbones, "ship_stage", lambda folder, number: shipped.append((folder, number)))
    (tmp_path / "package/stage1").mkdir(parents=True)
    (tmp_path / "package/a").write_bytes(b"123")
    (tmp_path / "package/stage1/b").write_bytes(b"45")
    result = run_miniature(settings(tmp_path / "out", task="ship", stages="/demo", backbones="/b"))
    assert shipped == [Path("/b"), *((Path(f"/demo/stage{n}/checkpoint"), n) for n in (1, 2, 3, 4))]
    assert (result["bytes"], result["package_data"]) == (5, str(tmp_path / "package"))
    for given, folders in (({"stages": "/demo"}, 4), ({"backbones": "/b"}, 1)):
        shipped.clear()
        run_miniature(settings(tmp_path / "out", task="ship", **given))
        assert len(shipped) == folders
    for task in ("paint", ""):
        with pytest.raises(SettingsError, match="choose one of"):
            run_miniature(settings(tmp_path, task=task))


def test_pretraining_is_told_to_the_tracker_and_kept_beside_the_result(tmp_path, monkeypatch, capsys):
    from tinygptv.miniature import pretraining

    told, given = [], {}

    def pretrain(task, report, **more):
        given.update(more)
        report(10, {"loss": 1.23456})
        return {"scores": 1.0}

    monkeypatch.setattr(pretraining, "pretrain", pretrain)
    tracker = SimpleNamespace(metrics=lambda values, step: told.append((step, values)))
    chosen = settings(tmp_path).model_copy(update={"quiet": False})
    assert jobs._pretrain("task", "vision", (30, 12), 1e-3, "layers.", chosen, tracker) == {"scores": 1.0}
    assert told == [(10, {"vision/loss": 1.23456})] and given["state_dir"] == tmp_path / "vision"
    assert (given["cycles"], given["peak_learning_rate"], given["orthogonalized"]) == ((30, 12), 1e-3, "layers.")
    assert given["evaluate_every"] == 1000
    assert capsys.readouterr().out == "vision step 10/42: loss 1.235\n"


def test_a_phase_of_the_demo_reads_its_section_and_what_the_demo_decides(tmp_path):
    from pipelines.settings import DemoSettings, ScoreSettings, TrainSettings

    config = tmp_path / "c.yaml"
    config.write_text("train: {max_steps: 7, overwrite: false, data: mine}\nscore: {limit: 9}")
    state = demo.Demo(DemoSettings(quiet=True, overwrite=True, tracking_uri="none"), str(config), tmp_path)
    train = state.load(TrainSettings, data="shards")
    assert (train.max_steps, train.data, train.overwrite) == (7, "shards", True)
    assert (train.quiet, train.tracking_uri) == (True, "none")
    assert train.seed == 0
    state.settings = DemoSettings(tracking_uri="none", seed=7, num_cpus=3)
    assert [(each.seed, each.num_cpus) for each in map(state.load, (TrainSettings, ScoreSettings))] == [(7, 3)] * 2
    assert (state.load(ScoreSettings).limit, state.load(ScoreSettings).overwrite) == (9, False)
    with state.phase("one"):
        pass
    assert list(state.seconds) == ["one"] and 0 <= state.seconds["one"] < 5


def test_the_demo_scores_short_answers_on_five_times_as_many_scenes(tmp_path, monkeypatch):
    from pipelines.evaluation import run
    from pipelines.settings import DemoSettings

    asked = []

    def evaluate(settings):
        asked.append((settings.benchmark, settings.limit, settings.output, settings.checkpoint, settings.data))
        return {"benchmarks": {name: len(asked) for name in settings.benchmark}}

    monkeypatch.setattr(run, "evaluate", evaluate)
    (tmp_path / "c.yaml").write_text("score: {limit: 30}")
    state = demo.Demo(DemoSettings(quiet=True, tracking_uri="none"), str(tmp_path / "c.yaml"), tmp_path)
    demo._score(state, Path("/c"), Path("/w"))
    (vqa, tasks) = asked
    assert vqa == (["miniature_vqa"], 150, f"{tmp_path}/score/vqa", "/c", "/w")
    assert tasks[1:] == (30, f"{tmp_path}/score/tasks", "/c", "/w") and "miniature_vqa" not in tasks[0]
    assert state.result["scores"]["miniature_vqa"] == 1 and len(state.result["scores"]) == 1 + len(tasks[0])


@pytest.mark.parametrize(
    ("max_steps", "train", "held_out"), [(0, 24_000, 1_024), (10, 640, 640), (1000, 24_000, 1_024)]
)
def test_the_vision_part_learns_from_its_own_scenes(monkeypatch, max_steps, train, held_out):
    from tinygptv.miniature import pretrain_vision

    seeded, drawn = [], []
    monkeypatch.setattr(torch, "manual_seed", seeded.append)
    pool = SimpleNamespace(draw=lambda *given: drawn.append(given) or given[1])
    monkeypatch.setattr(pretrain_vision, "ScenePool", pool)
    monkeypatch.setattr(pretrain_vision, "VisionTask", lambda *given, seed: (*given, seed))
    made = jobs._vision_task(MiniatureSettings(seed=7, max_steps=max_steps), "config")
    assert drawn == [(7, "train", train, (64, 128)), (7, "validation", held_out, (64, 128))]
    assert made == ("config", "train", "validation", 7) and seeded == [7]


def test_the_language_part_has_another_seed_and_its_look_ups_from_the_second_cycle(monkeypatch):
    from tinygptv.miniature import pretrain_language

    seeded = []
    monkeypatch.setattr(torch, "manual_seed", seeded.append)
    monkeypatch.setattr(pretrain_language, "LanguageTask", lambda *given, **options: (given, options))
    given, options = jobs._language_task(MiniatureSettings(seed=7), "config", "tokenizer")
    assert given == ("config", "tokenizer") and seeded == [8]
    assert options == {"world_seed": 7, "seed": 7, "lookups_from": 2_600}


def test_a_tokenizer_is_trained_once(tmp_path, monkeypatch):
    from tinygptv.data import processing
    from tinygptv.miniature import pretrain_language

    trained = []

    def train(*given):
        trained.append(given)
        return SimpleNamespace(save_pretrained=lambda folder: (folder / "tokenizer.json").touch())

    monkeypatch.setattr(pretrain_language, "train_tokenizer", train)
    monkeypatch.setattr(processing, "load_tokenizer", lambda folder: ("loaded", folder))
    for _ in range(2):
        assert jobs._tokenizer(tmp_path, 3, 99) == ("loaded", tmp_path)
    assert trained == [(3, 99)]


def test_a_task_is_one_that_there_is_and_its_result_is_beside_it(tmp_path, monkeypatch):
    with pytest.raises(SettingsError) as caught:
        run_miniature(settings(tmp_path, task="paint"))
    assert str(caught.value) == "task='paint': choose one of ['draw', 'example', 'pretrain', 'ship']."
    with pytest.raises(SettingsError, match="give backbones=DIR"):
        run_miniature(settings(tmp_path, task="ship"))
    monkeypatch.setattr(jobs, "draw_example", lambda given: {"folder": str(tmp_path), "rows": {"a": given.seed}})
    result = run_miniature(settings(tmp_path, task="example", seed=4))
    assert result == {"folder": str(tmp_path), "rows": {"a": 4}, "result": f"{tmp_path}/result.json"}
    assert json.loads((tmp_path / "result.json").read_text()) == {"folder": str(tmp_path), "rows": {"a": 4}}


def test_what_was_pretrained_is_tracked_and_assembled_with_its_scores(asked, tmp_path, monkeypatch):
    told, made = [], []
    tracker = SimpleNamespace(params=told.append, close=lambda: told.append("closed"))
    monkeypatch.setattr(jobs, "continue_tracker", lambda given, title, folder: told.append((title, folder)) or tracker)
    monkeypatch.setattr(backbones, "assemble_backbones", lambda *given: made.append(given) or Path("/made"))
    monkeypatch.setattr(jobs, "_tokenizer", lambda *given: given)
    monkeypatch.setattr(jobs, "_language_task", lambda *given: SimpleNamespace(module="language"))
    result = run_miniature(settings(tmp_path, task="pretrain", seed=5))
    assert told[0] == ("pretrain the miniature", tmp_path) and told[1]["seed"] == 5 and told[2:] == ["closed"]
    ((folder, config, vision, language, tokenizer, record),) = made
    assert (folder, vision, language) == (tmp_path / "backbones", "vision", "language")
    assert tokenizer == (tmp_path / "tokenizer", 5, config.text_config.vocab_size - 1)
    scores = {"vision/loss": 1.0, "language/loss": 1.0}
    assert record == {"title": "pretrained backbones of the miniature", "seed": 5, "scores": scores}
    assert result["checkpoint"] == "/made" and 0 <= result["seconds"] < 60
