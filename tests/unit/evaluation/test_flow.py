"""A score run's bookkeeping: which answers, which numbers, which files, told to whom; no model answers here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.evaluation import run as module
from pipelines.evaluation.answers import Answers, ViewAnswer, write_answers
from pipelines.evaluation.benchmarks.base import Benchmark, Question
from pipelines.evaluation.benchmarks.files import DataFolder
from pipelines.evaluation.run import _answer_all, _image_state, _names
from pipelines.evaluation.scoring import outcomes_of, score_benchmark, score_each, score_table
from pipelines.evaluation.track import _data_input
from pipelines.evaluation.worker import AnswerOptions, QuestionUnit
from pipelines.settings import ScoreSettings, SettingsError
from pipelines.units import Workers

MATCH = Benchmark("exact", "exact match", lambda data: iter(()), lambda a, t: float(a == t["answer"]))


def question(key, split="test", kind=""):
    return Question(key, "what?", None, {"answer": "yes"}, kind, split)


# ---------------------------------------------------------------------- answers and scores


def test_each_view_keeps_its_own_losses():
    views = {"answer": ViewAnswer("a", (1.0,)), "blind": ViewAnswer("b", (2.0,)), "shuffled": ViewAnswer("c", (3.0,))}
    written = Answers("q", "why", views).to_dict()
    assert [written[f"{view}_losses"] for view in views] == [[1.0], [2.0], [3.0]]
    assert Answers.from_dict(json.loads(json.dumps(written))) == Answers("q", "why", views)
    assert Answers.from_dict({**written, "blind": None}).views == {v: a for v, a in views.items() if v != "blind"}


def test_outcomes_of_a_view_are_those_that_were_asked_for_or_have_a_problem():
    answered = [
        (question("a"), Answers("a", "", {"answer": ViewAnswer("x", (0.5,)), "blind": ViewAnswer("y")})),
        (question("b"), Answers("b", "", {"answer": ViewAnswer("z")})),
        (question("c"), Answers("c", "gone")),
    ]
    found = [(o.question.id, o.answer, o.losses, o.problem) for o in outcomes_of(answered, "answer")]
    assert found == [("a", "x", (0.5,), ""), ("b", "z", (), ""), ("c", "", (), "gone")]
    assert [(o.question.id, o.answer) for o in outcomes_of(answered, "blind")] == [("a", "y"), ("c", "")]


def test_parts_are_in_order_by_split_and_kind_and_the_main_split_is_the_value():
    kinds = [("val", "b"), ("test", "z"), ("test", "a"), ("test", ""), ("dev", "")]
    answered = [
        (question(f"q{n}", split, kind), Answers(f"q{n}", "", {"answer": ViewAnswer("yes" if n < 2 else "no")}))
        for n, (split, kind) in enumerate(kinds)
    ]
    found = score_benchmark(MATCH, answered)
    assert list(found["parts"]) == ["dev", "test/a", "test/z", "val", "val/b"]
    assert [(part["value"], part["n"]) for part in found["parts"].values()] == [
        (0.0, 1),
        (0.0, 1),
        (100.0, 1),
        (100.0, 1),
        (100.0, 1),
    ]
    assert (found["value"], found["n"], found["metric"]) == (pytest.approx(33.333, abs=1e-3), 3, "exact match")
    assert (found["blind"], found["shuffled"], found["scoring"], found["files"]) == (None, None, "official", [])


def test_each_baseline_is_the_score_of_its_own_view():
    views = {"answer": ViewAnswer("no"), "blind": ViewAnswer("yes"), "shuffled": ViewAnswer("no")}
    found = score_benchmark(MATCH, [(question("a"), Answers("a", "", views))])
    assert (found["value"], found["blind"], found["shuffled"]) == (0.0, 100.0, 0.0)


@pytest.mark.parametrize(
    ("has_own", "released", "metric", "scoring", "value"),
    [
        (True, True, "as released", "released", 25.0),
        (True, False, "exact match", "official", 100.0),
        (False, True, "exact match", "official", 100.0),
    ],
)
def test_the_release_scores_only_where_it_has_the_benchmark(has_own, released, metric, scoring, value):
    own = (lambda outcomes: [0.25] * len(outcomes)) if has_own else None
    benchmark = Benchmark("exact", "exact match", MATCH.read, MATCH.score, released=own)
    answered = [(question("a"), Answers("a", "", {"answer": ViewAnswer("yes")}))]
    found = score_benchmark(benchmark, answered, released=released)
    assert (found["metric"], found["scoring"], found["value"]) == (metric, scoring, value)
    wrong = outcomes_of([(question("b"), Answers("b", "gone"))], "answer")
    assert score_each(benchmark, wrong, released=released) == [0.0]


def test_a_table_has_each_number_below_its_name():
    score = score_benchmark(MATCH, [(question("a"), Answers("a", "gone"))])
    numbers = {"low": 1.0, "value": 2.0, "high": 3.0, "blind": 4.0, "shuffled": 5.0}
    head, line = score_table({"exact": {**score, **numbers}}).splitlines()
    assert head.split() == ["benchmark", "metric", "score", "95%", "interval", "blind", "shuffled", "n"]
    assert line.split() == [
        "exact",
        "exact",
        "match",
        "2.0",
        "1.0",
        "..",
        "3.0",
        "4.0",
        "5.0",
        "1",
        "(1",
        "unanswered)",
    ]


# ---------------------------------------------------------------------- units and files


def test_files_of_other_answers_are_removed_and_only_missing_ones_are_given(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    options = AnswerOptions("checkpoint", "f", 1, False, False, str(tmp_path))
    units = [
        QuestionUnit(name, number, tuple(question(f"{name}{number}{k}") for k in range(2)), 4, True, f"{name}-{number}")
        for name, number in (("b", 0), ("a", 0), ("b", 1))
    ]
    write_answers(str(tmp_path / "b-0"), [Answers(f"b0{k}") for k in range(2)])
    (tmp_path / "old").write_text("of another checkpoint")
    asked = []
    settings, given = ScoreSettings(), []
    monkeypatch.setattr(module, "_answer_units", lambda *called: asked.extend(called[2]) or given.extend(called[:2]))
    read = {}
    monkeypatch.setattr(
        module,
        "read_answers",
        lambda uri, questions: read.setdefault(Path(uri).name, [f"{Path(uri).name} {q.id[-1]}" for q in questions]),
    )
    answered, now = _answer_all(settings, options, units)
    assert list(read) == ["b-0", "a-0", "b-1"]
    assert given == [settings, options]
    assert asked == units[1:] and now == 4 and not (tmp_path / "old").exists() and (tmp_path / "b-0").exists()
    assert [(q.id, a) for q, a in answered["b"]] == [
        ("b00", "b-0 0"),
        ("b01", "b-0 1"),
        ("b10", "b-1 0"),
        ("b11", "b-1 1"),
    ]
    assert list(answered) == ["b", "a"] and caplog.messages == ["1 of 3 units are answered already"]
    caplog.clear()
    (tmp_path / "b-0").unlink()
    assert _answer_all(settings, options, units)[1] == 6 and not caplog.messages


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:-9], lambda data: data[: data.index(b"\n") + 1], lambda data: b"[1]\n" * 2,
     lambda data: data.replace(b"q1", b"q0"), lambda data: b"\0" * len(data), lambda data: data + data],
)  # fmt: skip
def test_damaged_answers_are_given_again(tmp_path, monkeypatch, caplog, damage):
    options = AnswerOptions("checkpoint", "f", 1, False, False, str(tmp_path))
    unit = QuestionUnit("b", 0, tuple(question(f"q{k}") for k in range(2)), 4, True, "b-0")
    path, whole = tmp_path / "b-0", [Answers(f"q{k}", "", {"answer": ViewAnswer("yes")}) for k in range(2)]
    write_answers(str(path), whole)
    path.write_bytes(damage(path.read_bytes()))

    def answer(settings, options, units):
        for _ in units:
            assert not path.exists(), "a worker leaves what is there"
            write_answers(str(path), whole)

    monkeypatch.setattr(module, "_answer_units", answer)
    answered, now = _answer_all(ScoreSettings(), options, [unit])
    assert answered == {"b": list(zip(unit.questions, whole, strict=True))} and now == 2
    assert caplog.messages == [f"{path} is damaged: its questions are answered again."]
    assert _answer_all(ScoreSettings(), options, [unit]) == (answered, 0), "those that are whole are kept"
    path.write_bytes(b"")
    monkeypatch.setattr(module, "_answer_units", lambda *_: path.write_bytes(b""))
    with pytest.raises(ValueError, match=r"b-0 is damaged: run the same command again, which answers"):
        _answer_all(ScoreSettings(), options, [unit])


def test_an_image_is_known_by_size_and_time(tmp_path):
    path = tmp_path / "a.png"
    assert (_image_state(None), _image_state(path)) == ("none", "missing")
    path.write_bytes(b"12345")
    stat = path.stat()
    assert _image_state(path) == f"5 {stat.st_mtime_ns}"


def test_eight_folders_are_named_and_the_others_counted():
    paths = [Path(f"/{n}") for n in range(10)]
    eight = ", ".join(f"/{n}" for n in range(8))
    assert [_names(paths[:8]), _names(paths[:9])] == [eight, f"{eight} or 1 more folders"]
    assert _names([]) == ""


def test_a_benchmarks_data_is_known_by_its_files_or_its_name():
    score = {"files": [{"path": "x", "sha256": "1"}, {"path": "y", "sha256": "2"}], "n": 7}
    found = _data_input(ScoreSettings(data="/data"), "vqa", score)
    assert (found.name, found.rows, found.context) == ("vqa", 7, "evaluation")
    assert found.digest == module.digest_of(["1", "2"])
    nameless = _data_input(ScoreSettings(), "vqa", {"files": [], "n": 1})
    assert (found.source, nameless.source, nameless.digest) == ("/data", "vqa", module.digest_of("vqa"))


def test_own_rows_are_scored_alone_and_other_names_are_looked_up():
    asked = []
    for given in ("own", ["own"]):
        with pytest.raises(SettingsError, match=r"data=/nowhere is no file of rows"):
            module._find(ScoreSettings(data="/nowhere", benchmark=given), DataFolder(Path("/nowhere")))
    for changes, said in (({"data": ""}, "give data=DIR, the folder of"), ({"benchmark": ""}, "give benchmark=NAME")):
        with pytest.raises(SettingsError, match=f"^{said}"):
            module._find(ScoreSettings(**{"data": "/d", "benchmark": "gqa", **changes}), DataFolder(Path("/d")))
    with pytest.raises(SettingsError, match=r"^metric=vqa is for one's own rows: give benchmark=own data=rows\.jsonl"):
        module._find(ScoreSettings(data="/d", benchmark="gqa", metric="vqa"), DataFolder(Path("/d")))
    for given in ("gqa", ["gqa", "vsr"]):
        asked.append([each.name for each in module._find(ScoreSettings(data="/d", benchmark=given), None)])
    assert asked == [["gqa"], ["gqa", "vsr"]]


@pytest.mark.parametrize(("used", "named"), [([], "its files"), (["/d/a.json", "/d/b.json"], "/d/a.json, /d/b.json")])
@pytest.mark.parametrize(
    "error", [KeyError("image"), TypeError("no list"), IndexError("short"), AttributeError("x"), ValueError("not 7")]
)
def test_an_entry_that_lacks_something_is_told_with_its_files(used, named, error):
    data = DataFolder(Path("/d"))

    def read(data):
        data.opened.append(SimpleNamespace(used=list(map(Path, used))))
        raise error
        yield

    with pytest.raises(SettingsError) as caught:
        module._read(ScoreSettings(), Benchmark("b", "m", read, MATCH.score), data)
    assert str(caught.value) == (
        f"benchmark=b: an entry of {named} is not as officially distributed: {type(error).__name__} {error}."
    )


def test_data_and_images_are_local_copies_and_images_are_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "local_data", lambda uri: tmp_path / uri.removeprefix("s3://"))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "file").write_text("")
    found = module._data_folder(ScoreSettings(data="s3://official", images="s3://pictures"))
    assert (found.root, found.image_root) == (tmp_path / "official", tmp_path / "pictures")
    assert module._data_folder(ScoreSettings(data="official")) == DataFolder(tmp_path / "official", None)
    for name in ("file", "gone"):
        with pytest.raises(
            SettingsError, match=f"^images={name} is no folder: give the one that holds the benchmark's"
        ):
            module._data_folder(ScoreSettings(data="official", images=name))


def test_the_benchmark_without_questions_is_named_among_several():
    benchmark = Benchmark("b", "m", lambda data: iter(()), MATCH.score)
    with pytest.raises(SettingsError, match=r"^benchmark=b has no questions in the given data\.$"):
        module._read(ScoreSettings(benchmark=["a", "b"]), benchmark, DataFolder(Path("/d")))


@pytest.mark.parametrize("looked", [[], ["/d/images", "/d/val"]])
def test_the_first_fifty_images_decide_whether_the_folder_is_the_right_one(tmp_path, looked):
    there = tmp_path / "there.png"
    there.write_text("")
    asked = [Question(str(n), "what?", tmp_path / f"{n}.png", {}) for n in range(50)]
    data = SimpleNamespace(opened=[SimpleNamespace(looked_in=list(map(Path, looked)))])
    module._check_images("b", [*asked[:49], Question("x", "what?", there, {})], data)
    with pytest.raises(SettingsError) as caught:
        module._check_images("b", [*asked, Question("x", "what?", there, {})], data)
    assert str(caught.value) == (
        f"benchmark=b: none of the first 50 images exists; the first, 0.png, is not in "
        f"{', '.join(looked) or tmp_path}. Give images=DIR, the folder that holds them or has it somewhere below."
    )


def test_units_are_answered_by_actors_that_keep_the_model_and_the_bar_counts_questions(monkeypatch):
    asked, shown = [], []

    def map_units(setup, units, workers, settings, name):
        asked.append((workers, settings.gpus_per_worker, name))
        yield from ((unit, None) for unit in reversed(units))

    monkeypatch.setattr(module, "map_units", map_units)
    monkeypatch.setattr(module.Bar, "update", lambda bar, *now: shown.append((bar.title, *now)))
    units = [
        QuestionUnit("b", n, tuple(question(str(k)) for k in range(size)), 4, True, "f") for n, size in ((0, 4), (1, 3))
    ]
    settings = ScoreSettings(num_workers=2, gpus_per_worker=0.5, quiet=True)
    module._answer_units(settings, AnswerOptions("c", "f", 1, False, False, "/a"), units)
    assert asked == [(Workers(2, num_gpus=0.5, reuse_setup=True), 0.5, "score")]
    assert shown == [("score", 3, 7), ("score", 7, 7)]
