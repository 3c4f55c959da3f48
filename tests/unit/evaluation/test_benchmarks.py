"""Readers of the official files, and the way from answers to numbers."""

from __future__ import annotations

import json

import pytest

from pipelines.evaluation.answers import VIEWS, Answers, ViewAnswer
from pipelines.evaluation.benchmarks import BENCHMARKS, GROUPS, find_benchmarks
from pipelines.evaluation.benchmarks.base import Benchmark, Question, Statistics, each
from pipelines.evaluation.benchmarks.files import DataFolder
from pipelines.evaluation.compare import compare, comparison_table
from pipelines.evaluation.scoring import PREDICTIONS, score_benchmark, score_table, write_predictions
from pipelines.settings import SettingsError
from tests import benchmark_files
from tests.benchmark_files import lines
from tinygptv.metrics.metrics import exact_match
from tinygptv.miniature.writers import write_world


def read_any(name, root, images=None):
    return list(BENCHMARKS[name].read(DataFolder(root, images)))


def read(name, root, images=None):
    questions = read_any(name, root, images)
    assert all(q.image is None or q.image.is_file() for q in questions), [q.image for q in questions]
    assert len({q.id for q in questions}) == len(questions)
    json.dumps([q.truth for q in questions])
    return questions


VQA = "[vqa] Based on the image, respond to this question with a short answer: "


def test_vqav2(tmp_path):
    benchmark_files.vqav2(tmp_path)
    first, second = read("vqav2", tmp_path)
    assert first.instruction == VQA + "what colour 0?" and first.truth == {"answers": ["red"] * 10}
    assert (first.kind, second.kind) == ("other", "yes/no")
    assert BENCHMARKS["vqav2"].score("red", first.truth) == 1.0


def test_vqa_without_answers_names_the_question(tmp_path):
    benchmark_files.vqav2(tmp_path)
    other = {"question_id": 1, "answers": []}
    benchmark_files.put(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": [other]})
    with pytest.raises(ValueError, match="no answers to question 42000"):
        read_any("vqav2", tmp_path)


def test_okvqa_takes_its_own_annotations_where_vqav2s_lie_beside_them(tmp_path):
    benchmark_files.vqav2(tmp_path)
    benchmark_files.okvqa(tmp_path)
    (question,) = read("okvqa", tmp_path)
    assert question.instruction == VQA + "what sport?" and question.truth["answers"] == ["race"] * 10
    assert len(read("vqav2", tmp_path)) == 2


def test_aokvqa_choices_and_direct_answers(tmp_path):
    benchmark_files.aokvqa(tmp_path)
    easy, hard = read("aokvqa_choice", tmp_path)
    assert easy.choices == ("a", "b", "c", "d") and easy.truth == {"answer": "c"}
    assert not BENCHMARKS["aokvqa_choice"].generates
    (direct,) = read("aokvqa_direct", tmp_path)
    assert direct.id == "easy" and hard.id == "hard"
    assert BENCHMARKS["aokvqa_direct"].score("b", direct.truth) == pytest.approx(2 / 3)


def test_vizwiz(tmp_path):
    benchmark_files.vizwiz(tmp_path)
    (question,) = read("vizwiz", tmp_path)
    assert question.instruction.startswith("[vqa] The question is 'Can you tell me what this is?' Based on the image")
    assert BENCHMARKS["vizwiz"].score("Basil.", question.truth) == 1.0


@pytest.mark.parametrize("write", [benchmark_files.gqa, benchmark_files.gqa_as_released])
def test_gqa_official_and_as_the_release_reads_it(tmp_path, write):
    write(tmp_path)
    (question,) = read("gqa", tmp_path)
    assert question.instruction.startswith(VQA + "Is it")
    assert BENCHMARKS["gqa"].score(question.truth["answer"].upper(), question.truth) == 1.0
    assert question.kind == ("verify" if write is benchmark_files.gqa else "")


@pytest.mark.parametrize("write", [benchmark_files.iconqa, benchmark_files.iconqa_as_released])
def test_iconqa(tmp_path, write):
    write(tmp_path)
    (question,) = read("iconqa", tmp_path)
    assert question.truth == {"answer": "two"} and question.choices[:2] == ("one", "two")


def test_vsr_looks_for_pictures_in_both_folders(tmp_path):
    benchmark_files.vsr(tmp_path)
    true, false = read("vsr", tmp_path)
    assert true.instruction.endswith("is this statement true or false? The cat is left of the dog.")
    assert (true.truth["answer"], false.truth["answer"], true.kind) == ("true", "false", "left of")


def test_pope_has_three_files(tmp_path):
    benchmark_files.pope(tmp_path)
    for benchmark in find_benchmarks("pope"):
        questions = read(benchmark.name, tmp_path)
        assert [q.truth["answer"] for q in questions] == ["yes", "no"]


def test_hateful_memes(tmp_path):
    benchmark_files.hateful_memes(tmp_path)
    bad, good = read("hateful_memes", tmp_path)
    assert bad.instruction.startswith("This is an image writting 'words'.") and bad.choices == ("yes", "no")
    assert [repr(question.truth["label"]) for question in (bad, good)] == ["1", "0"], "numbers in the predictions"


def test_refcoco_as_published(tmp_path):
    benchmark_files.refcoco_as_published(tmp_path)
    for name in GROUPS["rec"]:
        data_set, split = name.split("_")
        questions = read(name, tmp_path)
        folder = "refcoco+" if data_set == "refcocop" else data_set
        asked = [f"[refer] give me the location of {folder} {split} {s}" for s in range(len(questions))]
        assert [q.instruction for q in questions] == asked
    (first, second) = read("refcoco_val", tmp_path)
    assert first.truth["box"] == (10.0, 5.0, 30.0, 15.0) and first.truth["width"] == 60
    assert first.truth["img_id"] == second.truth["img_id"]
    assert BENCHMARKS["refcoco_val"].score("{<17><13><50><38>}", first.truth) == 1.0
    assert len(read("refcoco_val", tmp_path / "refcoco")) == 2, "the data set's own folder will do"


def test_refcoco_lists(tmp_path):
    benchmark_files.refcoco_as_lists(tmp_path)
    for name in (*GROUPS["refcoco"], *GROUPS["refcocog"]):
        (question,) = read(name, tmp_path)
        assert question.truth["box"] == (6.0, 4.0, 18.0, 12.0)


def test_miniature(tmp_path):
    write_world(tmp_path, 1, 6, sources=())
    for benchmark in find_benchmarks("miniature"):
        questions = read(benchmark.name, tmp_path)
        assert {"test"} < {q.split for q in questions}
    for question in read_any("miniature_vqa", tmp_path):
        assert BENCHMARKS["miniature_vqa"].score(question.truth["answer"], question.truth) == 1.0
    for question in read_any("miniature_identify", tmp_path):
        assert all(BENCHMARKS["miniature_identify"].score(p, question.truth) for p in question.truth["phrases"])
    for question in read_any("miniature_grounding", tmp_path):
        assert BENCHMARKS["miniature_grounding"].score(question.truth["caption"], question.truth) == 1.0
    talks = json.loads((tmp_path / "benchmarks/conversation.json").read_text())
    for talk, question in zip(talks, read_any("miniature_conversation", tmp_path), strict=True):
        turns = [(turn["question"], turn["answer"]) for turn in talk["turns"]]
        asked = [
            *((t.instruction, t.answer) for t in question.history),
            (question.instruction, question.truth["answer"]),
        ]
        assert asked == turns and len(turns) > 1
    entries = json.loads((tmp_path / "benchmarks/caption.json").read_text())
    for entry, question in zip(entries, read_any("miniature_caption", tmp_path), strict=True):
        assert all(BENCHMARKS["miniature_caption"].score(caption, question.truth) for caption in entry["captions"])


def test_several_benchmarks_share_a_folder(tmp_path):
    benchmark_files.gqa(tmp_path / "gqa")
    benchmark_files.vsr(tmp_path / "vsr")
    benchmark_files.vizwiz(tmp_path / "vizwiz")
    assert [len(read(name, tmp_path)) for name in ("gqa", "vsr", "vizwiz")] == [1, 2, 1]


def test_missing_files_are_named(tmp_path):
    for name in BENCHMARKS:
        with pytest.raises(FileNotFoundError, match=r"\.(json|p)"):
            read_any(name, tmp_path)


def test_damaged_files_are_named(tmp_path):
    benchmark_files.put(tmp_path / "test.jsonl", lines([{"image": "1", "caption": "", "label": 0}]) + "{broken\n")
    with pytest.raises(ValueError, match=r"test\.jsonl, line 2"):
        read_any("vsr", tmp_path / "test.jsonl")


def test_names_and_groups():
    assert [b.name for b in find_benchmarks(["pope", "pope_random"])] == [
        "pope_random",
        "pope_popular",
        "pope_adversarial",
    ]
    assert [b.name for b in find_benchmarks("paper")] == ["gqa", "vsr", "iconqa", "vizwiz", "hateful_memes"]
    with pytest.raises(SettingsError, match="did you mean 'refcoco_val'"):
        find_benchmarks("refcoco_vall")
    for name in ("Paper", "VQAv2", "GQA"):
        with pytest.raises(SettingsError, match=f"benchmark '{name}' is unknown"):
            find_benchmarks(["gqa", name])


# ---------------------------------------------------------------------- from answers to numbers


def question(number, truth, kind="", split="test"):
    return Question(f"q{number}", "what?", None, {"answer": truth}, kind, split)


def row(number, answer, blind=None, shuffled=None, problem="", losses=(), id=""):
    texts = dict(zip(VIEWS, (answer, blind, shuffled), strict=True))
    views = {view: ViewAnswer(text) for view, text in texts.items() if text is not None}
    if losses:
        views["answer"] = ViewAnswer(answer, losses)
    return Answers(id or f"q{number}", problem, views)


EXACT = Benchmark("exact", "exact match", lambda data: iter(()), lambda a, t: exact_match(a, t["answer"]))


def test_parts_baselines_and_problems():
    answered = [
        (question(0, "yes", "existence"), row(0, "yes", "yes", "no")),
        (question(1, "2", "count"), row(1, "3", "2", "1")),
        (question(2, "red", "colour"), row(2, None, problem="picture.jpg cannot be opened")),
        (question(3, "no", "existence", "crowded"), row(3, "no", "no", "no")),
    ]
    found = score_benchmark(EXACT, answered)
    assert found["value"] == pytest.approx(100 / 3, abs=1e-3) and found["n"] == 3, (
        "an unanswered question is a wrong one"
    )
    assert found["blind"] == pytest.approx(200 / 3, abs=1e-3) and found["shuffled"] == 0.0
    assert found["unanswered"] == 1 and found["problems"] == ["q2: picture.jpg cannot be opened"]
    assert found["parts"]["test/existence"]["value"] == 100.0 and found["parts"]["crowded"]["n"] == 1
    assert "test" not in found["parts"]


def test_baselines_that_were_not_asked_for_are_none():
    found = score_benchmark(EXACT, [(question(0, "yes"), row(0, "yes"))])
    assert found["blind"] is None and found["shuffled"] is None


def test_statistics_take_the_place_of_the_mean():
    statistics = Statistics(
        lambda outcome: (float(outcome.answer == "yes"), float(outcome.question.truth["answer"] == "yes")),
        {"precision": lambda t: float((t[:, 0] * t[:, 1]).sum() / max(t[:, 0].sum(), 1)), "n": lambda t: len(t) / 100},
    )
    benchmark = Benchmark("x", "precision", EXACT.read, EXACT.score, statistics=statistics)
    answered = [(question(i, truth), row(i, "yes")) for i, truth in enumerate(["yes", "no", "yes", "yes"])]
    found = score_benchmark(benchmark, answered)
    assert found["value"] == 75.0 and found["also"] == {"n": 4.0}


def test_hateful_memes_is_ranked_by_how_much_likelier_yes_is(tmp_path):
    benchmark_files.hateful_memes(tmp_path)
    bad, good = read_any("hateful_memes", tmp_path)
    right = [
        (bad, row(0, "yes", id=bad.id, losses=(1.0, 2.0))),
        (good, row(1, "yes", id=good.id, losses=(1.5, 2.0))),
    ]
    found = score_benchmark(BENCHMARKS["hateful_memes"], right)
    assert found["value"] == 100.0, "the hateful one is likelier a yes than the other one"
    assert found["also"]["accuracy"] == 50.0
    swapped = [(bad, right[1][1]), (good, right[0][1])]
    assert score_benchmark(BENCHMARKS["hateful_memes"], swapped)["value"] == 0.0
    unanswered = [(bad, row(0, None, problem="gone")), right[1]]
    assert score_benchmark(BENCHMARKS["hateful_memes"], unanswered)["value"] == 0.0


def test_pope_counts_an_unanswered_question_as_wrong(tmp_path):
    benchmark_files.pope(tmp_path)
    there, absent = read_any("pope_random", tmp_path)
    found = score_benchmark(BENCHMARKS["pope_random"], [(there, row(0, "Yes")), (absent, row(1, None, problem="gone"))])
    assert found["also"]["accuracy"] == 50.0 and found["also"]["yes ratio"] == 100.0
    assert found["value"] == pytest.approx(100 * 2 / 3, abs=1e-3)


def test_released_scoring_where_the_release_has_the_benchmark():
    benchmark = Benchmark("x", "m", EXACT.read, EXACT.score, released=each(lambda a, t: float(t["answer"] in a)))
    answered = [(question(0, "no"), row(0, "I know"))]
    official, released = (score_benchmark(benchmark, answered, released=r) for r in (False, True))
    assert (official["value"], released["value"]) == (0.0, 100.0)
    assert (official["scoring"], released["scoring"]) == ("official", "released")
    assert score_benchmark(EXACT, answered, released=True)["scoring"] == "official"


def test_two_runs_are_compared_question_by_question(tmp_path):
    def run(folder, answers):
        answered = {"exact": [(question(i, "yes"), row(i, a)) for i, a in enumerate(answers)]}
        folder.mkdir()
        write_predictions(folder / PREDICTIONS, [EXACT], answered)
        return folder

    ours = run(tmp_path / "ours", ["yes"] * 30 + ["no"] * 10)
    theirs = run(tmp_path / "theirs", ["yes"] * 20 + ["no"] * 20)
    found = compare(ours, theirs)["exact"]
    assert (found["ours"], found["theirs"], found["difference"], found["n"]) == (75.0, 50.0, 25.0, 40)
    assert found["low"] > 0
    assert "*" in comparison_table({"exact": found})
    with pytest.raises(SettingsError, match="no predictions"):
        compare(ours, tmp_path)


def test_the_table_shows_what_is_there():
    found = score_benchmark(
        EXACT, [(question(0, "yes"), row(0, "yes", "no")), (question(1, "a"), row(1, None, problem="x"))]
    )
    table = score_table({"exact": found})
    assert "50.0" in table and "(1 unanswered)" in table and " nan" not in table
