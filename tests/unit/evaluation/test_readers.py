"""Every benchmark by value: what its reader gives, where its images are looked for, and how an answer is scored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from pipelines.evaluation.benchmarks import BENCHMARKS, GROUPS, files, miniature
from pipelines.evaluation.benchmarks.base import Outcome, Question
from pipelines.evaluation.benchmarks.files import COCO_FOLDERS, DataFolder, Images
from pipelines.settings import SettingsError
from tests import benchmark_files

VAL2014 = "COCO_val2014_{0} {0} COCO_train2014_{0}"
TRAIN2014 = "COCO_train2014_{0} {0} COCO_val2014_{0}"
NUMBER = "{0} COCO_val2014_{0} COCO_train2014_{0}"
DOG, STREET = VAL2014.format("000000000042.jpg"), TRAIN2014.format("000000581857.jpg")
KITCHEN = NUMBER.format("000000461751.jpg")
REFER = ("train2014", *COCO_FOLDERS)
BOX = {"img_id": "COCO_train2014_000000581857_2", "box": (20.0, 5.0, 40.0, 15.0), "width": 60, "height": 40}
LISTED = {"img_id": "COCO_train2014_000000581857_16", "box": (6.0, 4.0, 18.0, 12.0), "width": 60, "height": 40}
ICON = ("iconqa/val/choose_txt", "val/choose_txt", "choose_txt", "iconvqa_images", "iconqa_images")
GQA = ("gqa/images", "gqa_images", "images", "allImages/images")
VSR = ("train2017", "val2017", "trainval2017", "vsr_images", "images", *COCO_FOLDERS)


@pytest.mark.parametrize(
    ("write", "name", "key", "kind", "truth", "image", "folders"),
    [
        ("vqav2", "vqav2", "42001", "yes/no", {"answers": ["red"] * 10}, DOG, COCO_FOLDERS),
        (
            "vqav2_as_lavis_has_it", "vqav2", "42001", "", {"answers": ["red"] * 9 + ["blue"]},
            DOG, COCO_FOLDERS,
        ),
        ("okvqa", "okvqa", "71", "other", {"answers": ["race"] * 10}, VAL2014.format("000000000007.jpg"), COCO_FOLDERS),
        (
            "aokvqa", "aokvqa_choice", "hard", "", {"answer": "c"},
            KITCHEN, ("val2017", *COCO_FOLDERS),
        ),
        (
            "aokvqa", "aokvqa_direct", "easy", "", {"answers": ["c"] * 8 + ["b"] * 2},
            KITCHEN, ("val2017", *COCO_FOLDERS),
        ),
        (
            "vizwiz", "vizwiz", "0-VizWiz_val_00000000.jpg", "other", {"answers": ["basil"] * 10},
            "VizWiz_val_00000000.jpg", ("val", "vizwiz_images", "images"),
        ),
        ("gqa", "gqa", "201307251", "verify", {"answer": "no"}, "n161313.jpg", GQA),
        ("gqa_as_released", "gqa", "0", "", {"answer": "yes"}, "n1.jpg", GQA),
        ("iconqa", "iconqa", "10001", "", {"answer": "two"}, "10001/image.png", ICON),
        ("iconqa_as_released", "iconqa", "10001", "", {"answer": "two"}, "10001/image.png", ICON),
        ("vsr", "vsr", "1", "under", {"answer": "false"}, NUMBER.format("000000000002.jpg"), VSR),
        ("pope", "pope_popular", "1", "", {"answer": "no"}, DOG, COCO_FOLDERS),
        (
            "hateful_memes", "hateful_memes", "46971", "", {"label": 0},
            "img/46971.png 46971.png", ("hm_images", "img", "images"),
        ),
        ("refcoco_as_published", "refcoco_testA", "20", "", BOX, STREET, REFER),
        ("refcoco_as_published", "refcocop_testA", "20", "", BOX, STREET, REFER),
        ("refcoco_as_published", "refcocog_test", "20", "", BOX, STREET, REFER),
        (
            "refcoco_as_lists", "refcoco_val", "0-COCO_train2014_000000581857_16", "", LISTED,
            STREET, REFER,
        ),
    ],
)  # fmt: skip
def test_the_last_question_of_a_benchmark(tmp_path, monkeypatch, write, name, key, kind, truth, image, folders):
    looked = []
    monkeypatch.setattr(files.Images, "find", lambda self, *names: Path(" ".join(names)))
    monkeypatch.setattr(
        files.BenchmarkFiles, "_image_folders", lambda self, wanted: looked.append(wanted) or [tmp_path]
    )
    getattr(benchmark_files, write)(tmp_path)
    *_, found = BENCHMARKS[name].read(DataFolder(tmp_path))
    assert (found.id, found.kind, found.split, found.history) == (key, kind, "test", ())
    assert (found.truth, str(found.image), looked) == (truth, image, [folders])


CAT = {"caption": "<p>cat</p> {<0><0><50><99>}", "width": 10, "height": 1000}
YES_NO = {"answer": "yes"}
FULL = {"box": (0.0, 0.0, 50.0, 100.0), "width": 100, "height": 100, "img_id": "i"}


@pytest.mark.parametrize(
    ("name", "answer", "truth", "official", "released"),
    [
        ("vqav2", "Red.", {"answers": ["red"] * 9 + ["blue"]}, 1.0, None),
        ("vqav2", "Red.", {"answers": ["red"] * 10}, 0.0, None),  # normalised only where annotators differ
        ("vqav2", "blue", {"answers": ["red"] * 10}, 0.0, None),
        ("okvqa", "race###more", {"answers": ["race"] * 10}, 0.0, 1.0),
        ("aokvqa_direct", "c", {"answers": ["c"] * 2 + ["b"] * 8}, 2 / 3, None),
        ("aokvqa_choice", "b", {"answer": "b"}, 1.0, None),
        ("aokvqa_choice", "c", {"answer": "b"}, 0.0, None),
        ("iconqa", "two", {"answer": "two"}, 1.0, None),
        ("vizwiz", "", {"answers": ["basil"] * 10}, 0.0, 1.0),
        ("gqa", "no, not", {"answer": "no"}, 0.0, 1.0),
        ("gqa", "No", {"answer": "no"}, 1.0, 1.0),
        ("vsr", "it is true", {"answer": "true"}, 0.0, 1.0),
        ("vsr", "True", {"answer": "true"}, 1.0, 1.0),
        ("pope_random", "Yes, there is.", YES_NO, 1.0, None),
        ("pope_random", "No, there is none.", YES_NO, 0.0, None),
        ("hateful_memes", "yes", {"label": 1}, 1.0, 1.0),
        ("hateful_memes", "no", {"label": 1}, 0.0, 0.0),
        ("hateful_memes", "no", {"label": 0}, 1.0, 1.0),
        ("refcoco_val", "{<0><0><49><99>}", FULL, 1.0, 1.0),
        ("refcoco_val", "{<0><0><20><99>}", FULL, 0.0, 0.0),
        ("miniature_refer", "{<0><0><49><99>}", FULL, 1.0, None),
        ("miniature_conversation", "red", {"answer": "red"}, 1.0, None),
        ("miniature_vqa", "blue", {"answer": "red"}, 0.0, None),
        ("miniature_grounding", "<p>the cat</p> {<0><0><24><99>}", CAT, 1.0, None),  # 3.4 of 6 pixels across
        ("miniature_grounding", "<p>an cat</p> {<0><0><24><99>} <p>dog</p> {<0><0><9><9>}", CAT, 2 / 3, None),
        ("miniature_grounding", "<p>dog</p> {<0><0><50><99>}", CAT, 0.0, None),
    ],
)
def test_an_answer_is_scored_by_the_official_rule_and_as_the_release_does(name, answer, truth, official, released):
    benchmark = BENCHMARKS[name]
    assert benchmark.score(answer, truth) == pytest.approx(official)
    if released is None:
        assert benchmark.released is None
    else:
        assert benchmark.released([Outcome(Question("q", "", None, truth), answer)]) == [released]


def test_metrics_and_lengths_of_answers():
    """Ten words fit into 20 tokens; the miniature's phrases, captions and grounded captions are longer."""
    assert {name: b.max_new_tokens for name, b in BENCHMARKS.items() if b.max_new_tokens != 20} == {
        "miniature_vqa": 8,
        "miniature_identify": 24,
        "miniature_caption": 64,
        "miniature_grounding": 128,
        "miniature_conversation": 24,
    }
    assert [name for name, benchmark in BENCHMARKS.items() if not benchmark.generates] == ["aokvqa_choice", "iconqa"]
    for benchmark in BENCHMARKS.values():
        if benchmark.statistics:
            assert benchmark.metric == next(iter(benchmark.statistics.values)), benchmark.name
    metrics = {"vqav2": "VQA accuracy", "okvqa": "VQA accuracy", "vizwiz": "VizWiz accuracy", "gqa": "exact match"}
    metrics |= {"aokvqa_direct": "direct answer accuracy", "aokvqa_choice": "accuracy", "vsr": "exact match"}
    assert {name: BENCHMARKS[name].metric for name in metrics} == metrics


@pytest.mark.parametrize(
    ("name", "truth", "answer", "problem", "row"),
    [
        ("pope_random", YES_NO, "Yes", "", (1.0, 1.0)),
        ("pope_random", {"answer": "no"}, "Yes", "", (1.0, 0.0)),
        ("pope_random", {"answer": "no"}, "", "gone", (1.0, 0.0)),
        ("pope_random", YES_NO, "Yes", "gone", (0.0, 1.0)),
        ("hateful_memes", {"label": 1}, "yes", "", (0.75, 1, 1.0)),
        ("hateful_memes", {"label": 0}, "yes", "", (0.75, 0, 0.0)),
        ("hateful_memes", {"label": 1}, "yes", "gone", (-float("inf"), 1, 0.0)),
        ("hateful_memes", {"label": 0}, "no", "gone", (float("inf"), 0, 0.0)),
        ("refcoco_val", FULL, "{<0><0><24><99>}", "", (0.5,)),
        ("refcoco_val", FULL, "{<0><0><49><99>}", "gone", (0.0,)),
    ],
)
def test_the_numbers_of_an_outcome_and_those_of_one_without_an_answer(name, truth, answer, problem, row):
    outcome = Outcome(Question("q", "", None, truth), answer, (1.25, 2.0), problem)
    assert BENCHMARKS[name].statistics.columns(outcome) == pytest.approx(row, abs=0.02)


def test_each_number_beside_a_benchmarks_value_is_what_its_name_says():
    """Of ten POPE questions three yes are found, one is said too often, and two are missed."""
    counted = [(1, 1)] * 3 + [(1, 0)] + [(0, 1)] * 2 + [(0, 0)] * 4
    pope = BENCHMARKS["pope_random"].statistics.values
    assert {name: round(value(np.array(counted, dtype=float)), 4) for name, value in pope.items()} == {
        "F1": 0.6667, "accuracy": 0.7, "precision": 0.75, "recall": 0.6, "yes ratio": 0.4,
    }  # fmt: skip
    memes = np.array([(0.5, 1, 1.0), (2.0, 1, 1.0), (1.0, 0, 0.0), (-1.0, 0, 1.0), (1.5, 0, 0.0)])
    hateful = BENCHMARKS["hateful_memes"].statistics.values
    found = {name: round(value(memes), 4) for name, value in hateful.items()}
    assert found == {"AUROC": 0.6667, "accuracy": 0.6}, "four of the six pairs are in order"


@pytest.mark.parametrize("place", ["data/splits/zeroshot/test.jsonl", "deep/er/vsr_zeroshot/test.jsonl"])
def test_vsr_is_its_zeroshot_split_wherever_that_lies(tmp_path, place):
    """Other lists of the same name may lie nearer; those of the random split never count."""
    entry = {"image": "000000000001.jpg", "label": 1}
    for name, said in ((place, "zeroshot"), ("near/test.jsonl", "another"), ("random/test.jsonl", "random")):
        benchmark_files.put(tmp_path / name, benchmark_files.lines([{**entry, "caption": said}]))
    (found,) = BENCHMARKS["vsr"].read(DataFolder(tmp_path))
    assert found.instruction.endswith("zeroshot") and (found.truth, found.kind) == ({"answer": "true"}, "")
    (tmp_path / place).unlink()
    assert [q.instruction.split()[-1] for q in BENCHMARKS["vsr"].read(DataFolder(tmp_path))] == ["another"]


def test_the_official_pair_of_files_comes_before_a_list_of_both(tmp_path):
    benchmark_files.vqav2_as_lavis_has_it(tmp_path)
    assert [q.kind for q in BENCHMARKS["vqav2"].read(DataFolder(tmp_path))] == ["", ""]
    benchmark_files.vqav2(tmp_path)
    assert [q.kind for q in BENCHMARKS["vqav2"].read(DataFolder(tmp_path))] == ["other", "yes/no"]


@pytest.mark.parametrize(
    ("name", "file", "entry"),
    [
        ("vizwiz", "val.json", {"image": "a.jpg", "question": "what?", "answers": [{"answer": "x"}]}),
        ("gqa", "testdev_balanced_questions.json", {"image": "a.jpg", "question": "what?", "answer": "x"}),
        (
            "aokvqa_direct",
            "aokvqa_v1p0_val.json",
            {"question_id": "q", "image_id": 3, "question": "what?", "choices": ["x"], "correct_choice_idx": 0,
             "direct_answers": ["x"]},
        ),
        ("pope_random", "coco_pope_random.json", {"question_id": 1, "image": "3.jpg", "text": "what?", "label": "no"}),
        ("hateful_memes", "dev.jsonl", {"id": 1, "img": "3.png", "label": 1, "text": "what?"}),
        ("refcoco_val", "refcoco_val.json", {"img_id": "a_b_3", "sents": "what?", "bbox": [1, 2, 3, 4], "width": 5,
                                             "height": 6}),
    ],
)  # fmt: skip
def test_a_file_counts_only_where_its_entries_have_every_field(tmp_path, name, file, entry):
    """One of the same name without one of them lies nearer, and is left alone."""
    in_lines = file.endswith(".jsonl") or name.startswith("pope")
    needed = set(entry) - ({"width", "height", "image_id", "image"} if name not in ("vizwiz", "pope_random") else set())

    def put(place, fields):
        content = benchmark_files.lines([fields]) if in_lines else [fields]
        benchmark_files.put(tmp_path / place / file, content)

    put("some/where/deep", entry)
    for missing in sorted(needed):
        put(".", {key: value for key, value in entry.items() if key != missing})
        (found,) = BENCHMARKS[name].read(DataFolder(tmp_path))
        assert "what?" in found.instruction, missing


def test_every_question_of_a_pair_of_files_has_its_own_image_and_answers(tmp_path):
    asked = [{"image_id": 30 + n, "question": f"what {n}?", "question_id": 500 - n} for n in range(3)]
    given = [
        {"question_id": 500 - n, "answers": [{"answer": f"a{n}"}, {"answer": f"b{n}"}]} for n in (1, 2, 0)
    ]  # in another order
    benchmark_files.put(tmp_path / "OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    benchmark_files.put(tmp_path / "mscoco_val2014_annotations.json", {"annotations": given})
    found = list(BENCHMARKS["okvqa"].read(DataFolder(tmp_path)))
    assert [(q.id, q.instruction[-7:], q.image.name, q.truth, q.kind) for q in found] == [
        (str(500 - n), f"what {n}?", f"COCO_val2014_{30 + n:012d}.jpg", {"answers": [f"a{n}", f"b{n}"]}, "")
        for n in range(3)
    ]


def test_groups_hold_what_they_say():
    assert {name: len(names) for name, names in GROUPS.items()} == {
        "paper": 5, "pope": 3, "refcoco": 3, "refcocop": 3, "refcocog": 2, "rec": 8, "miniature": 6, "aokvqa": 2,
    }  # fmt: skip
    assert all(name in BENCHMARKS for names in GROUPS.values() for name in names)


def test_the_first_name_wins_over_the_first_folder_and_a_folder_is_no_image(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one / "b.jpg", two / "a.jpg", two / "c.jpg"):
        benchmark_files.put(path, b"x")
    (one / "c.jpg").mkdir()
    images = Images([one, two])
    assert images.find("a.jpg", "b.jpg") == two / "a.jpg"
    assert images.find("c.jpg") == two / "c.jpg"
    assert images.find("none.jpg", "other.jpg") == one / "none.jpg", "the first folder stays the one that is named"
    benchmark_files.put(one / "a.jpg", b"x")
    assert images.find("a.jpg") == two / "a.jpg", "where the last one was"


RED = {"shape": "circle", "colour": "red", "size": "large", "texture": "plain", "box": [0.1, 0.1, 0.3, 0.3]}
SCENE = [{**RED, "rgb": [255, 0, 0], "angle": 0.0}]
TWO = [*SCENE, {**SCENE[0], "size": "small", "box": [0.6, 0.6, 0.7, 0.7]}]


@pytest.mark.parametrize(
    ("name", "answer", "score"),
    [
        ("miniature_identify", "the red circle", 1.0),
        ("miniature_identify", "the blue circle", 0.0),
        ("miniature_identify", "nothing that means anything", 0.0),
        ("miniature_caption", "a red circle", 1.0),
        ("miniature_caption", "a blue circle", 0.0),
        ("miniature_caption", "xyzzy", 0.0),
        ("miniature_caption", "", 0.0),
    ],
)
def test_answers_about_a_drawn_scene_are_checked_against_it(name, answer, score):
    truth = {"objects": SCENE, "index": 0, "phrases": ["the red circle"]}
    assert BENCHMARKS[name].score(answer, truth) == score


@pytest.mark.parametrize(
    ("answer", "index", "score"),
    [("the red circle", 0, 0.0), ("the large red circle", 0, 1.0), ("the large red circle", 1, 0.0)],
)
def test_a_phrase_that_means_several_objects_identifies_none(answer, index, score):
    truth = {"objects": TWO, "index": index, "phrases": []}
    assert BENCHMARKS["miniature_identify"].score(answer, truth) == score


@pytest.mark.parametrize(
    ("name", "alike"),
    [
        *((name, True) for name in ("images", "COCO_Images", "image", "hm-img", "imgs", "my pictures", "train_image")),
        *((name, False) for name in ("annotations", "image_lists", "val2014", "imgs2")),
    ],
)
def test_folders_of_images_are_known_by_the_end_of_their_names(name, alike):
    assert (files._alike([Path("/d") / name]) != []) == alike


def test_the_last_turn_of_a_conversation_is_asked_after_the_others():
    turns = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(3)]
    found = miniature._conversation({"turns": turns})
    assert (found.instruction, found.truth) == ("q2", {"answer": "a2"})
    assert [(turn.instruction, turn.answer) for turn in found.history] == [("q0", "a0"), ("q1", "a1")]
    assert miniature._conversation({"turns": turns[:1]}).history == ()


@pytest.mark.parametrize("article", ["a", "an", "the"])
def test_phrases_of_boxes_compare_without_their_article(article):
    assert miniature._singular(f"<p>{article} cat</p> by <p>{article} mat</p>") == "<p>cat</p> by <p>mat</p>"
    assert miniature._singular("<p>antenna</p> a cat") == "<p>antenna</p> a cat"


def test_an_entry_of_the_drawn_world_keeps_its_split_kind_and_place(tmp_path):
    entries = [
        {"image": "a.png", "question": "q0", "answer": "a0", "split": "test", "kind": "count"},
        {"image": "b.png", "question": "q1", "answer": "a1", "split": "crowded"},
    ]
    benchmark_files.put(tmp_path / "benchmarks/vqa.json", entries)
    found = list(BENCHMARKS["miniature_vqa"].read(DataFolder(tmp_path)))
    folder = tmp_path / "benchmarks/images"
    assert [(q.id, q.image, q.split, q.kind, q.truth) for q in found] == [
        ("vqa-0", folder / "a.png", "test", "count", {"answer": "a0"}),
        ("vqa-1", folder / "b.png", "crowded", "", {"answer": "a1"}),
    ]
    assert (
        found[0].instruction.endswith("q0")
        and len(list(BENCHMARKS["miniature_vqa"].read(DataFolder(tmp_path / "benchmarks")))) == 2
    )
    with pytest.raises(
        FileNotFoundError, match=r"refer\.json is missing: draw the world with jobs/miniature\.py task=draw"
    ):
        list(BENCHMARKS["miniature_refer"].read(DataFolder(tmp_path)))


def test_the_fields_of_a_file_are_looked_for_in_its_first_64_kib(tmp_path):
    filler = "x" * (1 << 15)
    early = benchmark_files.put(tmp_path / "a.json", [{"filler": filler, "wanted": 1}])
    late = benchmark_files.put(tmp_path / "b.json", [{"filler": filler * 2, "wanted": 1}])
    assert (files._lacking(early, ("wanted",)), files._lacking(late, ("filler", "wanted"))) == ("", "wanted")
    assert files._lacking(late, ()) == files._lacking(tmp_path / "gone.p", ("wanted",)) == ""
    words = benchmark_files.put(tmp_path / "c.json", [{"caption": "wanted: a label"}])
    assert files._lacking(words, ("caption", "wanted")) == "wanted", "a word of a text is no field"


def test_blank_lines_are_no_entries_and_count_as_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"a": 1}\n\n  \n{"b": "\u2028"}\n', "utf-8")
    assert list(files.read_lines(path)) == [{"a": 1}, {"b": "\u2028"}]
    for entries in ('\n[{"a": 1},\n {"b": 2}]', '[{"a": 1}, {"b": 2}]\n'):
        path.write_text(entries)
        assert list(files.read_lines(path)) == [{"a": 1}, {"b": 2}], "somebody made a list of them"
    path.write_text('{"a": 1}\n\n{"b"\n')
    with pytest.raises(ValueError, match=rf"^{path}, line 3, is no valid JSON: .*\.$"):
        list(files.read_lines(path))


@pytest.mark.parametrize(
    ("write", "name", "file", "field", "value", "told"),
    [
        (
            benchmark_files.vqav2_as_lavis_has_it,
            "vqav2",
            "vqa_val.json",
            "answer",
            "red",
            "'red' is no list of answers",
        ),
        (
            benchmark_files.vqav2_as_lavis_has_it,
            "vqav2",
            "vqa_val.json",
            "answer",
            ["red", 3],
            "'3' is no text but int",
        ),
        (
            benchmark_files.aokvqa,
            "aokvqa_direct",
            "aokvqa_v1p0_val.json",
            "direct_answers",
            "['a']",
            "no list of texts",
        ),
        (
            benchmark_files.aokvqa,
            "aokvqa_choice",
            "aokvqa_v1p0_val.json",
            "choices",
            "abcd",
            "no list of texts but str",
        ),
        (benchmark_files.gqa_as_released, "gqa", "testdev_balanced_questions.json", "answer", None, "no text but None"),
    ],
)
def test_a_text_is_no_list_of_answers(tmp_path, write, name, file, field, value, told):
    """Its letters would pass for the answers."""
    write(tmp_path)
    (path,) = tmp_path.rglob(file)
    entries = json.loads(path.read_text())
    path.write_text(json.dumps([{**entry, field: value} for entry in entries]))
    with pytest.raises(TypeError, match=re.escape(told)):
        list(BENCHMARKS[name].read(DataFolder(tmp_path)))


def test_a_damaged_pickle_is_told_with_its_name(tmp_path):
    benchmark_files.refcoco_as_published(tmp_path)
    path = tmp_path / "refcoco/refs(unc).p"
    for content, told in ((b"junk", "not a readable pickle"), (b"cos\nsystem\n(S'ls'\ntR.", "os.system")):
        path.write_bytes(content)
        with pytest.raises(SettingsError, match=rf"refs\(unc\)\.p cannot be used: .*{told}"):
            list(BENCHMARKS["refcoco_val"].read(DataFolder(tmp_path)))


def rewritten(folder, write, old, new):
    """Official files with other values in them."""
    getattr(benchmark_files, write)(folder)
    for path in (path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl")):
        path.write_text(path.read_text().replace(old, new))
    return DataFolder(folder)


LISTED_BOX, TENS = "6.0, 4.0, 12.0, 8.0", json.dumps(["red"] * 9 + ["blue"])


@pytest.mark.parametrize(
    ("name", "write", "old", "new", "told"),
    [
        ("pope_random", "pope", '"no"', '"unknown"', "'unknown' is neither yes nor no"),
        ("hateful_memes", "hateful_memes", '"label": 0', '"label": 2', "'2' is neither 0 nor 1"),
        ("hateful_memes", "hateful_memes", '"label": 0', '"label": null', "'None' is neither 0 nor 1"),
        ("vsr", "vsr", '"label": 0', '"label": -1', "'-1' is neither 0 nor 1"),
        ("aokvqa_choice", "aokvqa", 'idx": 2', 'idx": -1', "-1 is no place among 4 choices"),
        ("iconqa", "iconqa_as_released", '"answer": 1', '"answer": -1', "-1 is no place among 2 choices"),
        ("iconqa", "iconqa_as_released", '"answer": 1', '"answer": 2', "2 is no place among 2 choices"),
        ("aokvqa_direct", "aokvqa_as_lavis_has_it", json.dumps(["c"] * 10), "[]", "is it a test set"),
        ("vqav2", "vqav2_as_lavis_has_it", TENS, "[]", "is it a test set"),
        ("vqav2", "vqav2_as_lavis_has_it", TENS, '"red"', "'red' is no list of answers but str"),
        ("refcoco_val", "refcoco_as_lists", LISTED_BOX, "50, 30, 59, 39", "reaches out of the image of 60 x 40"),
        ("refcoco_val", "refcoco_as_lists", LISTED_BOX, "0.1, 0.1, 0.2, 0.2", "in shares of the image"),
        ("refcoco_val", "refcoco_as_published", "[10.0, 5.0", "[50.0, 5.0", "reaches out of the image of 60 x 40"),
    ],
)
def test_a_truth_that_is_none_is_refused_and_not_scored(tmp_path, name, write, old, new, told):
    data = rewritten(tmp_path, write, old, new)
    with pytest.raises((ValueError, TypeError), match=told):
        list(BENCHMARKS[name].read(data))


@pytest.mark.parametrize(
    ("name", "write", "old", "new", "truth"),
    [
        ("pope_random", "pope", '"no"', '"No "', {"answer": "no"}),
        ("hateful_memes", "hateful_memes", '"label": 0', '"label": "1"', {"label": 1}),
        ("vsr", "vsr", '"label": 0', '"label": true', {"answer": "true"}),
        ("aokvqa_direct", "aokvqa", ": false", ': "False"', {"answers": ["c"] * 8 + ["b"] * 2}),
        ("vizwiz", "vizwiz", '{"answer_confidence": "yes", "answer": "basil"}', '"b"', {"answers": ["b"] * 10}),
        ("refcoco_val", "refcoco_as_lists", LISTED_BOX, '"6", "4", "12", "8"', LISTED),
    ],
)
def test_other_spellings_of_a_truth(tmp_path, name, write, old, new, truth):
    *_, found = BENCHMARKS[name].read(rewritten(tmp_path, write, old, new))
    assert found.truth == truth
