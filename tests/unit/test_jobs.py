"""Entry scripts: each calls its job with its settings, and prints the path of result.json last."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest

from pipelines import cli
from pipelines.settings import SECTIONS, ServeSettings, TrainSettings
from tests.paths import ROOT

JOBS = {
    "ablate": ("pipelines.ablation.run.ablate", {"text": "table", "report": "r.md", "page": "r.html", "rows": []}),
    "cache_features": ("pipelines.data.features.cache_features", {}),
    "fetch": ("pipelines.fetch.run.fetch", {}),
    "miniature": ("pipelines.miniature.jobs.run_miniature", {}),
    "plan_memory": ("pipelines.training.memory_plan.plan_memory", {"table": "fits"}),
    "prepare_data": ("pipelines.data.ingest.job.ingest", {}),
    "quantize": ("pipelines.export.export", {}),
    "recipe": ("pipelines.recipe.run_recipe", {}),
}
SECTION = {"recipe": "whole_recipe"}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(cli, "quiet_libraries", lambda: None)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)


def job(name):
    return importlib.import_module(f"jobs.{name}").main


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_given_its_settings_and_prints_its_result_last(monkeypatch, capsys, tmp_path, name):
    target, more = JOBS[name]
    module, function = target.rsplit(".", 1)
    given = []
    result = {**more, "result": "/out/result.json"}
    monkeypatch.setattr(importlib.import_module(module), function, lambda *arguments: given.append(arguments) or result)
    section = SECTION.get(name, name)
    config = tmp_path / "c.yaml"
    config.write_text(f"recipe: paper\n{section}: {{output: /from/file}}")
    assert job(name)(["--config", str(config), "seed=5"]) == 0
    (settings, *rest) = given[0]
    assert type(settings) is SECTIONS[section]
    assert (settings.seed, settings.output, settings.recipe) == (5, "/from/file", "paper")
    assert rest == ([str(config)] if name == "recipe" else [])
    before = {"ablate": "table\nreport: r.md\npage: r.html\n", "plan_memory": "fits\n"}.get(name, "")
    assert capsys.readouterr().out == f"{before}/out/result.json\n"


def test_an_ablation_in_which_a_variant_failed_says_so_behind_its_table(monkeypatch, capsys):
    stages = ({"1": {"status": "trained"}, "2": {"status": "failed"}}, {"1": {"status": "trained"}})
    rows = [{"variant": name, "stages": each} for name, each in zip(("no_lora", "full"), stages, strict=True)]
    result = {"text": "table", "report": "r.md", "page": "r.html", "result": "/out/result.json", "rows": rows}
    monkeypatch.setattr("pipelines.ablation.run.ablate", lambda settings: result)
    assert job("ablate")([]) == 2
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "/out/result.json"
    assert printed.err == "error: 1 of 2 variants failed (no_lora): the same command tries them again.\n"


WORK = {
    **{name: target for name, (target, _) in JOBS.items()},
    "batch": "pipelines.serving.batch.run_batch",
    "demo": "pipelines.miniature.demo.run_demo",
    "released": "pipelines.released.run_released",
    "score": "pipelines.evaluation.run.evaluate",
    "serve_http": "jobs.serve_http.serve_until_stopped",
    **{f"stage{number}": "pipelines.training.run.run_stage" for number in (1, 2, 3, 4)},
}


@pytest.mark.parametrize("name", sorted(WORK))
def test_a_job_that_failed_or_was_interrupted_says_so_in_its_status(monkeypatch, capsys, name):
    assert sorted(WORK) == sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
    module, function = WORK[name].rsplit(".", 1)
    for error, status, told in ((ValueError("no"), 2, "error: no\n"), (KeyboardInterrupt(), 130, "Interrupted. Run")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(importlib.import_module(module), function, fail)
        assert job(name)([]) == status and capsys.readouterr().err.startswith(told)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_stages_script_trains_that_stage(monkeypatch, capsys, number):
    from pipelines.training import run

    trained = []
    monkeypatch.setattr(run, "run_stage", lambda settings, stage: trained.append((type(settings), stage)))
    monkeypatch.setattr("pipelines.training.result.print_result", lambda result: None)
    assert job(f"stage{number}")(["data=x"]) == 0
    assert trained == [(TrainSettings, number)]


def test_scores_are_compared_where_it_is_asked_for(monkeypatch, capsys):
    from pipelines.evaluation import compare, run, scoring

    result = {"benchmarks": {}, "page": "p.html", "result": "r.json"}
    monkeypatch.setattr(run, "evaluate", lambda settings: result)
    monkeypatch.setattr(scoring, "score_table", lambda benchmarks: "scores")
    monkeypatch.setattr(compare, "comparison_table", lambda comparison: f"compared {comparison}")
    assert job("score")([]) == 0
    assert capsys.readouterr().out == "scores\npage: p.html\nr.json\n"
    result |= {"comparison": 7, "comparison_page": "c.html"}
    assert job("score")(["compare_with=old"]) == 0
    out = capsys.readouterr().out
    assert "compared with old:\ncompared 7\nbefore and after: c.html\n" in out and out.endswith("r.json\n")


def test_answers_of_a_file_are_counted(monkeypatch, capsys):
    from pipelines.serving import batch

    result = SimpleNamespace(answered=3, requests=5, failed=2, answers="a.jsonl", result="r.json")
    monkeypatch.setattr(batch, "run_batch", lambda settings: result)
    assert job("batch")(["input=x"]) == 0
    assert capsys.readouterr().out == "3 of 5 requests answered, 2 failed: a.jsonl\nr.json\n"


@pytest.mark.parametrize("serve", [True, False])
def test_the_released_model_is_served_where_it_is_asked_for(monkeypatch, capsys, serve):
    from pipelines import released
    from pipelines.serving import foreground

    served = []
    result = {"result": "r.json", "artifact": "/a", "plan": {"device": "cpu"}}
    monkeypatch.setattr(released, "run_released", lambda settings: result)
    monkeypatch.setattr(foreground, "serve_until_stopped", lambda settings: served.append(settings.artifact))
    assert job("released")([f"serve={str(serve).lower()}"]) == 0
    assert capsys.readouterr().out == "r.json\n" and served == (["/a"] if serve else [])


def test_the_demo_reads_the_configuration_of_all_phases(monkeypatch, capsys, tmp_path):
    from pipelines.miniature import demo

    given = []
    monkeypatch.setattr(demo, "run_demo", lambda settings, config: given.append((settings.port, config)))
    monkeypatch.setattr(demo, "summary", lambda result: "summary")
    (tmp_path / "c.yaml").write_text("demo: {port: 9}")
    with pytest.raises(SystemExit) as ended:
        job("demo")(["--config"])
    assert ended.value.code == 2
    assert job("demo")(["--config", str(tmp_path / "c.yaml")]) == 0
    assert given == [(9, str(tmp_path / "c.yaml"))]
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("The demo: ten phases, results in outputs/demo.") and rest == ["summary"]
    assert job("demo")(["port=7", "output=here"]) == 0
    assert given[1:] == [(7, None)] and "results in here." in capsys.readouterr().out


def test_the_recipe_needs_no_configuration(monkeypatch):
    from pipelines import recipe

    given = []
    monkeypatch.setattr(recipe, "run_recipe", lambda settings, config: given.append(config) or {"result": "r"})
    assert job("recipe")(["output=x"]) == 0 and given == [None]


def test_the_server_has_its_section_and_the_words_beside_it(monkeypatch, tmp_path):
    module = importlib.import_module("jobs.serve_http")
    served = []
    monkeypatch.setattr(module, "serve_until_stopped", served.append)
    (tmp_path / "c.yaml").write_text("serve: {port: 9, model_name: name}")
    assert module.main(["--config", str(tmp_path / "c.yaml"), "model_name=other"]) == 0
    assert [(type(each), each.port, each.model_name) for each in served] == [(ServeSettings, 9, "other")]


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "jobs").glob("*.py")))
def test_help_says_what_a_job_does_and_its_keys(capsys, name):
    module = importlib.import_module(f"jobs.{name}")
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and module.__doc__.strip() in out and "  output=" in out


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "jobs").glob("*.py")))
def test_a_wrong_word_ends_a_job_before_it_begins(capsys, name):
    with pytest.raises(SystemExit) as ended:
        job(name)(["no_such_key=1"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ") and capsys.readouterr().out == ""
