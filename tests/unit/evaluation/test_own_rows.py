"""One's own rows as a benchmark, and two models side by side."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from pipelines.evaluation.benchmarks.files import DataFolder
from pipelines.evaluation.benchmarks.own import _questions, _read, _size, own_benchmark
from pipelines.evaluation.compare import Comparison
from pipelines.evaluation.compare_page import comparison_page
from pipelines.evaluation.run import evaluate
from pipelines.settings import ScoreSettings, SettingsError
from tests.serving_model import make_image, save_checkpoint
from tinygptv.data.prompt_layout import Exchange


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(make_image(number, 40, 30, "JPEG"))
    return folder


def write(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(path, metric="official", images=None):
    data = DataFolder(path, images)
    benchmark = own_benchmark(metric, data)
    return benchmark, list(benchmark.read(data))


def own_rows(path):
    """All questions, whatever they ask for."""
    return list(_read(DataFolder(path)))


REFER = {
    "image": "1.jpg",
    "turns": [{"question": "", "answers": ["the mug"]}],
    "boxes": [[4, 3, 20, 15]],
    "task": "refer",
}


def test_forms_of_rows(folder):
    conversation = [
        {"from": "human", "value": "<image>\nwhat is it?"},
        {"from": "gpt", "value": "a mug"},
        {"from": "human", "value": "which colour?"},
        {"from": "gpt", "value": "red"},
    ]
    path = write(
        folder,
        {"image": "0.jpg", "question": "what colour is the mug?", "answer": "red"},
        {"image": "0.jpg", "question": "how many?", "answers": ["two", "2"], "task": "vqa"},
        {"image": "1.jpg", "conversations": conversation},
        {"image": "2.jpg", "caption": "a mug"},
        {"question": "two and two?", "answer": "four"},
        {**REFER, "task": "identify"},
    )
    benchmark, asked = questions(path)
    assert benchmark.metric == "exact match" and [q.id for q in asked][:4] == ["line 1", "line 2", "line 3", "line 3/1"]
    assert asked[0].instruction == "what colour is the mug?" and asked[0].image == folder / "0.jpg"
    assert asked[1].instruction.startswith("[vqa]") and asked[1].truth == {"answers": ["two", "2"]}
    assert benchmark.score("2", asked[1].truth) == benchmark.score("two", asked[1].truth) == 1, "any of the answers"
    assert asked[3].history[0].answer == "a mug" and asked[3].instruction == "which colour?"
    assert asked[4].instruction == "[caption] Briefly describe this image."
    assert asked[5].image is None and asked[5].kind == "text"
    assert asked[6].instruction == "[identify] what object is in this location {<10><10><50><50>}"
    assert benchmark.score(" RED", asked[0].truth) == 1 and benchmark.score("blue", asked[0].truth) == 0


def test_turns_before_a_question_are_worded_as_they_were_asked(folder):
    turns = [{"question": f"what {n}?", "answers": [f"a{n}"]} for n in range(3)]
    _, asked = questions(write(folder, {"image": "0.jpg", "turns": turns, "task": "vqa"}, name="turns.jsonl"))
    assert [q.id for q in asked] == ["line 1", "line 1/1", "line 1/2"]
    assert [(turn.instruction, turn.answer) for turn in asked[2].history] == [
        (asked[0].instruction, "a0"), (asked[1].instruction, "a1")
    ]  # fmt: skip
    assert asked[0].history == () and asked[0].instruction.startswith("[vqa] Based on")


def test_of_several_answers_and_boxes_the_first_is_said_and_all_are_kept(folder):
    turns = [{"question": f"what {n}?", "answers": [f"a{n}", f"b{n}", "c"]} for n in range(2)]
    boxes = [[4, 3, 20, 15], [8, 9, 30, 28]]
    named = [{"question": "", "answers": ["the mug", "the cup"]}]
    path = write(
        folder,
        {"image": "0.jpg", "turns": turns, "task": "vqa"},
        {"image": "1.jpg", "turns": named, "boxes": boxes, "task": "refer"},
        {"image": "2.jpg", "turns": named, "boxes": boxes, "task": "identify"},
        name="several.jsonl",
    )
    first, second, refer, identify = own_rows(path)
    assert (first.truth, second.truth) == ({"answers": ["a0", "b0", "c"]}, {"answers": ["a1", "b1", "c"]})
    assert second.history == (Exchange(first.instruction, "a0"),) and second.instruction.endswith("what 1?")
    assert refer.truth == {"box": [4, 3, 20, 15], "width": 40, "height": 30, "answers": ["the mug", "the cup"]}
    assert refer.instruction == "[refer] give me the location of the mug"
    assert identify.truth == {"answers": ["the mug", "the cup"]}
    assert identify.instruction == "[identify] what object is in this location {<10><10><50><50>}"
    assert [each.kind for each in (first, second, refer, identify)] == ["vqa", "vqa", "refer", "identify"]
    assert [each.image for each in (second, refer, identify)] == [folder / f"{n}.jpg" for n in range(3)]
    assert [each.id for each in (second, refer, identify)] == ["line 1/1", "line 2", "line 3"]


@pytest.mark.parametrize("task", ["refer", "identify"])
@pytest.mark.parametrize(
    ("box", "told"),
    [
        ([0.1, 0.1, 0.5, 0.5], "in shares"),
        ([4, 3, 2, 2], "turned round"),
        ([20, 20, 50, 60], "reaches out"),
        ([4, 3, 4, 9], "has no area"),
    ],
)
def test_a_box_that_ingest_refuses_is_not_scored_either(folder, task, box, told):
    path = write(folder, {**REFER, "task": task, "boxes": [box]}, name="box.jsonl")
    with pytest.raises(SettingsError, match=rf"box\.jsonl, line 1: box .* {told}"):
        own_rows(path)


def test_an_image_that_cannot_be_opened_is_counted_later_whatever_its_box(folder):
    [question] = own_rows(write(folder, {**REFER, "image": "gone.jpg"}, name="gone.jsonl"))
    assert (question.truth["width"], question.truth["height"]) == (1, 1)


def test_what_macos_leaves_beside_files_is_no_file_of_rows(tmp_path):
    write(tmp_path, {"question": "q", "answer": "a"}, name="a.jsonl")
    (tmp_path / "._a.jsonl").write_bytes(b"\0\5\26\7")
    assert [question.id for question in own_rows(tmp_path)] == ["line 1"]


@pytest.mark.parametrize("task", ["refer", "identify"])
@pytest.mark.parametrize("missing", ["image", "boxes"])
def test_a_task_of_boxes_needs_both_an_image_and_boxes(folder, task, missing):
    row = {key: value for key, value in REFER.items() if key != missing}
    path = write(folder, {"image": "0.jpg", "caption": "a mug"}, {**row, "task": task}, name="needs.jsonl")
    with pytest.raises(SettingsError) as caught:
        own_rows(path)
    assert str(caught.value) == (
        f"needs.jsonl, line 2: task {task!r} needs an image and boxes, as [[x1, y1, x2, y2]] in pixels."
    )


def test_images_may_lie_in_a_folder_of_their_own(folder, tmp_path):
    path = write(tmp_path, {"image": "0.jpg", "question": "what?", "answer": "a"})
    assert questions(path, images=folder)[1][0].image == folder / "0.jpg"
    assert questions(path)[1][0].image == tmp_path / "0.jpg"


@pytest.mark.parametrize(
    ("orientation", "size"),
    [(1, (40, 30)), (3, (40, 30)), (4, (40, 30)), *((turned, (30, 40)) for turned in (5, 6, 7, 8))],
)
def test_the_size_of_an_image_is_that_of_its_upright_form(tmp_path, orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert _size(tmp_path / "a.jpg") == size
    assert _size(tmp_path / "gone.jpg") == (1, 1)


def test_metrics(folder):
    row = {"image": "0.jpg", "question": "how many?", "answers": ["2"]}
    path = write(folder, row, {**row, "answers": ["2"] * 2 + ["3"] * 8})
    exact, asked = questions(path, "exact")
    vqa, _ = questions(path, "vqa")
    assert (exact.score("two", asked[0].truth), vqa.score("two.", asked[0].truth)) == (0, 1)
    assert 0 < vqa.score("two", asked[1].truth) < 1, "ten annotators: the official rule"
    assert vqa.score("two", {"answers": ["2", "2", "3"]}) == pytest.approx(4 / 9), "three annotators are enough for it"
    assert vqa.score("two", {"answers": ["2", "3"]}) == 1, "of two, any may be given"
    iou, boxes = questions(write(folder, REFER, name="boxes.jsonl"))
    assert iou.metric == "IoU > 0.5" and boxes[0].instruction == "[refer] give me the location of the mug"
    assert iou.score("{<10><10><50><50>}", boxes[0].truth) == 1 and iou.score("{<60><60><90><90>}", boxes[0].truth) == 0


@pytest.mark.parametrize(
    ("rows", "metric", "message"),
    [
        (
            [{"image": "0.jpg", "question": "what?"}],
            "exact",
            r"jsonl, line 1: the entry has 'image', 'question', but no 'answer'",
        ),
        ([REFER, {"image": "0.jpg", "question": "a", "answer": "b"}], "iou", "line 2 asks for no box"),
        ([{"image": "0.jpg", "question": "a", "answer": "b"}, REFER], "exact", "line 2 asks for a box"),
        ([{**REFER, "boxes": []}], "iou", "needs an image and boxes"),
        ([{key: value for key, value in REFER.items() if key != "image"}], "iou", "image"),
        ([{"image": "0.jpg", "question": "a", "answer": "b", "task": "x"}], "exact", "task 'x' is unknown"),
        ([{"foo": 1}], "exact", "no turns, conversations"),
        ([{"image": "0.jpg", "question": "a", "answers": []}], "exact", "line 1: a question has no answer"),
        ([{"image": "0.jpg", "question": "a", "answers": ["", " "]}], "vqa", "line 1: a question has no answer"),
        *(
            ([{"image": image, "question": "a", "answer": "b"}], "exact", "in the row; name a file")
            for image in ("data:image/png;base64,AAAA", "iVBORw0KGgo" + "A" * 100)
        ),
    ],
)
def test_mistakes_name_file_and_line(folder, rows, metric, message):
    path = write(folder, *rows)
    with pytest.raises(SettingsError, match=message):
        questions(path, metric)


@pytest.mark.parametrize("name", ["sub\\a b.jpg", "file://{}/sub/a%20b.jpg", "sub/a b.jpg", "./sub/a b.jpg"])
def test_images_are_named_in_every_way_that_ingest_reads(tmp_path, name):
    path = write(tmp_path, {"image": name.replace("{}", str(tmp_path)), "question": "q", "answers": ["", "a", " "]})
    (question,) = own_rows(path)
    assert (question.image, question.truth) == (tmp_path / "sub/a b.jpg", {"answers": ["a"]})


def test_line_breaks_of_windows_are_those_that_training_sees(tmp_path):
    path = write(tmp_path, {"question": "a\r\nb", "answers": ["c\r\nd"]})
    (question,) = own_rows(path)
    assert (question.instruction, question.truth) == ("a\nb", {"answers": ["c\nd"]})


def test_a_name_may_be_written_as_macos_does(tmp_path):
    composed, apart = "caf\u00e9.jpg", "cafe\u0301.jpg"
    for named, there in ((composed, apart), (apart, composed)):
        (tmp_path / there).write_bytes(b"x")
        (question,) = own_rows(write(tmp_path, {"image": named, "question": "q", "answer": "a"}))
        assert question.image == tmp_path / there
        (tmp_path / there).unlink()
    assert own_rows(tmp_path / "rows.jsonl")[0].image == tmp_path / apart, "as it is named, where it is missing"


def test_a_folder_with_no_rows(tmp_path):
    with pytest.raises(SettingsError, match=r"give data=rows\.jsonl"):
        questions(tmp_path)


def test_rows_have_their_images_beside_them_and_may_be_a_list(tmp_path):
    """A JSON list has row numbers, lines have line numbers; every ending of rows is read from a folder."""
    inline = {"image": {"bytes": make_image(0)}, "question": "what?", "answer": "a"}
    with pytest.raises(SettingsError, match=r"^rows\.jsonl, row 7: the image is in the row; name a file\.$"):
        list(_questions(tmp_path / "rows.jsonl", "7", inline, tmp_path))
    (tmp_path / "list.json").write_text(json.dumps([{"question": "a", "answer": "b"}, {"question": "c"}]))
    with pytest.raises(SettingsError, match=r"^list\.json, row [^:]*: the entry has 'question', but no 'answer'"):
        questions(tmp_path / "list.json")
    for name in ("a.ndjson", "b.jsonl"):
        write(tmp_path, {"question": name, "answer": "x"}, name=name)
    (tmp_path / "list.json").write_text(json.dumps([{"question": "list", "answer": "b"}]))
    assert [q.instruction for q in questions(tmp_path)[1]] == ["b.jsonl", "a.ndjson", "list"]


def test_csv_rows(folder):
    path = folder / "rows.csv"
    path.write_text('\ufeffimage,question,answer\n0.jpg,"what, here?","a ""red"" mug"\n1.jpg,what?,blue\n', "utf-8")
    _, asked = questions(path)
    assert [(q.instruction, q.truth["answers"]) for q in asked] == [
        ("what, here?", ['a "red" mug']),
        ("what?", ["blue"]),
    ]


def test_questions_of_several_files_have_ids_of_their_own(tmp_path):
    """Else a comparison would take the last file's first line for that of every file."""
    for name in ("b.jsonl", "a.jsonl", "c.csv"):
        row = "question,answer\nwhat?,a\n" if name == "c.csv" else '{"question": "what?", "answer": "a"}\n'
        (tmp_path / name).write_text(row)
    (tmp_path / "notes.txt").write_text("no rows")
    data = DataFolder(tmp_path)
    assert [q.id for q in own_benchmark("exact", data).read(data)] == [
        "a.jsonl, line 1",
        "b.jsonl, line 1",
        "c.csv, line 2",
    ]
    assert [path.name for path in data.opened[-1].used] == ["a.jsonl", "b.jsonl", "c.csv"]


@pytest.mark.parametrize(
    ("metric", "first", "chosen"),
    [
        ("official", REFER, "IoU > 0.5"), ("released", REFER, "IoU > 0.5"),
        ("official", {"caption": "a"}, "exact match"),
        ("exact", REFER, "exact match"), ("vqa", REFER, "VQA accuracy"), ("iou", {"caption": "a"}, "IoU > 0.5"),
    ],
)  # fmt: skip
def test_a_metric_that_is_given_wins_over_the_first_rows(folder, metric, first, chosen):
    path = write(folder, {"image": "1.jpg", **first}, name="metric.jsonl")
    benchmark = own_benchmark(metric, DataFolder(path))
    assert benchmark.metric == chosen and benchmark.max_new_tokens == (20 if chosen.startswith("IoU") else 64)


def score(checkpoint, path, output, **changes):
    fields = {"num_workers": 0, "threads_per_worker": 1, "tracking_uri": "none", "quiet": True, "baselines": False}
    names = {"checkpoint": str(checkpoint), "benchmark": "own", "data": str(path), "output": str(output)}
    return evaluate(ScoreSettings(**{**fields, **names, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compare_with": "/nowhere"}, r"/nowhere has no predictions\.jsonl"),
        ({"data": ""}, "give data=DIR, .* with benchmark=own the file of rows"),
        ({"benchmark": []}, "give benchmark=NAME"),
    ],
)
def test_mistakes_are_told_before_anything_is_answered(folder, tmp_path, changes, message):
    path = write(folder, {"image": "0.jpg", "question": "what?", "answer": "a"})
    checkpoint = save_checkpoint(tmp_path / "model")
    with pytest.raises(SettingsError, match=message):
        score(checkpoint, path, tmp_path / "out", **changes)
    assert not list((tmp_path / "out").glob("answers/*"))


def test_two_models_side_by_side(folder, tmp_path):
    rows = [{"image": f"{n}.jpg", "question": "what?", "answer": "a"} for n in range(3)]
    path = write(folder, *rows)
    checkpoint = save_checkpoint(tmp_path / "model")
    first = score(checkpoint, path, tmp_path / "before")
    assert first["benchmarks"]["own"]["n"] == 3 and first["benchmarks"]["own"]["files"][0]["path"] == str(path)
    again = score(checkpoint, path, tmp_path / "after", compare_with=str(tmp_path / "before"))
    assert again["comparison"]["own"]["difference"] == 0 and again["comparison"]["own"]["p"] == 1
    page = (tmp_path / "after/comparison.html").read_text()
    assert "Before and after" in page and page.count("data:image/jpeg") == 3


def test_the_page_groups_answers_by_what_changed(folder):
    def line(n, value, answer):
        truth = {"box": [4, 3, 20, 15], "width": 40, "height": 30, "answers": ["x"]}
        return {"benchmark": "own", "id": str(n), "image": str(folder / "1.jpg"), "score": value, "answer": answer,
                "instruction": "<b>", "truth": truth, "split": "test", "history": [], "choices": []}  # fmt: skip

    before = [line(0, 0.0, "{<60><60><90><90>}"), line(1, 1.0, "y"), line(2, 1.0, "z")]
    after = [line(0, 1.0, "{<10><10><50><50>}"), line(1, 0.0, "y"), line(2, 1.0, "z")]
    numbers = Comparison(ours=66.7, theirs=66.7, difference=0, low=-60, high=60, p=1.0, better=1, worse=1, n=3)
    page = comparison_page({"own": numbers}, after, before, ("new", "old <&>"), 5)
    assert "Better after: 1" in page and "Worse after: 1" in page and "The same score: 1" in page
    assert page.index('class="right"') < page.index('class="wrong"') < page.index('class="same"')
    assert "<b>" not in page.replace("<b>66.7</b>", "") and "old &lt;&amp;&gt;" in page


def test_metric_of_own_rows_needs_them(folder, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "model")
    with pytest.raises(SettingsError, match="metric=iou is for one's own rows"):
        score(checkpoint, folder, tmp_path / "out", benchmark="gqa", metric="iou")
    with pytest.raises(SettingsError, match="benchmark=own is scored alone"):
        score(checkpoint, folder, tmp_path / "out", benchmark=["own", "gqa"])
