"""The recipe's commands: each is one that its job understands, in an order in which each finds its input."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import recipe, settings
from pipelines.recipe import RecipeError, run_recipe
from pipelines.settings import RecipeSettings, SettingsError
from tests.paths import ROOT
from tinygptv.convert.__main__ import _parser
from tinygptv.training.stages import RECIPES

PAPER = str(ROOT / "configs/paper.yaml")
KINDS = {
    "fetch": settings.FetchSettings,
    "prepare_data": settings.PrepareDataSettings,
    "cache_features": settings.CacheFeaturesSettings,
    **{f"stage{number}": settings.TrainSettings for number in (1, 2, 3, 4)},
    "score": settings.ScoreSettings,
    "quantize": settings.QuantizeSettings,
    "serve_http": settings.ServeSettings,
    "plan_memory": settings.PlanMemorySettings,
    "recipe": settings.RecipeSettings,
    "released": settings.ReleasedSettings,
}


class Jobs:
    """Stands for the jobs: notes their commands, writes what they would."""

    def __init__(self, monkeypatch):
        self.ran, self.fails = [], None
        monkeypatch.setattr(recipe, "run_command", self.run)
        monkeypatch.setattr(recipe._Recipe, "_rows", lambda _, name: 2_000_000 if name == "refvg" else 1000)

    def run(self, words):
        name = words[1] if words[1] == "-m" else words[1].rsplit("/", 1)[1].removesuffix(".py")
        self.ran.append((name, words[2:]))
        return int(name == self.fails)


@pytest.fixture
def jobs(monkeypatch):
    return Jobs(monkeypatch)


def run(tmp_path, **values):
    for each in recipe.set_of("laion"), *(recipe.set_of(s.name) for stage in RECIPES["paper"] for s in stage.sources):
        (tmp_path / "raw" / each.input).mkdir(parents=True, exist_ok=True)
    chosen = {"recipe": "paper", "raw": str(tmp_path / "raw"), "output": str(tmp_path / "out"), **values}
    return run_recipe(RecipeSettings(**chosen), PAPER)


def test_every_command_is_understood_by_its_job(tmp_path, jobs):
    run(tmp_path, benchmarks="bench", serve=True, fetch={"mirror": "http://m", "offline": True, "local": ["/a", "/b"]})
    for name, words in jobs.ran:
        if name == "-m":
            assert words[0] == "tinygptv.convert"
            _parser("convert").parse_args(words[1:])
            continue
        config = words[1] if words[0] == "--config" else None
        overrides = words[2:] if config else words
        KINDS[name].load(config, overrides)
    names = [name for name, _ in jobs.ran]
    assert names[:2] == ["fetch", "-m"] and names[-7:] == [
        "stage1", "stage2", "stage3", "stage4", "score", "quantize", "serve_http",
    ]  # fmt: skip
    assert names.count("prepare_data") == 23  # every source of the paper's four stages
    fetch = dict(word.split("=", 1) for word in jobs.ran[0][1])
    assert (fetch["offline"], fetch["local"]) == ("true", "[/a,/b]")


def test_features_are_made_where_they_pay(tmp_path, jobs):
    result = run(tmp_path)
    out = tmp_path / "out"
    assert [plan["choice"] for plan in result["features"]] == ["cached", "cached", "inline"]
    assert json.loads(json.dumps(result)) == json.loads((out / "result.json").read_text())
    assert (result["checkpoint"], result["artifact"]) == (f"{out}/stage4/checkpoint", f"{out}/artifact")
    assert result["result"] == f"{out}/result.json" and list(result["seconds"])[:2] == ["fetch", "convert"]
    assert [name for name in result["seconds"] if "prepare" not in name][2:] == [
        "features of stages 12",
        "features of stages 3",
        *(f"stage {stage.number}: {stage.title}" for stage in RECIPES["paper"]),
        "quantize",
    ]
    caches = [words for name, words in jobs.ran if name == "cache_features"]
    assert ["sources=[cc_sbu,laion]" in words for words in caches] == [True, False]
    chosen = {name: next(w for w in words if w.startswith("features=")) for name, words in jobs.ran if "stage" in name}
    assert list(chosen.values()) == ["features=cached", "features=cached", "features=cached", "features=inline"]
    position = [name for name, _ in jobs.ran]
    assert position.index("cache_features") < position.index("stage1")


def test_stages_start_from_the_one_before(tmp_path, jobs):
    run(tmp_path)
    starts = [next(w for w in words if w.startswith("init_from=")) for name, words in jobs.ran if "stage" in name]
    out = tmp_path / "out"
    assert starts == [
        f"init_from={folder}"
        for folder in (out / "start", *(out / f"stage{number}/checkpoint" for number in (1, 2, 3)))
    ]


def test_finished_steps_are_skipped_and_those_after_a_changed_one_are_not(tmp_path, jobs):
    run(tmp_path)
    for _, words in jobs.ran:
        output = next((w.removeprefix("output=") for w in words if w.startswith("output=")), None)
        if output:
            path = tmp_path / output / "result.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
    for needed in ("start/manifest.json", "weights/prerained_minigpt4_7b.pth"):
        (tmp_path / "out" / needed).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / needed).touch()
    total = len(jobs.ran)
    jobs.ran.clear()
    run(tmp_path)
    assert not jobs.ran
    run(tmp_path, benchmark="own", benchmarks="bench")
    assert [name for name, _ in jobs.ran] == ["score", "quantize"], "a step that is new, and those after it"
    jobs.ran.clear()
    run(tmp_path, benchmark="other", benchmarks="bench")
    assert [name for name, _ in jobs.ran] == ["score", "quantize"], "a step of another command"
    jobs.ran.clear()
    (tmp_path / "out/stage2/result.json").unlink()
    run(tmp_path)
    assert [name for name, _ in jobs.ran] == ["stage2", "stage3", "stage4", "quantize"] and total > 30


def test_a_failed_step_ends_it_and_the_next_run_continues_there(tmp_path, jobs):
    jobs.fails = "stage2"
    with pytest.raises(RecipeError, match="step 'stage 2: pre-training' failed, as it says above"):
        run(tmp_path)
    record = json.loads((tmp_path / "out/recipe.json").read_text())
    assert "stage 1: warm-up" in record and "stage 2: pre-training" not in record


def test_missing_data_is_named_with_the_command_that_brings_it(tmp_path, jobs):
    with pytest.raises(
        SettingsError, match=r"raw=.* lacks the data of .*laion.*jobs/fetch.py what=\[.*laion.*\] output="
    ):
        run_recipe(RecipeSettings(recipe="paper", raw=str(tmp_path), output=str(tmp_path / "out")), PAPER)
    assert [name for name, _ in jobs.ran] == ["fetch", "-m"]


def test_a_dry_run_prints_the_commands_and_the_plan(tmp_path, jobs, capsys):
    dry = RecipeSettings(recipe="paper", raw="DATA", output=str(tmp_path / "out"), dry_run=True, serve=True)
    assert run_recipe(dry, PAPER)["seconds"] == {}
    assert not list((tmp_path / "out").iterdir()), "what is not made has no result"
    out = capsys.readouterr().out
    assert out.rstrip().endswith(f"artifact={tmp_path}/out/artifact") and "\n== serve\npython jobs/serve_http.py" in out
    assert not jobs.ran and "python jobs/stage4.py --config" in out and "Stage 1 and 2 (224 px): cached" in out
    assert "\n== stage 4: multi-task learning\npython jobs/stage4.py " in out and "human --output" in out
    assert "python -m tinygptv.convert release --vision" in out and "input=DATA/laion/laion_dataset" in out


def test_unknown_recipes_are_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"recipe is 'x'; known recipes: \['mini', 'paper', 'released'\]"):
        run_recipe(RecipeSettings(recipe="x", output=str(tmp_path)), None)


def documented():
    """Commands of the read-me and of the weights' page, as they are written there."""
    for name in ("README.md", "docs/weights.md"):
        text = (ROOT / name).read_text().replace("\\\n", " ")
        for block in re.findall(r"```(?:bash)?\n(.*?)```", text, re.DOTALL):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["python"] and (words[1] == "-m" or words[1].startswith("jobs/")):
                    yield pytest.param(words[1:], id=f"{name}: {' '.join(words[1:4])}")


@pytest.mark.parametrize("words", list(documented()))
def test_documented_commands_are_understood(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    if words[:2] == ["-m", "tinygptv.convert"]:
        _parser("convert").parse_args(words[2:])
    elif words[0] == "-m":
        assert importlib.util.find_spec(words[1])
    else:
        assert (ROOT / words[0]).is_file()
        kind = KINDS[words[0].removeprefix("jobs/").removesuffix(".py")]
        config = words[words.index("--config") + 1] if "--config" in words else None
        kind.load(config, [word for word in words[1:] if "=" in word])


def test_the_documented_recipe_is_the_one_that_is_run(tmp_path, jobs):
    """The read-me's list has the recipe's steps in its order; sources stand for one another."""
    run(tmp_path, benchmarks="official", serve=True)
    ran = list(dict.fromkeys(name for name, _ in jobs.ran if name != "cache_features"))
    section = (ROOT / "README.md").read_text().split("to be run one by one")[1].split("```")[1]
    listed = re.findall(r"^python (?:jobs/(\w+)\.py|(-m))", section, re.MULTILINE)
    assert [job or module for job, module in listed] == ran


def test_rows_are_those_of_prepared_data_or_as_published(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe.ShardSet, "open", lambda uri: range(7))
    plan = recipe._Recipe(RecipeSettings(recipe="paper", data=str(tmp_path)), None, tmp_path)
    assert plan._rows("gqa") == recipe.set_of("gqa").rows > 7
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa/manifest.json").touch()
    assert plan._rows("gqa") == 7 and plan._is_prepared("gqa") and not plan._is_prepared("ocrvqa")


def test_words_of_the_steps(tmp_path, jobs):
    run(tmp_path, benchmarks="official", benchmark="vqa", weights="/w", data="/d")
    words = {name: given for name, given in jobs.ran}
    out, config = tmp_path / "out", ["--config", PAPER]
    assert words["fetch"] == ["what=start", "output=/w"]
    assert words["-m"] == [
        "tinygptv.convert", "release", "--vision", "/w/eva_vit_g.pth", "--qformer", "/w/blip2_pretrained_flant5xxl.pth",
        "--language", "/w/phi-2", "--projection", "/w/prerained_minigpt4_7b.pth", "--template", "human",
        "--output", f"{out}/start",
    ]  # fmt: skip
    assert words["stage4"] == [
        *config,
        "data=/d",
        f"init_from={out}/stage3/checkpoint",
        f"output={out}/stage4",
        "features=inline",
    ]
    checkpoint = f"checkpoint={out}/stage4/checkpoint"
    assert words["score"] == [*config, checkpoint, "benchmark=vqa", "data=official", f"output={out}/score"]
    assert words["quantize"] == [*config, checkpoint, f"output={out}/artifact", "data=/d"]
    prepared = {given[2]: given[3:] for name, given in jobs.ran if name == "prepare_data"}
    assert prepared["source=gqa"] == [f"input={tmp_path}/raw/{recipe.set_of('gqa').input}", "output=/d/gqa"]
    caches = [given for name, given in jobs.ran if name == "cache_features"]
    assert caches[0][2:] == [
        "data=/d",
        f"checkpoint={out}/start",
        "image_size=224",
        "sources=[cc_sbu,laion]",
        f"output={out}/features12",
    ]
    assert caches[1][4] == "image_size=224" and caches[1][6] == f"output={out}/features3"


def test_keys_of_every_job_reach_the_steps(jobs, tmp_path):
    """Those that the command line gives beside the file: without them a stage of another recipe would be trained."""
    given = RecipeSettings(recipe="paper", raw="DATA", output=str(tmp_path), dry_run=True, tracking_uri="none", seed=42)
    for config, words in ((None, ["recipe=paper", "seed=42", "tracking_uri=none"]), (PAPER, ["tracking_uri=none"])):
        (stage,) = [s for s in recipe._Recipe(given, config, tmp_path).steps() if s.title.startswith("stage 1")]
        assert stage.words[0] == "jobs/stage1.py" and stage.words[-4].startswith("data=")
        assert [word for word in stage.words[1:-4] if word not in ("--config", PAPER)] == words


def test_each_step_is_done_where_its_own_file_is(tmp_path, jobs, monkeypatch):
    """The files that say so; the service, which never ends by itself, has none."""
    given = RecipeSettings(recipe="paper", raw=str(tmp_path), weights="/w", data="/d", benchmarks="/b", serve=True)
    monkeypatch.setattr(recipe._Recipe, "_input", lambda self, source: tmp_path)
    stages = tuple(stage.number for stage in RECIPES["paper"])
    cached = SimpleNamespace(choice="cached", stages=stages, image_size=448, sources=("gqa", "vg"))
    monkeypatch.setattr(recipe._Recipe, "_plan", lambda self: [cached])
    plan = recipe._Recipe(given, None, tmp_path / "out")
    results = {step.title: step.result for step in plan.steps() if not step.title.startswith("prepare ")}
    out = tmp_path / "out"
    assert results == {
        "fetch": Path("/w/prerained_minigpt4_7b.pth"),
        "convert": out / "start/manifest.json",
        "features of stages 1234": out / "features1234/result.json",
        **{f"stage {s.number}: {s.title}": out / f"stage{s.number}/result.json" for s in RECIPES["paper"]},
        "score": out / "score/result.json",
        "quantize": out / "artifact/result.json",
        "serve": out / ".never",
    }
    prepared = {step.title: step.result for step in plan.steps() if step.title.startswith("prepare ")}
    assert prepared == {f"prepare {name}": Path(f"/d/{name}/result.json") for name in plan.sources}


def test_seconds_are_those_of_the_step_and_what_failed_is_not_recorded(tmp_path, jobs, monkeypatch):
    clock = iter((10.0, 22.26, 30.0))
    monkeypatch.setattr(recipe, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    plan = recipe._Recipe(RecipeSettings(recipe="paper", output=str(tmp_path)), None, tmp_path)
    assert plan.run(recipe.Step("one", ("jobs/fetch.py", "a=1"), tmp_path)) == 12.3
    jobs.fails = "score"
    with pytest.raises(
        RecipeError, match=r"^step 'two' failed, as it says above: fix that, and run the same command ag"
    ):
        plan.run(recipe.Step("two", ("jobs/score.py",), tmp_path))
    assert json.loads((tmp_path / "recipe.json").read_text()) == plan.done == {"one": "python jobs/fetch.py a=1"}


def test_a_word_is_written_as_the_command_line_takes_it():
    words = [recipe._text(value) for value in (True, False, ["a", 2], ("b",), "ab", 3, None)]
    assert words == ["true", "false", "[a,2]", "[b]", "ab", "3", "None"]


def test_a_step_is_run_by_this_python_from_the_jobs_folder(tmp_path, jobs, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(recipe, "run_command", lambda words: called.append(words) or jobs.run(words))
    plan = recipe._Recipe(RecipeSettings(recipe="paper", output=str(tmp_path)), None, tmp_path)
    for words in (("jobs/fetch.py", "what=x y"), ("-m", "tinygptv.convert", "release")):
        step = recipe.Step("title", words, tmp_path / "none")
        assert plan.run(step) >= 0.0 and plan.done["title"] == step.shown
    python = recipe.sys.executable
    assert called == [
        [python, str(recipe.jobs_folder() / "fetch.py"), "what=x y"],
        [python, "-m", "tinygptv.convert", "release"],
    ]
    assert recipe.Step("t", ("jobs/fetch.py", "what=x y"), tmp_path).shown == "python jobs/fetch.py 'what=x y'"
    plan._ran_any, step = False, recipe.Step("title", ("-m", "tinygptv.convert", "release"), tmp_path)
    assert plan.run(step) == 0.0 and capsys.readouterr().out == "done already\n" and len(called) == 2


def test_folders_may_be_in_the_home_folder_and_the_plan_is_that_of_the_settings(tmp_path, jobs, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = {}
    monkeypatch.setattr(recipe, "plan_features", lambda stages, rows, free, **how: asked.update(how, free=free) or [])
    monkeypatch.setattr(recipe.shutil, "disk_usage", lambda folder: SimpleNamespace(free=(7, folder)))
    given = RecipeSettings(recipe="paper", raw="~/r", data="~/d/e", weights="~/w", tflops=3.0, features="inline")
    plan = recipe._Recipe(given, None, tmp_path / "out")
    assert (plan.raw, plan.data, plan.weights) == (tmp_path / "r", tmp_path / "d/e", tmp_path / "w")
    assert plan.sources == sorted(plan.sources) and len(plan.sources) == 23
    plan._plan()
    assert asked == {
        "free": (7, tmp_path),
        "max_steps": 0,
        "dtype": "float32",
        "tflops": 3.0,
        "wanted": "inline",
    }


def test_prepared_data_needs_no_raw_files_and_what_is_not_given_is_told(tmp_path, jobs):
    given = RecipeSettings(recipe="paper", data=str(tmp_path), output=str(tmp_path / "out"))
    plan = recipe._Recipe(given, None, tmp_path / "out")
    for name in plan.sources[1:]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    with pytest.raises(SettingsError, match=rf"^raw=\(not given\) lacks the data of {plan.sources[0]}: run"):
        list(plan._prepare())
    (tmp_path / plan.sources[0]).mkdir()
    (tmp_path / plan.sources[0] / "manifest.json").touch()
    assert [step.title for step in plan._prepare()] == [f"prepare {name}" for name in plan.sources]
