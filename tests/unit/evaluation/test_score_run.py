"""A whole score run: what is asked in which order, what is written, compared and told; no model answers here."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import pytest

from pipelines import storage
from pipelines.evaluation import run as module
from pipelines.evaluation.answers import Answers, ViewAnswer
from pipelines.evaluation.benchmarks.base import Benchmark, Question
from pipelines.evaluation.compare import _NEEDED
from pipelines.evaluation.run import _Asked, _compare, evaluate
from pipelines.settings import ScoreSettings, SettingsError
from tests.unit.evaluation.test_flow import MATCH, question


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """Run a score whose parts are replaced by notes."""

    def run(*, named=False, parent="parent", **changes):
        notes, published, tracked, shown, compared = [], [], [], [], []
        data = SimpleNamespace(root=tmp_path, image_root=None)
        files = [tmp_path / "a.json", tmp_path / "b.json"]
        for path in files:
            path.write_text(path.name)
        asked = {name: [question(f"{name}0"), question(f"{name}1")] for name in ("x", "y")}
        benchmarks = [
            Benchmark(name, "m", MATCH.read, MATCH.score, released=lambda outcomes: [0.25] * len(outcomes))
            for name in asked
        ]
        monkeypatch.setattr(module, "_find", lambda settings, of: (settings, of) == (given, data) and benchmarks)
        answered = {
            name: [(q, Answers(q.id, "" if name == "x" else "gone", {"answer": ViewAnswer("yes")})) for q in each * 2]
            for name, each in asked.items()
        }
        monkeypatch.setattr(module, "_find_checkpoint", lambda settings: settings is given and tmp_path / "local")
        monkeypatch.setattr(module, "checkpoint_digest", lambda path: f"digest of {path.name}")
        monkeypatch.setattr(module, "_data_folder", lambda settings: settings is given and data)

        def read(settings, benchmark, where):
            assert settings is given and where is data
            return _Asked(asked[benchmark.name], files if benchmark.name == "x" else [])

        def claim(folder, fingerprint, names, **how):
            assert fingerprint == module._score_fingerprint(given, tmp_path / "local", asked)
            notes.append(("claim", folder, names, how))

        def answer(settings, options, units):
            assert settings is given and options == module._options(
                given, tmp_path / "local", data, f"{output}/answers"
            )
            notes.append(("answer", [(unit.benchmark, unit.questions) for unit in units]))
            return answered, 4

        monkeypatch.setattr(module, "_read", read)
        monkeypatch.setattr(module, "claim", claim)
        monkeypatch.setattr(module, "_answer_all", answer)
        monkeypatch.setattr(module, "score_page", lambda *a: shown.extend(a) or f"{a[2]} {a[3]}")
        monkeypatch.setattr(module, "_compare", lambda *a: compared.extend(a) or {"x": "compared"})
        monkeypatch.setattr(module, "track_scores", lambda *a: notes.append(("track", a[1], a[4])) or tracked.extend(a))
        monkeypatch.setattr(module, "hash_file", lambda path: hashlib.sha256(path.read_bytes()).hexdigest())
        monkeypatch.setattr(storage.WorkFolder, "fetch", lambda self, *names: notes.append(("fetch", *names)))
        monkeypatch.setattr(storage.WorkFolder, "publish", lambda self, *names: published.append(names))
        output = tmp_path / ("outputs/score" if changes.get("output") == "" else "out")
        fields = {"checkpoint": "given", "data": "data", "images": "pictures", "output": str(output), "page_cases": 6}
        given = ScoreSettings(**{**fields, **changes})
        result = evaluate(given, None if named else benchmarks, **({"parent_run_id": parent} if parent else {}))
        lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
        assert tracked[:5] == [given, output, result, lines, parent], "the tracker is told what is written"
        assert shown == [result["benchmarks"], lines, result["checkpoint"], 6], "and the page shows it"
        metrics = {name: score["metric"] for name, score in result["benchmarks"].items()}
        assert compared == ([given, output, lines, metrics] if given.compare_with else []), (
            "and another run is compared with"
        )
        return SimpleNamespace(
            result=result, notes=notes, published=published, files=files, output=output, began=tracked[5]
        )

    return run


def test_a_score_names_its_files_and_keeps_what_it_gives_back(scored, caplog):
    found = scored(overwrite=True)
    result, output = found.result, found.output
    digests = [{"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in found.files]
    assert [result["benchmarks"][name]["files"] for name in ("x", "y")] == [digests, []]
    names = {"predictions": "predictions.jsonl", "page": "report.html", "result": "result.json"}
    assert {key: result[key] for key in names} == {key: str(output / name) for key, name in names.items()}
    assert result["checkpoint"].endswith("/given") and result["metric"] == "official" and "comparison" not in result
    assert json.loads((output / "result.json").read_text())["benchmarks"] == result["benchmarks"]
    assert (output / "report.html").read_text() == f"{result['checkpoint']} 6"
    claimed = {"overwrite": True, "inputs": ["given", "data", "pictures"]}
    assert found.notes == [
        ("claim", str(output), module.RESULTS, claimed),
        ("fetch", "run.json", "unsent.jsonl"),  # the run of the tracker is continued
        ("answer", [(name, (question(f"{name}0"), question(f"{name}1"))) for name in ("x", "y")]),
        ("track", output, "parent"),
    ]
    assert (output / "answers").is_dir()
    assert found.published == [("predictions.jsonl", "report.html", "run.json", "unsent.jsonl", "result.json")]
    assert caplog.messages == [f"y, no answer to question {key}: gone" for key in ("y0", "y1", "y0")], (
        "three of a benchmark's"
    )


@pytest.mark.parametrize(("metric", "value", "kept"), [("official", 100.0, 1.0), ("released", 25.0, 0.25)])
def test_benchmarks_that_are_named_are_scored_by_the_rules_that_are_asked_for(scored, metric, value, kept):
    found = scored(named=True, parent="", metric=metric)
    assert found.result["benchmarks"]["x"]["value"] == value and found.result["metric"] == metric
    lines = [json.loads(line) for line in (found.output / "predictions.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines if line["benchmark"] == "x"] == [kept] * 4


def test_scores_have_a_folder_of_their_own(scored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert scored(output="").output == tmp_path / "outputs/score"


def test_a_comparison_has_a_page_of_its_own(scored):
    found = scored(compare_with="memory://earlier/run")
    assert found.result["comparison"] == {"x": "compared"}
    assert found.result["comparison_page"] == str(found.output / "comparison.html")
    assert found.published[-1][:3] == ("predictions.jsonl", "report.html", "comparison.html")


@pytest.mark.parametrize(("remote", "named"), [(False, True), (True, True), (False, False)])
def test_two_runs_are_compared_under_their_checkpoints_names(tmp_path, monkeypatch, remote, named):
    location = f"memory://runs/{tmp_path.name}" if remote else str(tmp_path / "earlier")
    storage.make_folder(location)
    theirs_line = dict.fromkeys(_NEEDED, "q")
    storage.write_atomically(f"{location}/predictions.jsonl", json.dumps(theirs_line).encode())
    if named:
        storage.write_atomically(
            f"{location}/result.json", b'{"checkpoint": "theirs", "benchmarks": {"x": {"metric": "m"}}}'
        )
    told = []
    monkeypatch.setattr(
        module, "compare", lambda ours, theirs: told.append((ours, (theirs / "result.json").is_file())) or {}
    )
    monkeypatch.setattr(module, "comparison_page", lambda *a: told.append(a) or "the page")
    settings = ScoreSettings(checkpoint="ours", compare_with=location, page_cases=5)
    assert _compare(settings, tmp_path, ["line"], {"x": "m"}) == {}
    theirs = "theirs" if named else location
    assert told == [(tmp_path, named), ({}, ["line"], [theirs_line], ("ours", theirs), 5)]
    assert (tmp_path / "comparison.html").read_text() == "the page"
    if named:
        with pytest.raises(SettingsError, match=r"compare_with=.* scored x by 'm', and this run by 'other'"):
            _compare(settings, tmp_path, ["line"], {"x": "other"})


def test_what_cannot_be_compared_is_refused_before_anything_is_answered(scored, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_read", lambda *_: pytest.fail("answered"))
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier/predictions.jsonl").write_text("")
    (tmp_path / "earlier/result.json").write_text('{"benchmarks": {"y": {"metric": "m"}, "z": {"metric": "k"}}}')
    with pytest.raises(SettingsError, match=r"scored y by 'm', and this run by 'as released'"):
        scored(compare_with=str(tmp_path / "earlier"), metric="released")
    with pytest.raises(
        SettingsError, match=r"^compare_with=.*/out/ is the output of this run: give another output=\.$"
    ):
        scored(compare_with=f"{tmp_path}/out/", overwrite=True)


def test_one_run_at_a_time_writes_into_an_output(scored, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.predictions.jsonl.1.tmp").write_text("of a run that was killed")
    with storage.alone(str(tmp_path / "out")), pytest.raises(SettingsError, match="another run is writing into output"):
        scored(overwrite=True)
    assert not list(scored().output.glob(".*.tmp"))


def test_the_rate_is_of_what_was_answered_now_over_the_time_of_answering(scored, monkeypatch):
    clock = iter([100.0, 110.0, 118.0, 130.04])
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock), time=lambda: 1e9))
    found = scored()
    result = found.result
    assert (result["questions_per_second"], result["seconds"]) == (0.5, 30.0), "4 questions in 8 s"
    assert found.began == 1e9, "the tracker's run begins with the command"


def test_what_decides_the_scores_is_their_identity(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "checkpoint_digest", lambda path: f"digest of {path.name}")
    base = ScoreSettings(metric="vqa", limit=7)

    def identity(settings=base, folder="model", **questions):
        asked = {"x": [question("a"), question("b")], "y": [question("c")], **questions}
        return module._score_fingerprint(settings, tmp_path / folder, asked).inputs

    found = identity()
    assert found == {
        "job": "score", "checkpoint": "digest of model", "metric": "vqa", "baselines": True, "limit": 7,
        "questions.x": found["questions.x"], "questions.y": found["questions.y"],
    }  # fmt: skip
    assert found["questions.x"] != found["questions.y"]
    changed = {"metric": "exact", "baselines": False, "limit": 8}
    for name, value in changed.items():
        assert identity(base.model_copy(update={name: value})) == {**found, name: value}
    for name, value in {
        "batch_size": 3,
        "num_workers": 5,
        "page_cases": 1,
        "output": "/x",
        "compare_with": "/y",
    }.items():
        assert identity(base.model_copy(update={name: value})) == found, name
    assert identity(folder="other") == {**found, "checkpoint": "digest of other"}
    here, there = (Question("c", "what?", tmp_path / place / "c.png", {"answer": "yes"}) for place in ("a", "b"))
    assert identity(y=[here]) == identity(y=[there]) != found, "a folder may be moved; an image is not none"
    for other in ([question("b"), question("a")], [question("a")], [question("a", kind="k"), question("b")]):
        assert identity(x=other)["questions.x"] != found["questions.x"]


def test_every_file_that_was_read_is_used_once():
    data = SimpleNamespace(
        opened=[SimpleNamespace(used=["a", "b"]), SimpleNamespace(used=[]), SimpleNamespace(used=["c"])]
    )
    assert module._used(data) == ["a", "b", "c"]


def test_the_output_is_tried_before_anything_is_read(scored, monkeypatch, tmp_path):
    asked = []

    def refuse(location, *, writes):
        asked.append((location.uri, writes))
        raise PermissionError("no")

    monkeypatch.setattr(storage, "check_access", refuse)
    with pytest.raises(PermissionError):
        scored()
    assert asked == [(str(tmp_path / "out"), True)]


def test_a_checkpoint_has_a_configuration_file(tmp_path, monkeypatch):
    monkeypatch.setattr(
        module, "local_checkpoint", lambda uri, weights: tmp_path if (uri, weights) == ("x", False) else None
    )
    with pytest.raises(SettingsError, match=r"^give checkpoint=DIR, the checkpoint or artifact to score\.$"):
        module._find_checkpoint(ScoreSettings())
    (tmp_path / "config.json").mkdir()
    with pytest.raises(SettingsError, match="checkpoint=x is no checkpoint or artifact"):
        module._find_checkpoint(ScoreSettings(checkpoint="x"))
    (tmp_path / "config.json").rmdir()
    (tmp_path / "config.json").write_text("{}")
    assert module._find_checkpoint(ScoreSettings(checkpoint="x")) == tmp_path
