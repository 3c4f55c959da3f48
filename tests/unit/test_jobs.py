"""Entry scripts: each calls its job with its settings, and prints the path of result.json last."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest

from pipelines import cli
from pipelines.settings import SECTIONS, TrainSettings

JOBS = {
    "ablate": ("pipelines.ablation.run.ablate", {"text": "table", "report": "r.md", "page": "r.html"}),
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
    assert capsys.readouterr().out.splitlines()[-1] == "/out/result.json"


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_stages_script_trains_that_stage(monkeypatch, capsys, number):
    from pipelines.training import run

    trained = []
    monkeypatch.setattr(run, "run_stage", lambda settings, stage: trained.append((type(settings), stage)))
    monkeypatch.setattr(run, "print_result", lambda result: None)
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
    assert job("demo")(["--config", str(tmp_path / "c.yaml")]) == 0
    assert given == [(9, str(tmp_path / "c.yaml"))] and capsys.readouterr().out.endswith("summary\n")
