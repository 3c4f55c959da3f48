"""One's own data: JSON lines, Hugging Face folders, Parquet."""

from __future__ import annotations

import json
import re
import textwrap

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.ingest.check_rows import check_row
from pipelines.data.shard_format import record_batch
from pipelines.data.sources import entries, json_entries, locate
from pipelines.data.sources.base import Malformed, Rejected
from pipelines.settings import PrepareDataSettings, SettingsError
from tests.paths import ROOT
from tests.source_files import encode, jpeg, picture
from tinygptv.data.sample import SampleRow, Turn


def read(source, given, **more):
    settings = PrepareDataSettings(source=source, input=str(given), **more)
    chosen, location = locate(settings)
    found = [found for unit in chosen.reader.plan(location) for found in chosen.reader.read(unit)]
    return [
        entry if isinstance(entry, Rejected) else check_row(entry, web=chosen.web, settings=settings) for entry in found
    ]


def write_lines(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    return tmp_path


def test_every_form_of_a_json_line(folder):
    turns = [{"question": "What?", "answers": ["one", "two", "two"]}]
    talk = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    path = write_lines(
        folder / "own.jsonl",
        [
            {"image": "a.jpg", "turns": turns, "task": "vqa"},
            {"image": "a.jpg", "conversations": talk},
            {"image": "a.jpg", "question": "Q", "answer": "A"},
            {"image": "a.jpg", "caption": "A Caption."},
            {"question": "1+1?", "answer": "2"},
            {
                "image": "a.jpg",
                "turns": [{"question": "", "answers": ["the dog"]}],
                "boxes": [[1, 2, 3, 4]],
                "task": "refer",
            },
        ],
    )
    rows = read("jsonl", path, name="mine")
    assert [row.task for row in rows] == ["vqa", "conversation", "instruct", "caption", "text", "refer"]
    assert {row.source for row in rows} == {"mine"}
    assert rows[0].turns == (Turn("What?", ("one", "two", "two")),)
    assert rows[1].turns == (Turn("What?", ("A dog.",)), Turn("Sure?", ("Yes.",)))
    assert rows[3].turns == (Turn("", ("A Caption.",)),)
    assert [row.image is None for row in rows] == [False, False, False, False, True, False]
    assert rows[5].boxes == ((1.0, 2.0, 3.0, 4.0),)


def test_task_of_rows_that_name_none(folder):
    path = write_lines(folder / "own.jsonl", [{"image": "a.jpg", "caption": "x"}])
    path.write_text('{"image": "a.jpg", "caption": "A \\"Red\\"  star."}\n')
    [row] = read("jsonl", path, task="pair")
    assert (row.task, row.turns[0].answers) == ("pair", ("a red star",)), "cleaned as in the tars of LAION"
    [row] = read("jsonl", path, task="align")
    assert (row.task, row.turns[0].answers) == ("align", ('A "Red"  star.',))
    path.write_text('{"image": "a.jpg", "caption": "x", "task": "align"}\n')
    assert [row.task for row in read("jsonl", path, task="pair")] == ["align"], "a row's own task wins"
    with pytest.raises(SettingsError, match="task='painting' is unknown"):
        read("jsonl", path, task="painting")
    with pytest.raises(SettingsError, match="only for own data"):
        read("coco_vqa", path, task="pair")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken\n", "no valid JSON"),
        ('"text"\n', "no object"),
        ({"image": "a.jpg"}, "no turns, conversations"),
        ({"image": 3, "caption": "x"}, "no path"),
        ({"image": "../a.jpg", "caption": "x"}, "is outside of the image folder"),
        ({"image": "a.jpg", "question": "q", "answers": "not a list"}, "not a list"),
        ({"image": "a.jpg", "turns": [{"question": "q"}]}, "answer"),
        ({"image": "a.jpg", "question": "q", "answer": "a", "boxes": [[1, 2]]}, "box [1, 2] is not x1, y1, x2, y2"),
    ],
)
def test_broken_line_is_set_apart_with_its_number(folder, line, reason):
    good = {"image": "a.jpg", "caption": "x"}
    found = read("jsonl", write_lines(folder / "own.jsonl", [good, "\n", line, good]))
    assert [isinstance(entry, Rejected) for entry in found] == [False, True, False]
    assert found[1].key == "line 3"
    assert reason in found[1].reason


def test_lines_are_cut_into_units_without_loss(folder, monkeypatch):
    monkeypatch.setattr(json_entries.plan_entries, "__kwdefaults__", {"about": None, "entries_per_unit": 4})
    monkeypatch.setattr("pipelines.storage.COPY_BYTES", 10)
    path = write_lines(folder / "own.jsonl", [{"question": f"q{n}", "answer": "a"} for n in range(10)])
    path.write_text(path.read_text().rstrip("\n"))
    source, location = locate(PrepareDataSettings(source="jsonl", input=str(path)))
    units = list(source.reader.plan(location))
    rows = [row for unit in units for row in source.reader.read(unit)]
    assert len(units) == 3
    assert [row.turns[0].question for row in rows] == [f"q{n}" for n in range(10)]
    assert [row.id for row in rows] == [f"own/line {n}" for n in range(1, 11)]


def test_json_file_with_a_list_is_read_too(folder):
    path = folder / "own.json"
    path.write_text(json.dumps([{"image": "a.jpg", "caption": "x"}]))
    assert [row.task for row in read("jsonl", path)] == ["caption"]


def test_hugging_face_folder_with_splits(folder):
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [picture(n) for n in range(5)],
        "question": [f"q{n}" for n in range(5)],
        "answers": [["a", "b"]] * 5,
    }
    features = datasets.Features(
        image=datasets.Image(), question=datasets.Value("string"), answers=datasets.List(datasets.Value("string"))
    )
    saved = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=saved, test=saved.select([0])).save_to_disk(folder / "set")
    (file,) = (folder / "set/train").glob("*.arrow")
    (file.parent / "other.arrow").write_bytes(file.read_bytes())  # its list does not name it
    found = read("hf", folder / "set", task="vqa")
    assert [row.turns[0] for row in found] == [Turn(f"q{n}", ("a", "b")) for n in range(5)]
    assert all(row.image.startswith(b"\x89PNG") for row in found)
    assert len(read("hf", folder / "set/test", task="vqa")) == 1


def test_parquet_in_row_groups_with_bytes_paths_and_nothing(folder):
    cells = [
        {"bytes": jpeg(1), "path": None},
        {"bytes": None, "path": "a.jpg"},
        None,
        {"bytes": b"junk", "path": "x.png"},
    ]
    table = pa.table({"image": cells, "question": ["q"] * 4, "answer": ["a"] * 4})
    pq.write_table(table, folder / "0.parquet", row_group_size=1)
    found = read("parquet", folder, images=str(folder))
    assert [entry.reason if isinstance(entry, Rejected) else entry.task for entry in found] == [
        "instruct",
        "instruct",
        "text",
        "image x.png does not hold an image in a known format",
    ]
    assert (found[0].image, found[1].image) == (jpeg(1), jpeg(0))
    assert "images= names no folder" in read("parquet", folder)[1].reason


def test_canonical_rows_survive_a_round_trip_through_parquet(folder):
    row = SampleRow("x/1", "own", "refer", (Turn("", ("a", "b")),), jpeg(2), 48, 32, ((1.5, 2.0, 3.0, 4.0),))
    pq.write_table(pa.Table.from_batches([record_batch([row])]), folder / "0.parquet")
    found = read("parquet", folder, name="own")[0]
    assert (found.task, found.turns, found.image, found.boxes) == (row.task, row.turns, row.image, row.boxes)


def test_examples_of_the_guide_are_read(folder):
    (folder / "cat.jpg").write_bytes(jpeg(1))
    guide = (ROOT / "docs/how-to-add-a-dataset.md").read_text()
    lines = re.search(r"```json\n(.*?)```", guide, re.DOTALL)[1]
    (folder / "own.jsonl").write_text(lines)
    found = read("jsonl", folder / "own.jsonl", name="own")
    assert [row.task for row in found] == ["vqa", *["instruct"] * 5, "caption", "refer", "refer", "text"]
    code = re.search(r"```python\n(.*?def vizwiz.*?)```", guide, re.DOTALL)[1]
    names = dict(vars(entries))
    exec(textwrap.dedent(code), names)
    draft = next(names["vizwiz"]({"image": "a.jpg", "question": "What?", "answers": [{"answer": "A Cat."}]}, "0"))
    assert (draft.turns, draft.image) == ((Turn("What?", ("A Cat.",)),), "a.jpg")
    assert draft.cleans_questions and draft.cleans_answers


def test_own_data_in_object_storage(folder):
    import fsspec

    write_lines(folder / "own.jsonl", [{"image": "a.jpg", "caption": "x"}, {"question": "q", "answer": "a"}])
    pq.write_table(pa.table({"image": ["a.jpg"], "caption": ["x"]}), folder / "own.parquet")
    fsspec.filesystem("memory").put(f"{folder}/", "/own-data/", recursive=True)
    for source, name in (("jsonl", "own.jsonl"), ("parquet", "own.parquet")):
        rows = read(source, f"memory://own-data/{name}", images="memory://own-data")
        assert rows == read(source, folder / name, images=str(folder))
        assert rows[0].image == jpeg(0)


def test_damaged_tables(folder):
    (folder / "0.parquet").write_bytes(b"PAR1 nothing PAR1")
    pq.write_table(pa.table({"question": ["q"], "answer": ["a"]}), folder / "1.parquet")
    broken, sound = read("parquet", folder)
    assert (broken.key, "no readable Parquet" in broken.reason) == ("", True)
    assert sound.task == "text"
    (folder / "set").mkdir()
    with pytest.raises(SettingsError, match=r"neither .arrow nor .parquet"):
        read("hf", folder / "set")
    (folder / "set/data.arrow").write_bytes(b"junk")
    assert "no readable Parquet or Arrow file" in read("hf", folder / "set")[0].reason


def test_damaged_pages_cost_their_row_group_alone(folder):
    table = pa.table({"question": [f"q{n}" for n in range(2000)], "answer": ["a"] * 2000})
    pq.write_table(table, folder / "0.parquet", row_group_size=1000, use_dictionary=False)
    data = bytearray((folder / "0.parquet").read_bytes())
    data[100:900] = b"\xff" * 800
    (folder / "0.parquet").write_bytes(data)
    found = read("parquet", folder)
    assert isinstance(found[0], Rejected)
    assert [row.turns[0].question for row in found[1:]] == [f"q{n}" for n in range(1000, 2000)]


def test_images_are_named_when_they_are_encoded_otherwise(folder):
    (folder / "b.png").write_bytes(encode(picture(1), "PNG"))
    (folder / "c.jpg").write_bytes(encode(picture(1), "PNG"))
    path = write_lines(folder / "own.jsonl", [{"image": name, "caption": "x"} for name in ("b.png", "c.jpg")])
    found = read("jsonl", path)
    assert found[0].image.startswith(b"\x89PNG")
    assert "wrong extension" in found[1].reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"images": ["a.jpg", "b.jpg"], "caption": "x"}, "images holds 2 images; a sample has one"),
        ({"question": "<image> what?", "answer": "a"}, r"have 1 marks of images \(<image>\), and the row has no image"),
        ({"image": "a.jpg", "question": "<image> <image> what?", "answer": "a"}, "2 marks .* and the row has 1 image"),
        (
            {
                "image": "a.jpg",
                "turns": [{"question": "<image> q", "answer": "a"}, {"question": "<image>", "answer": "b"}],
            },
            "2 marks .* and the row has 1 image",
        ),
        ({"image_url": "http://x/a.jpg", "caption": "x"}, "the row has a link in 'image_url' but no image"),
        ({"picture_name": "a.jpg", "caption": "x"}, "the row has 'picture_name' but no 'image'"),
        ({"image": None, "coco_url": "x", "caption": "x"}, "a link in 'coco_url'"),
        ({"url": "x", "status": "success", "caption": "x"}, "use source=webdataset"),
        ({"image": "a.jpg", "caption": "an <image>"}, "an answer holds the mark of an image"),
    ],
)
def test_a_row_that_asks_about_an_image_it_does_not_have_is_never_text(folder, row, reason):
    (found,) = read("jsonl", write_lines(folder / "own.jsonl", [row]))
    assert isinstance(found, Rejected) and re.search(reason, found.reason)


@pytest.mark.parametrize(
    ("status", "told"), [("failed_to_download", "HTTP 404"), ("failed_to_resize", "HTTP 404"), ("other", "HTTP 404")]
)
def test_rows_that_were_not_downloaded_are_filtered(folder, status, told):
    row = {"url": "x", "status": status, "error_message": told, "caption": "x"}
    (found,) = read("jsonl", write_lines(folder / "own.jsonl", [row]))
    assert (found.filter, found.reason) == ("not_downloaded", f"img2dataset: {told}")


def test_rows_of_a_parquet_file_are_numbered_through_its_units(folder, monkeypatch):
    from pipelines.data.sources import own

    monkeypatch.setattr(own, "ENTRIES_PER_UNIT", 4)
    table = pa.table({"question": [f"q{n}" for n in range(11)], "answer": ["a"] * 11})
    pq.write_table(table, folder / "0.parquet", row_group_size=3)
    source, location = locate(PrepareDataSettings(source="parquet", input=str(folder)))
    units = list(source.reader.plan(location))
    assert [(unit.start, unit.stop, unit.first) for unit in units] == [(0, 2, 0), (2, 4, 6)]
    rows = [row for unit in units for row in source.reader.read(unit)]
    assert [(row.id, row.turns[0].question) for row in rows] == [(f"0/row {n}", f"q{n}") for n in range(11)]


def test_an_empty_list_of_answers_is_no_answer(folder):
    row = {"image": "a.jpg", "question": "q", "answers": [], "answer": "a"}
    path = write_lines(folder / "own.jsonl", [row])
    with pytest.raises(Malformed, match="a question without an answer"):
        read("jsonl", path)
    row["answers"] = None
    assert read("jsonl", write_lines(path, [row]))[0].turns == (Turn("q", ("a",)),)


def test_boxes_and_paths_of_images_in_every_form(folder):
    (folder / "b.jpg").write_bytes(jpeg(1))
    turn = {"question": "", "answers": ["stars"]}
    row = {"turns": [turn], "boxes": [[1, 2, 3, 4], ["5", 6, 7.5, 8]], "task": "refer"}
    images = ["b.jpg", ["b.jpg"], {"path": "b.jpg", "url": "http://x/a.jpg"}, {"bytes": None, "path": "b.jpg"}]
    path = write_lines(folder / "own.jsonl", [{"image": image, **row} for image in images])
    for found in read("jsonl", path):
        assert found.image == jpeg(1) and found.boxes == ((1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.5, 8.0))
