"""A whole score run in this process: faults are counted and named, finished units are kept, pages and numbers agree."""

from __future__ import annotations

import errno
import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import storage
from pipelines.evaluation import track
from pipelines.evaluation.benchmarks.base import Benchmark, Question
from pipelines.evaluation.benchmarks.files import DataFolder
from pipelines.evaluation.run import _read, evaluate
from pipelines.evaluation.track import track_scores
from pipelines.evaluation.worker import UnitAnswerer, _other_images
from pipelines.fingerprint import OtherInputsError
from pipelines.settings import ScoreSettings, SettingsError
from pipelines.storage import DiskFullError
from pipelines.storage.files import AtomicFile
from pipelines.tracking.base import NullTracker
from tests import benchmark_files
from tests.serving_model import make_image, save_checkpoint
from tinygptv.metrics.metrics import exact_match
from tinygptv.miniature.writers import write_world


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, 1, 6, sources=())
    return folder


def settings(checkpoint, data, output, **changes):
    fields = {
        "checkpoint": str(checkpoint),
        "data": str(data),
        "output": str(output),
        "num_workers": 0,
        "threads_per_worker": 1,
        "batch_size": 2,
        "tracking_uri": "none",
        "quiet": True,
        "benchmark": "miniature_vqa",
    }
    return ScoreSettings(**{**fields, **changes})


def predictions(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(checkpoint, world, tmp_path_factory):
    output = tmp_path_factory.mktemp("score")
    return evaluate(settings(checkpoint, world, output, benchmark=["miniature_vqa", "miniature_refer"])), output


def test_result(run):
    result, output = run
    assert json.loads((output / "result.json").read_text())["benchmarks"] == result["benchmarks"]
    for entry in result["benchmarks"].values():
        assert {"metric", "value", "low", "high", "n", "blind", "shuffled"} <= set(entry)
        assert entry["unanswered"] == 0 and entry["low"] <= entry["value"] <= entry["high"]
    assert result["benchmarks"]["miniature_vqa"]["n"] == 6
    assert set(result["benchmarks"]["miniature_refer"]["also"]) == {"IoU > 0.3", "mean IoU"}


@pytest.mark.parametrize(("limit", "asked"), [(0, 3), (1, 1), (2, 2), (3, 3), (9, 3)])
def test_a_limit_asks_so_many_questions(tmp_path, limit, asked):
    questions = [Question(f"q{number}", "what?", None, {"answer": "x"}) for number in range(3)]
    benchmark = Benchmark("own", "exact match", lambda data: iter(questions), lambda answer, truth: 0.0)
    assert _read(ScoreSettings(limit=limit), benchmark, DataFolder(tmp_path, None)).questions == questions[:asked]


def test_predictions_hold_every_question_with_every_view(run, world):
    result, output = run
    lines = predictions(output)
    asked = json.loads((world / "benchmarks/vqa.json").read_text())
    own = [line for line in lines if line["benchmark"] == "miniature_vqa"]
    assert [line["truth"]["answer"] for line in own] == [entry["answer"] for entry in asked]
    assert all(isinstance(line[view], str) for line in lines for view in ("answer", "blind", "shuffled"))
    main = [line["score"] for line in own if line["split"] == "test"]
    assert result["benchmarks"]["miniature_vqa"]["value"] == pytest.approx(100 * sum(main) / len(main), abs=1e-3)
    assert any(line["answer"] != line["blind"] for line in lines), "the picture must reach the model"
    assert any(line["answer"] != line["shuffled"] for line in lines)


def test_page_shows_pictures_worst_first(run):
    page = (run[1] / "report.html").read_text()
    assert page.count("data:image/jpeg;base64") == 14 + 14, "all 14 questions, and all 14 phrases"
    assert page.index('class="wrong"') < page.index("<h3>Best</h3>")
    assert "http://" not in page and "https://" not in page


def test_the_tracker_is_told_the_scores_the_data_and_when_the_run_began(run, world, monkeypatch, tmp_path):
    told = {}

    class Recording(NullTracker):
        def describe(self, text):
            told["description"] = text

        def inputs(self, data):
            told["data"] = data

    def begin(settings, title, folder, *, parent_run_id, started):
        told["title"], told["started"] = title, started
        return Recording()

    monkeypatch.setattr(track, "continue_tracker", begin)
    result, output = run
    track_scores(settings(result["checkpoint"], world, output), tmp_path, result, [], "", 1e9)
    assert told["started"] == 1e9
    assert told["title"].startswith("mini score miniature_vqa, miniature_refer, 2001-09-")
    head, _, first, *_ = told["description"].splitlines()
    shown = ["benchmark", "metric", "value", "low", "high", "blind", "shuffled", "n"]
    assert head.replace("&emsp;", "").strip("| ").split(" | ") == shown
    assert first.startswith("| miniature_vqa&emsp; | ")
    assert [(data.name, data.rows, data.context) for data in told["data"]] == [
        ("miniature_vqa", 6, "evaluation"),
        ("miniature_refer", result["benchmarks"]["miniature_refer"]["n"], "evaluation"),
    ]
    more = {f"miniature_{n}": result["benchmarks"]["miniature_vqa"] for n in range(3)}
    track_scores(settings(result["checkpoint"], world, output), tmp_path, {**result, "benchmarks": more}, [], "", 1e9)
    assert told["title"].startswith("mini score miniature_0 and 2 more, ")


def test_the_same_settings_give_the_same_answers(run, checkpoint, world, tmp_path):
    evaluate(settings(checkpoint, world, tmp_path, benchmark=["miniature_vqa", "miniature_refer"]))
    assert predictions(tmp_path) == predictions(run[1])


def test_finished_units_are_not_answered_again(run, checkpoint, world, monkeypatch, tmp_path):
    answered = []
    original = UnitAnswerer.answers
    monkeypatch.setattr(UnitAnswerer, "answers", lambda self, unit: answered.append(unit.file) or original(self, unit))
    evaluate(settings(checkpoint, world, tmp_path))
    units = sorted((tmp_path / "answers").iterdir())
    assert len(units) == len(answered) == 2  # 6 + 4 x 2 questions by 8
    before = predictions(tmp_path)
    units[1].unlink()
    (tmp_path / "answers" / "miniature_vqa-00002-0.tmp").write_text("half a file of a kill")
    answered.clear()
    evaluate(settings(checkpoint, world, tmp_path))
    assert answered == [units[1].name]
    assert predictions(tmp_path) == before
    assert sorted((tmp_path / "answers").iterdir()) == units


def test_another_checkpoint_and_other_settings_are_refused(checkpoint, world, tmp_path):
    evaluate(settings(checkpoint, world, tmp_path, limit=4))
    first, before = set((tmp_path / "answers").iterdir()), predictions(tmp_path)
    other = save_checkpoint(tmp_path / "other", seed=1)
    for changes, difference in (
        ({"checkpoint": str(other)}, "checkpoint was "),
        ({"baselines": False}, "baselines was true, is now false"),
        ({"limit": 3}, r"limit was 4, is now 3; questions\.miniature_vqa was"),
        ({"metric": "released"}, "metric was"),
        ({"benchmark": "miniature_refer"}, r"questions\.miniature_refer was absent"),
    ):
        with pytest.raises(OtherInputsError, match=difference):
            evaluate(settings(**{"checkpoint": checkpoint, "data": world, "output": tmp_path, "limit": 4, **changes}))
        assert predictions(tmp_path) == before
    evaluate(settings(other, world, tmp_path, limit=4, overwrite=True))
    assert not first & set((tmp_path / "answers").iterdir()) and predictions(tmp_path) != before


def test_a_checkpoint_that_was_overwritten_is_another(world, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    evaluate(settings(checkpoint, world, tmp_path / "out", limit=2))
    save_checkpoint(tmp_path / "checkpoint", seed=1)
    with pytest.raises(OtherInputsError, match="checkpoint was "):
        evaluate(settings(checkpoint, world, tmp_path / "out", limit=2))


def test_images_that_appear_later_are_answered_about(checkpoint, tmp_path):
    """A second run of the same command finds what was missing in the first one, and asks nothing else again."""
    (tmp_path / "a.png").write_bytes(make_image(1))
    names = [f"{i}.png" for i in range(8)] + ["a.png"] * 8
    benchmark = own_benchmark(tmp_path, names)
    run = settings(checkpoint, tmp_path, tmp_path / "out")
    assert evaluate(run, [benchmark])["benchmarks"]["own"]["unanswered"] == 8
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(make_image(2))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/answers").iterdir()}
    assert evaluate(run, [benchmark])["benchmarks"]["own"]["unanswered"] == 0
    assert (
        sum(path in kept and path.stat().st_mtime_ns == kept[path] for path in (tmp_path / "out/answers").iterdir())
        == 1
    )


def own_benchmark(folder, names):
    """A benchmark without files, about images that may be missing or broken."""

    def read(data):
        for number, name in enumerate(names):
            image = None if name is None else folder / name
            yield Question(f"q{number}", "what?", image, {"answer": "x"})

    return Benchmark("own", "exact match", read, lambda answer, truth: exact_match(answer, truth["answer"]), 4)


def test_missing_and_broken_pictures_are_counted_and_named(checkpoint, tmp_path):
    (tmp_path / "good.png").write_bytes(make_image(1))
    (tmp_path / "other.png").write_bytes(make_image(2))
    (tmp_path / "broken.png").write_bytes(make_image(1)[:60])
    names = ["good.png", "gone.png", "broken.png", None, "other.png", "gone.png"]
    result = evaluate(settings(checkpoint, tmp_path, tmp_path / "out"), [own_benchmark(tmp_path, names)])
    entry = result["benchmarks"]["own"]
    assert entry["n"] == 6 and entry["unanswered"] == 3
    assert [problem.split(":")[0] for problem in entry["problems"]] == ["q1", "q2", "q5"]
    assert "gone.png cannot be opened" in entry["problems"][0] and "broken.png" in entry["problems"][1]
    lines = predictions(tmp_path / "out")
    assert [bool(line["problem"]) for line in lines] == [False, True, True, False, False, True]
    assert lines[3]["answer"] == lines[3]["blind"] == lines[3]["shuffled"], (
        "a question without a picture stays as it is"
    )
    assert "3 without an answer" in (tmp_path / "out/report.html").read_text()


def test_a_prompt_that_is_too_long_is_counted_too(checkpoint, tmp_path, monkeypatch):
    def read(data):
        yield Question("long", "word " * 400, None, {"answer": "x"})
        yield Question("short", "what?", None, {"answer": "x"})

    benchmark = Benchmark("own", "m", read, lambda answer, truth: 1.0, 4)
    ticks = itertools.count(100.0, 4.0)  # the start, answering, its end, the end
    clock = SimpleNamespace(perf_counter=ticks.__next__, time=lambda: 0.0)
    monkeypatch.setattr("pipelines.evaluation.run.time", clock)
    result = evaluate(settings(checkpoint, tmp_path, tmp_path), [benchmark])
    assert (result["questions_per_second"], result["seconds"]) == (0.5, 12.0)
    again = evaluate(settings(checkpoint, tmp_path, tmp_path), [benchmark])
    assert (again["questions_per_second"], again["benchmarks"]) == (0.0, result["benchmarks"]), "none was answered now"
    entry = result["benchmarks"]["own"]
    assert (entry["unanswered"], entry["value"]) == (1, 50.0)
    assert entry["problems"][0].startswith("long: This model's maximum context length is 256 tokens")


def test_markers_in_a_benchmarks_words_are_text(checkpoint, tmp_path):
    (tmp_path / "good.png").write_bytes(make_image(1))

    def read(data):
        yield Question("meme", "a <ImageHere> and <|endoftext|> b", tmp_path / "good.png", {"answer": "x"})

    benchmark = Benchmark("own", "m", read, lambda answer, truth: 1.0, 4)
    entry = evaluate(settings(checkpoint, tmp_path, tmp_path / "out"), [benchmark])["benchmarks"]["own"]
    assert entry["n"] == 1 and entry["unanswered"] == 0


def test_choices_are_ranked_and_hateful_memes_has_both(checkpoint, tmp_path):
    benchmark_files.aokvqa(tmp_path)
    benchmark_files.hateful_memes(tmp_path)
    result = evaluate(settings(checkpoint, tmp_path, tmp_path / "out", benchmark=["aokvqa", "hateful_memes"]))
    lines = {(line["benchmark"], line["id"]): line for line in predictions(tmp_path / "out")}
    chosen = lines["aokvqa_choice", "easy"]
    assert chosen["answer"] == chosen["choices"][chosen["answer_losses"].index(min(chosen["answer_losses"]))]
    assert lines["aokvqa_direct", "easy"].get("answer_losses") is None
    memes = lines["hateful_memes", "8291"]
    assert len(memes["answer_losses"]) == 2 and memes["answer"] not in ("yes", "no"), "it is generated, and ranked"
    assert result["benchmarks"]["hateful_memes"]["metric"] == "AUROC"


def test_released_scoring_prompts_and_stops_as_the_release_does(checkpoint, tmp_path):
    benchmark_files.vsr(tmp_path)
    official = evaluate(settings(checkpoint, tmp_path, tmp_path / "a", benchmark="vsr"))["benchmarks"]["vsr"]
    released = evaluate(settings(checkpoint, tmp_path, tmp_path / "b", benchmark="vsr", metric="released"))
    assert (official["metric"], released["benchmarks"]["vsr"]["metric"]) == ("exact match", "as released")
    pairs = zip(predictions(tmp_path / "a"), predictions(tmp_path / "b"), strict=True)
    assert any(a["answer"] != b["answer"] for a, b in pairs), "another prompt"


@pytest.mark.parametrize("location", ["folder", "memory://scored-earlier"])
def test_two_runs_are_compared(run, world, tmp_path, location):
    other = save_checkpoint(tmp_path / "other", seed=1)
    if location != "folder":
        storage.upload_folder(run[1], location, "result.json")
    earlier = str(run[1]) if location == "folder" else location
    output = str(tmp_path / "out") if location == "folder" else "memory://scored-later"
    result = evaluate(settings(other, world, output, compare_with=earlier))
    assert storage.exists(f"{output}/comparison.html") and storage.exists(f"{output}/report.html")
    found = result["comparison"]["miniature_vqa"]
    assert found["n"] == 6 and found["difference"] == pytest.approx(found["ours"] - found["theirs"], abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": ""}, "give checkpoint=DIR"),
        ({"checkpoint": "/nowhere"}, "checkpoint=/nowhere is no checkpoint or artifact"),
        ({"benchmark": "nonsense"}, "benchmark 'nonsense' is unknown"),
        ({"data": "/nowhere"}, "task=draw"),
    ],
)
def test_mistakes_are_told_in_a_sentence(checkpoint, world, tmp_path, changes, message):
    with pytest.raises((SettingsError, FileNotFoundError), match=message):
        evaluate(settings(**{"checkpoint": checkpoint, "data": world, "output": tmp_path, **changes}))


def test_a_missing_picture_folder_is_a_mistake_not_500_problems(checkpoint, tmp_path):
    benchmark_files.vsr(tmp_path)
    for path in (tmp_path / "train2017", tmp_path / "val2017"):
        for picture in path.iterdir():
            picture.unlink()
    with pytest.raises(SettingsError, match="none of the first 2 images exists"):
        evaluate(settings(checkpoint, tmp_path, tmp_path / "out", benchmark="vsr"))


def test_files_that_are_not_official_are_named(checkpoint, tmp_path):
    benchmark_files.put(tmp_path / "test.jsonl", '{"image": "a.jpg"}\n')
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl is another's: its entries have no 'caption'"):
        evaluate(settings(checkpoint, tmp_path, tmp_path / "out", benchmark="vsr"))


def test_another_file_than_the_one_that_was_given_is_not_scored(checkpoint, tmp_path):
    benchmark_files.hateful_memes(tmp_path)
    (tmp_path / "train.jsonl").write_bytes((tmp_path / "dev.jsonl").read_bytes())
    told = r"train\.jsonl is not what hateful_memes would read, which is .*/dev\.jsonl: give that, or its folder"
    with pytest.raises(SettingsError, match=told):
        evaluate(settings(checkpoint, tmp_path / "train.jsonl", tmp_path / "out", benchmark="hateful_memes"))


@pytest.mark.parametrize("name", ["predictions.jsonl", "report.html", "result.json", ".jsonl"])
def test_a_full_disk_leaves_nothing_truncated(checkpoint, world, tmp_path, monkeypatch, name):
    """The last name stands for the answers of a unit."""
    run = settings(checkpoint, world, tmp_path, limit=4)
    expected = None if name == ".jsonl" else evaluate(run)
    original = AtomicFile.write

    def write(self, data):
        if str(self.location).endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, data)

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch, pytest.raises(DiskFullError, match="no space left while writing"):
        patch.setattr(AtomicFile, "write", write)
        evaluate(run)
    now = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "fingerprint" not in path.name}
    changed = {path.name for path in now if now[path] != before.get(path)} - {storage.LOCK}
    assert changed <= {"report.html", "predictions.jsonl"} - {name}, "only whole files of the new run"
    again = evaluate(run)["benchmarks"]
    assert again["miniature_vqa"]["n"] and (expected is None or again == expected["benchmarks"])


def test_shuffled_pictures_are_never_ones_own():
    for count in range(2, 30):
        others = _other_images(count, seed=count)
        assert sorted(others) == list(range(count)) and all(other != own for own, other in enumerate(others))
