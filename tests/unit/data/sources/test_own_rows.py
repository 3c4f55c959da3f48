"""A row of one's own data, field by field; tables of rows, unit by unit."""

from __future__ import annotations

import errno
import io
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.data.sources import SOURCES, own, questions, referring, table_files
from pipelines.data.sources.base import Filtered, Malformed, Rejected, SourceInput, SourceUnit
from pipelines.data.sources.json_entries import JsonForm
from pipelines.data.sources.json_rows import id_of
from pipelines.data.sources.own_rows import own_draft, read_own_row
from pipelines.settings import SettingsError
from pipelines.storage import Location
from tests.source_files import encode, jpeg, picture
from tinygptv.data.sample import Turn


def refused(kind, call, *arguments, **more):
    with pytest.raises(kind) as caught:
        call(*arguments, **more)
    return str(caught.value)


NO_FIELDS = (
    "no turns, conversations, messages, conversation, texts, question, query, instruction, caption, text or description"
)
QA = "question and answer"
BARE_CHOICE = "stands for one of the row's choices: write its words, or the choices into the question"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"turns": "q"}, "turns is no list but str"),
        ({"turns": 3}, "turns is no list but int"),
        ({"turns": b"q"}, "turns is no list but bytes"),
        ({"caption": "x", "boxes": {"a": 1}}, "boxes is no list but dict"),
        ([1], "the row is no object but list"),
        ({"image": 3, "caption": "x"}, "image is no path but int"),
        ({"img_path": {"bytes": 3}, "caption": "x"}, "img_path is no path but int"),
        ({"photo": ["a", None, "b", "c"], "caption": "x"}, "photo holds 3 images; a sample has one"),
        *(
            ({"question": "q", "answers": answers}, "answers is not a list of texts")
            for answers in (
                ["a", 0.5],
                "a",
                3,
                b"a",
                {"text": ["a"], "start": [0]},
                [{"text": "a"}],
                [{"answer": True}],
            )
        ),
        *(({"caption": texts}, "caption is not a list of texts") for texts in (["a", None], [0.5])),
        *(
            ({"question": "q", "answer": one}, f"answer is no text but {kind}")
            for one, kind in ((True, "bool"), (0.5, "float"))
        ),
        ({"answer": {"text": ["a"]}, "question": "q"}, "answer is no text but dict"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": name} for name in ("a.jpg", "b.jpg")]},
                    {"role": "assistant", "content": "a"},
                ]
            },
            "messages holds 2 images; a sample has one",
        ),
        ({"system": 3, "question": "q", "answer": "a"}, "system is no text but int"),
        ({"query": "q", "response": "a", "history": "h"}, "history is no list but str"),
        *(
            ({"query": "q", "response": "a", "history": [pair]}, f"history holds {pair!r}, which is no pair of {QA}")
            for pair in ({"q": "q", "a": "a"}, "qa", ["q"], ["q", 3])
        ),
        ({"question": "q", "answer": "B", "A": "a dog", "B": "a cat"}, f"answer 'B' {BARE_CHOICE}"),
        ({"question": "q", "answer": "A", "choice_a": "a dog", "choice_b": "a cat"}, f"answer 'A' {BARE_CHOICE}"),
        ({"question": "q", "answer": "(B).", "options": "['a dog', \"a cat's\"]"}, f"answer '(B).' {BARE_CHOICE}"),
        ({"question": "q", "answer": "B", "options": "a dog, a cat"}, f"answer 'B' {BARE_CHOICE}"),
        *(
            ({"question": "q", "answer": one, "options": ["a dog", "a cat"]}, f"answer {one!r} {BARE_CHOICE}")
            for one in ("1", 1)
        ),
        *(
            (
                {"image": "i", "bbox": [1, 2, 3, 4], **row},
                "the row has 'bbox' but no 'boxes': give its corners as 'boxes', [[x1, y1, x2, y2]] in pixels (COCO's "
                "bbox is x, y, width, height)",
            )
            for row in ({"caption": "x"}, {"question": "q", "answer": ["a"]})
        ),
        *(
            (
                {"query": f"find {asked}", "response": answer, "objects": {"ref": ["a dog"], "bbox": [[1, 2, 3, 4]]}},
                f"{mark} stands for an entry of 'objects': write a row for each box, its phrase as 'answer' and its "
                "corners as 'boxes', [[x1, y1, x2, y2]] in pixels",
            )
            for asked, answer, mark in (("it", "<bbox>", "<bbox>"), ("<ref-object>", "a", "<ref-object>"))
        ),
        ({"turns": [5]}, "what should have 'question' is no object but int"),
        ({"caption": "x", "boxes": [[1, 2, 3]]}, "box [1, 2, 3] is not x1, y1, x2, y2"),
        ({"caption": "x", "boxes": [5]}, "box 5 is not x1, y1, x2, y2"),
        ({"caption": "x", "boxes": [[1, 2, 3, "x"]]}, "box [1, 2, 3, 'x'] is not x1, y1, x2, y2"),
        (
            {"question": "<image>q", "answer": "a"},
            "the questions have 1 marks of images (<image>), and the row has no image",
        ),
        (
            {},
            f"{NO_FIELDS} among no fields",
        ),
        (
            {"a": 1, "b": 2},
            f"{NO_FIELDS} among a, b",
        ),
        ({"caption": "x", "photo_id": "7"}, "the row has 'photo_id' but no 'image': name the image's file in 'image'"),
        (
            {"caption": "x", "flickr_url": "u"},
            "the row has a link in 'flickr_url' but no image: download it, and name the file in 'image'",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_named(row, told):
    assert refused(Malformed, own_draft, row, "") == told


@pytest.mark.parametrize(
    ("row", "default", "task"),
    [
        ({"caption": "x"}, "", "caption"),
        ({"question": "q", "answer": "a"}, "", "text"),
        ({"image": "i", "question": "q", "answer": "a"}, "", "instruct"),
        ({"image": "i", "turns": [{"question": "q", "answer": "a"}] * 2}, "", "conversation"),
        ({"image": "i", "question": "q", "answer": "a"}, "vqa", "vqa"),
        ({"image": "i", "question": "q", "answer": "a", "task": "refer"}, "vqa", "refer"),
        ({"caption": "x", "task": ""}, "pair", "pair"),
    ],
)
def test_the_task_is_the_rows_own_or_the_inputs_or_that_of_its_form(row, default, task):
    assert own_draft(row, default).task == task


@pytest.mark.parametrize(
    ("image", "found"),
    [
        ("a.jpg", "a.jpg"),
        (["a.jpg"], "a.jpg"),
        ([None, "a.jpg"], "a.jpg"),
        ({"bytes": None, "path": "a.jpg"}, "a.jpg"),
        ({"url": "b.jpg"}, "b.jpg"),
        ({"bytes": jpeg(0), "path": "a.jpg"}, jpeg(0)),
        (["", "a.jpg"], "a.jpg"),
        ("", None),
        ([" "], None),
        (None, None),
        ([], None),
        (jpeg(0), jpeg(0)),
    ],
)
def test_an_image_is_a_name_or_bytes_in_any_form(image, found):
    draft = own_draft({"image": image, "caption": "x", 7: "odd key", "url_of_page": "p"}, "")
    assert draft.image == found


@pytest.mark.parametrize(
    ("row", "image", "turns"),
    [
        ({"query": "<image>q", "response": "a", "images": ["i.jpg"]}, "i.jpg", [("q", "a")]),
        ({"query": "q", "response": "a", "history": [["q1", "a1"]]}, None, [("q1", "a1"), ("q", "a")]),
        ({"instruction": "q", "input": "", "output": "a", "text": "all of it"}, None, [("q", "a")]),
        ({"instruction": "q", "input": "x", "output": "a", "image": "i.jpg"}, "i.jpg", [("q\nx", "a")]),
        ({"question": "q: dog or cat?", "answer": "A", "A": "dog"}, None, [("q: dog or cat?", "A")]),
        ({"question": "q", "answer": "Yes", "choices": ["yes", "no"]}, None, [("q", "Yes")]),
        ({"question": "q", "answer": "dog", "options": "['cat', 'dog']"}, None, [("q", "dog")]),
        ({"question": "q", "answer": "B", "options": "[]"}, None, [("q", "B")]),
        ({"question": "q", "answer": "a", "options": [{"text": "a"}]}, None, [("q", "a")]),
        ({"question": "q", "answer": "B", "options": ["A", "B"], "bbox": []}, None, [("q", "B")]),
        ({"question": 1, "answer": 3}, None, [("1", "3")]),
        ({"messages": [{"role": "user", "content": 1}, {"role": "bot", "content": 3}]}, None, [("1", "3")]),
        ({"turns": [{"question": "q", "answer": "a"}], "bbox": [1, 2, 3, 4]}, None, [("q", "a")]),
        ({"query": "q", "response": "a", "objects": {"bbox": [[1, 2, 3, 4]]}}, None, [("q", "a")]),
        ({"query": "what is <bbox>?", "response": "a"}, None, [("what is <bbox>?", "a")]),
        (
            {
                "conversations": [
                    {"from": "user", "value": "Picture 1: <img>d/i.jpg</img>\nq"},
                    {"from": "assistant", "value": "a"},
                ]
            },
            "d/i.jpg",
            [("q", "a")],
        ),
    ],
)
def test_forms_of_other_tools_are_read(row, image, turns):
    draft = own_draft(row, "")
    assert (draft.image, draft.turns) == (image, tuple(Turn(question, (answer,)) for question, answer in turns))


def test_the_field_of_the_image_has_many_names():
    names = ["image", "images", "img", "image_path", "image_file", "img_path", "file_name", "image_name", "picture"]
    names += ["photo", "jpg", "png", "webp"]
    assert [own_draft({name: f"{name}.x", "caption": "c"}, "").image for name in names] == [f"{n}.x" for n in names]
    several = {**dict.fromkeys(reversed(names), "b"), "image": "a", "caption": "c"}
    assert own_draft(several, "").image == "a", "the first of them counts"


def test_bytes_are_called_by_their_path_or_column():
    png = encode(picture(0), "PNG")
    for row, name in (
        ({"jpg": b"junk", "text": "x"}, "in jpg"),
        ({"img": {"bytes": png, "path": "a.jpg"}}, "a.jpg"),
        ({"img": {"bytes": png, "url": "https://h/a.jpg"}}, "https://h/a.jpg"),
        ({"img": {"bytes": b"", "path": "a.jpg"}}, "a.jpg is empty (0 bytes)"),
        ({"image": b""}, "in image is empty (0 bytes)"),
    ):
        assert refused(Malformed, own_draft, {"caption": "x", **row}, "").startswith(f"image {name}")


def test_forms_come_in_their_order_and_keep_what_was_changed():
    talk = [{"from": "gpt", "value": "x"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    draft = own_draft({"messages": talk, "question": "no", "caption": "no"}, "")
    assert (draft.turns, draft.changes, draft.task) == ((Turn("q", ("a",)),), ("first_answer_dropped",), "text")
    turns = own_draft({"turns": [{"question": "<image>t", "answers": ["u", "v"]}], "image": "i", "messages": talk}, "")
    assert turns.turns == (Turn("t", ("u", "v")),) and turns.changes == ()
    assert own_draft({"description": "d", "caption": None, "question": None}, "").turns == (Turn("", ("d",)),)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"url": "u", "status": "failed", "error_message": "404"}, "img2dataset: 404"),
        ({"url": "u", "status": "failed", "error_message": None}, "img2dataset: failed"),
    ],
)
def test_failed_downloads_are_filtered(row, told):
    with pytest.raises(Filtered) as removed:
        own_draft({"caption": "x", **row}, "")
    assert (str(removed.value), removed.value.filter) == (told, "not_downloaded")
    assert own_draft({"caption": "x", "status": "draft"}, "").task == "caption", "a status of one's own"
    assert "a link in 'url'" in refused(Malformed, own_draft, {"caption": "x", "url": "u", "status": 3}, "")


@pytest.mark.parametrize("system", ["S", {"from": "system", "value": "S"}, {"role": "system", "content": "S"}])
def test_a_system_text_beside_a_conversation_goes_before_its_first_question(system):
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}] * 2
    for row in ({"conversations": talk}, {"conversations": [{"from": "system", "value": "S"}, *talk]}):
        draft = own_draft({**row, "system": system}, "")
        assert [turn.question for turn in draft.turns] == ["S\nq", "q"]
        assert draft.changes == ("system_message_joined",)
    assert own_draft({"question": "q", "answer": "a", "system": system}, "").turns == (Turn("S\nq", ("a",)),)
    for row in ({"image": "a.jpg", "caption": "c", "system": system}, {"question": "q", "answer": "a", "system": ""}):
        draft = own_draft(row, "")
        assert not draft.turns[0].question.startswith("S") and not draft.changes


@pytest.mark.parametrize("field", ["answer", "caption", "text", "description"])
def test_several_texts_that_would_do_may_stand_where_one_does(field):
    row = {"image": "a.jpg", "question": "q"} if field == "answer" else {"image": "a.jpg"}
    turn = Turn(row.get("question", ""), ("a dog", "a dog", "the dog"))
    assert own_draft({**row, field: ["a dog", "a dog", "the dog"]}, "").turns == (turn,)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "a.jpg", "detail": "low"}},
        {"type": "image_url", "image_url": "a.jpg"},
        {"type": "image", "image": "a.jpg"},
        {"type": "image", "url": "a.jpg", "text": None},
        {"type": "image", "image": None, "path": "a.jpg"},
    ],
)
def test_an_image_may_stand_in_a_message(part):
    content = [{"type": "text", "text": "q"}, part]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]}
    draft = own_draft(row, "")
    assert (draft.image, draft.turns) == ("a.jpg", (Turn("q", ("a",)),))
    assert own_draft({**row, "image": "b.jpg"}, "").image == "b.jpg", "the row's own comes first"


def test_answers_may_be_as_the_hub_has_vqav2():
    given = [{"answer": "yes", "answer_confidence": "maybe", "answer_id": 1}, {"answer": "no"}]
    assert own_draft({"question": "q", "answers": given}, "").turns == (Turn("q", ("yes", "no")),)
    assert own_draft({"question": "q", "answers": [3, {"answer": 4}]}, "").turns == (Turn("q", ("3", "4")),)


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [
        ("train", ["train", "restval", "trainval", 1, None, ""]),
        ("test", ["test", "TEST ", 1, None, ""]),
        (
            "",
            [
                "train",
                "restval",
                "trainval",
                "val",
                "test",
                "TEST ",
                "testA",
                "dev",
                "minival",
                "held-out",
                1,
                None,
                "",
            ],
        ),
    ],
)
def test_rows_of_another_split_are_left_out(wanted, taken):
    """Flickr30k on the hub has train, val and test in one table."""
    unit = unit_of(Path("a.parquet"))
    unit = replace(unit, source=replace(unit.source, split=wanted))
    found = []
    for split in [
        "train",
        "restval",
        "trainval",
        "val",
        "test",
        "TEST ",
        "testA",
        "dev",
        "minival",
        "held-out",
        1,
        None,
        "",
    ]:
        with suppress(Filtered):
            found += [split for _ in read_own_row(unit, {"image": "a.jpg", "caption": "c", "split": split})]
    assert found == taken
    assert unit_of(Path("a.parquet")).source.split == "train", "of whoever says nothing else"
    told = refused(Filtered, list, read_own_row(unit_of(Path("a")), {"caption": "c", "split": "val"}))
    assert told == "the row's split 'val' is not split=train"


@pytest.mark.parametrize(
    "empty", [None, "", " ", {}, {"bytes": None, "path": None}, [], [None], [""], [{"bytes": None, "path": ""}]]
)
def test_there_are_many_ways_to_say_that_there_is_no_image(empty):
    draft = own_draft({"image": empty, "question": "q", "answer": "a"}, "")
    assert (draft.image, draft.task) == (None, "text")
    assert "and the row has no image" in refused(
        Malformed, own_draft, {"image": empty, "question": "<image>q", "answer": "a"}, ""
    )
    assert own_draft({"image": empty, "photo": "a.jpg", "caption": "c"}, "").image == "a.jpg"


@pytest.mark.parametrize(
    "name",
    ["image_id", "imageId", "imageURL", "ImageID", "imgname", "image-path", "image.file", "IMG_FILE", "sourceImage"],
)
def test_a_row_that_names_its_image_in_another_field_is_not_text(name):
    told = refused(Malformed, own_draft, {name: "n161313", "question": "q", "answer": "a"}, "")
    assert told == f"the row has {name!r} but no 'image': name the image's file in 'image'"
    assert own_draft({name: "", "question": "q", "answer": "a"}, "").task == "text"


def test_nor_is_one_with_the_name_of_an_images_file():
    row = {"question": "q", "answer": "a", "filename": "train/1.JPG"}
    assert "the row has 'filename' but no 'image'" in refused(Malformed, own_draft, row, "")
    for fields in (
        {"question": "what is in a.jpg"},
        {"answer": "a.png"},
        {"imagination": "x"},
        {"source": "a.jpg or so"},
    ):
        assert own_draft({"question": "q", "answer": "a", **fields}, "").task == "text"


# ---------------------------------------------------------------- tables


def unit_of(path, **fields):
    source = SourceInput("parquet", str(path), fields.pop("images", ""), "own", "")
    return SourceUnit(source, Location.parse(str(path)), path.name, **fields)


def test_damage_costs_rows_and_a_storage_that_fails_ends_the_unit(tmp_path, monkeypatch):
    """Arrow says both as an error without a number; a file in a bucket may be damaged, too."""
    table, sink = pa.table({"question": [f"q{n}" for n in range(3000)], "answer": ["a"] * 3000}), io.BytesIO()
    pq.write_table(table, sink, row_group_size=1000, use_dictionary=False)
    content = bytearray(sink.getvalue())
    content[100:900] = b"\xff" * 800
    place = f"memory://tables/{tmp_path.name}.parquet"
    storage.write_atomically(place, content)
    reader, source = own.TableReader(), SourceInput("parquet", place, "", "own", "")
    units = list(reader.plan(source))
    found = [each for unit in units for each in reader.read(unit)]
    assert isinstance(found[0], Rejected) and "cannot be read after row 0" in found[0].reason
    assert own._damage(pa.ArrowInvalid("bad page")) == own._damage(OSError("bad page")) == "bad page"
    for error in (OSError(errno.EIO, "disk"), FileNotFoundError("disk"), storage.StorageError("disk")):
        with pytest.raises(OSError, match="disk"):
            own._damage(error)
    monkeypatch.setattr(storage.retry.time, "sleep", lambda seconds: None)

    def read_at(self, size):
        raise OSError("AWS Error NETWORK_CONNECTION")

    monkeypatch.setattr(storage.reading._RemoteFile, "_read_at_position", read_at)
    with pytest.raises(storage.StorageError, match="failed 6 times"):
        list(reader.read(units[-1]))
    with pytest.raises(storage.StorageError, match="failed 6 times"):
        list(reader.plan(source))


def test_a_table_that_cannot_be_read_to_its_end_says_after_which_row(tmp_path, monkeypatch):
    path = tmp_path / "0.parquet"
    pq.write_table(pa.table({"question": ["q"] * 5, "answer": ["a"] * 5}), path)
    sizes = []

    def batches(unit):
        for batch in pq.ParquetFile(path).iter_batches(3):
            sizes.append(batch.num_rows)
            yield batch
        raise pa.ArrowInvalid("bad page")

    monkeypatch.setattr(own, "_batches", batches)
    *rows, last = SOURCES["parquet"].reader.read(unit_of(path, first=10, details=own.TableDetails(True)))
    assert [row.id for row in rows] == [f"0/row {number}" for number in range(10, 15)]
    assert last == Rejected("", "0.parquet", "the table cannot be read after row 15: bad page")


def test_tables_are_read_in_small_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(own, "_BATCH_ROWS", 2)
    table = pa.table({"question": [f"q{n}" for n in range(5)], "answer": ["a"] * 5})
    pq.write_table(table, tmp_path / "p")
    with pa.ipc.new_file(str(tmp_path / "f"), table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(str(tmp_path / "s"), table.schema) as writer:
        writer.write_table(table)
    for name in "pfs":
        (unit,) = own._plan_table(unit_of(tmp_path / name))
        assert unit.details == own.TableDetails(is_parquet=name == "p")
        batches = list(own._batches(unit))
        assert [batch.num_rows for batch in batches] == [2, 2, 1], name
        assert [cell for batch in batches for cell in batch["question"].to_pylist()] == [f"q{n}" for n in range(5)]


@pytest.mark.parametrize(
    "kind", [pa.timestamp("us"), pa.timestamp("us", "Nowhere/City"), pa.date64(), pa.time64("us"), pa.duration("us")]
)
def test_times_that_python_does_not_know_cost_nothing(tmp_path, monkeypatch, kind):
    times = pa.Array.from_buffers(kind, 1, [None, pa.py_buffer((2**62).to_bytes(8, "little"))])
    batch = pa.record_batch([times, pa.array(["q"]), pa.array(["a"])], names=["made", "question", "answer"])
    monkeypatch.setattr(own, "_batches", lambda unit: iter([batch]))
    (row,) = SOURCES["parquet"].reader.read(unit_of(tmp_path / "a.parquet", details=own.TableDetails(True)))
    assert row.turns == (Turn("q", ("a",)),)


def test_a_large_group_of_rows_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(own, "_READ_AT_ONCE", 4 << 20)
    monkeypatch.setattr(storage, "COPY_BYTES", 1 << 16)
    images = [number.to_bytes(2, "big") * 5000 for number in range(800)]
    table = pa.table({"image": images, "caption": ["x"] * len(images)})
    pq.write_table(table, tmp_path / "a", compression="none", use_dictionary=False, write_batch_size=16)
    (unit,) = own._plan_table(unit_of(tmp_path / "a"))
    before, found = pa.total_allocated_bytes(), []
    for batch in own._batches(unit):
        found += batch["image"].to_pylist()
        assert pa.total_allocated_bytes() - before < 4 << 20, "of 8 MB"
    assert found == images


def test_offsets_that_point_out_of_a_table_are_damage(tmp_path, monkeypatch):
    offsets = pa.py_buffer(b"\0\0\0\0\xff\xff\0\0\3\0\0\0")
    text = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"abc")])
    broken = pa.record_batch([text], names=["caption"])
    monkeypatch.setattr(own, "_batches", lambda unit: iter([broken]))
    (found,) = SOURCES["parquet"].reader.read(unit_of(tmp_path / "a.parquet", details=own.TableDetails(True)))
    assert found.reason.startswith("the table cannot be read after row 0: ")


def test_what_a_folder_lacks_is_told(tmp_path):
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "0.parquet")

    def plan(given, **more):
        return list(SOURCES["hf"].reader.plan(SourceInput("hf", str(given), more.get("images", ""), "own", "")))

    assert (
        refused(SettingsError, plan, tmp_path) == f"input={str(tmp_path)!r} holds no entries: its tables have no rows."
    )
    assert "is no folder" in refused(SettingsError, plan, tmp_path, images=str(tmp_path / "none"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/dataset_dict.json").write_text("{}")
    assert refused(SettingsError, plan, tmp_path / "set") == (
        f"input={str(tmp_path / 'set')!r} has several splits and none is named train: name one, as input=.../SPLIT."
    )
    for text in ("[]", "{", '{"_data_files": 3}', '{"_data_files": [{}]}'):
        (tmp_path / "state.json").write_text(text)
        message = refused(SettingsError, plan, tmp_path)
        assert message.startswith(f"{tmp_path}/state.json is not as `save_to_disk` writes it: ")


def test_one_split_alone_and_unnamed_tables_beside_others(tmp_path, caplog):
    def names(*files):
        found = [SimpleNamespace(location=Location("", f"/d/{name}"), name=name) for name in files]
        source = SourceInput("hf", "/d", "", "own", "")
        return [file.name for file in table_files._training_split(source, found)]

    assert names("a.parquet", "b.parquet") == ["a.parquet", "b.parquet"]
    assert names("test-0.parquet", "test-1.parquet") == ["test-0.parquet", "test-1.parquet"] and not caplog.text
    assert names("a.parquet", "Test-0.parquet") == ["a.parquet"]
    assert caplog.messages == ["/d: the training split alone is read; left out: Test-0.parquet"]
    assert names("dev.parquet", "train-0.parquet", "x.parquet", "train.parquet") == ["train-0.parquet", "train.parquet"]
    assert caplog.messages[1] == "/d: the training split alone is read; left out: dev.parquet, x.parquet"
    splits = [
        table_files._split_of(name) for name in ("my_valid.arrow", "TRAIN2.arrow", "retrain.arrow", "pretest", "dev")
    ]
    assert splits == ["valid", "train", "", "", "dev"]


def test_rows_as_json_are_found_in_a_folder(tmp_path):
    reader, given = SOURCES["jsonl"].reader, SourceInput("jsonl", str(tmp_path), "", "own", "")
    (tmp_path / "b.json").write_text('[{"caption": "x"}]')
    assert [unit.shard for unit in reader.plan(given)] == ["b.json"]
    for name in ("a.ndjson", "c.jsonl"):
        (tmp_path / name).write_text('{"caption": "x"}\n')
    assert [unit.shard for unit in reader.plan(given)] == ["a.ndjson", "c.jsonl"], "lists only where there are no lines"


# ---------------------------------------------------------------- questions and references


@pytest.mark.parametrize(
    ("text", "alone"),
    [
        ('{"questions": [{"question": "q"}]}', True),
        ('{"questions": [{"question": "q", "answer": "a"}]}', False),
        ('{"questions": [{"multiple_choice_answer": "a"}]}', False),
        ('{"questions": []}', False),
        ('{"questions": [3]}', False),
        ('{"questions": [', False),
    ],
)
def test_questions_without_answers(tmp_path, text, alone):
    (tmp_path / "a.json").write_text(text)
    (file,) = storage.find_files(str(tmp_path / "a.json"))
    assert questions.has_questions_alone(file, JsonForm("member", "questions")) is alone
    assert questions.has_questions_alone(file, JsonForm("list")) is False


def test_answers_are_looked_up_by_ids_that_can_be_compared(tmp_path):
    path = tmp_path / "a.json"
    entries = [{"question_id": 1, "answers": [{"answer": "a"}, "b"]}, 3, {"question_id": 2, "answers": "x"}]
    path.write_text(json.dumps({"annotations": entries}))
    assert questions._read_answers(Location.parse(str(path))) == {1: ("a", "b")}
    ids = [id_of(entry, "question_id") for entry in ({"question_id": "7"}, {"question_id": [1]}, {}, 3)]
    assert ids == ["7", None, None, None]
    assert [questions._utf8(text) for text in ("caf\u00c3\u00a9", "caf\u00e9", "\u4e2d")] == [
        "caf\u00e9",
        "caf\u00e9",
        "\u4e2d",
    ]
    path.write_text('{"annotations": [}')
    assert refused(SettingsError, questions._read_answers, Location.parse(str(path))).startswith(
        f"{path} cannot be used: the file is cut off"
    )
    path.write_text('{"annotations": []}')
    assert refused(SettingsError, questions._read_answers, Location.parse(str(path))) == (
        f"{path} holds no answers in 'annotations': is it the right file?"
    )
    (tmp_path / "questions.json").touch()
    (file,) = storage.find_files(str(tmp_path / "questions.json"))
    assert refused(SettingsError, questions._answers_file, SourceInput("ok_vqa", "", "", "", ""), file) == (
        f"{tmp_path}/questions.json holds questions without answers: put annotations.json beside it, or give "
        "source=ok_vqa a file that holds both."
    )


def test_files_of_references_are_named_where_they_are_missing(tmp_path):
    reader = SOURCES["refcocop"].reader

    def files(given):
        return reader._files(SourceInput("refcocop", given, "", "x", ""))

    assert refused(SettingsError, files, "") == (
        "source=refcocop needs input=: the folder with refs(unc).p and instances.json; looked for none: input= is "
        "empty."
    )
    assert refused(SettingsError, files, str(tmp_path)) == (
        "source=refcocop needs input=: the folder with refs(unc).p and instances.json; looked for "
        f"{tmp_path}/refs(unc).p and {tmp_path}/refcoco+/refs(unc).p."
    )
    (tmp_path / "refcoco+").mkdir()
    for name in ("refcoco+/refs(unc).p", "own.p"):
        (tmp_path / name).touch()
    for given, name in (("", "refcoco+/refs(unc).p"), ("own.p", "own.p")):
        file, instances = files(str(tmp_path / given))
        assert file.location.path == str(tmp_path / name) and instances.path == str(
            (tmp_path / name).parent / "instances.json"
        )
    missing = Location.parse(str(tmp_path / "instances.json"))
    assert refused(SettingsError, referring._boxes_of, missing).startswith(f"{missing} cannot be used: ")
    assert refused(SettingsError, referring._image_paths, missing).startswith(f"{missing} cannot be used: ")
    (tmp_path / "instances.json").write_text("[")
    for read in (referring._boxes_of, referring._image_paths):
        assert "cut off" in refused(SettingsError, read, missing)


def test_references_and_regions_one_by_one():
    ref = {"ref_id": 1, "ann_id": 5, "image_id": 9, "split": "train", "sentences": [{"raw": "Dog."}]}
    (draft,) = referring._reference(ref, [1, 2, 3, 4])
    assert (draft.image, draft.boxes, draft.cleans_answers) == (
        "COCO_train2014_000000000009.jpg",
        ((1.0, 2.0, 4.0, 6.0),),
        True,
    )
    assert refused(Malformed, next, referring._reference(ref, None)) == "annotation 5 is not in instances.json"
    assert refused(Filtered, next, referring._reference({**ref, "split": "val"}, None)) == "split val does not train"
    region = {"x": 1, "y": 2, "width": 128, "height": 128, "phrase": "P"}
    assert refused(Filtered, next, referring._region(region, "a", 7)) == (
        "region of 128 x 128 pixels, 16384 or more in all"
    )
    assert (
        refused(Malformed, next, referring._region({**region, "width": 3}, None, 7))
        == "image 7 is not in image_data.json"
    )
    (draft,) = referring._region({**region, "width": 3}, "VG_100K/7.jpg", 7)
    assert (draft.image, draft.boxes, draft.cleans_answers) == ("VG_100K/7.jpg", ((1.0, 2.0, 4.0, 130.0),), True)
    assert referring._slim({"a": 1, "split": "x"}) == {"split": "x"} and referring._slim(3) == 3
    assert [id_of(entry, "id") for entry in ({"id": 1}, {"id": [1]}, {}, 3)] == [1, None, None, None]


def test_images_of_visual_genome_by_their_last_two_folders(tmp_path):
    entries = [
        {"image_id": 1, "url": "https://h/a/VG_100K/1.jpg"},
        {"id": 2, "url": "https://h/VG_100K_2/2.jpg"},
        {"id": 3},
        4,
    ]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    found = referring._image_paths(Location.parse(str(tmp_path / "a.json")))
    assert found == {1: "VG_100K/1.jpg", 2: "VG_100K_2/2.jpg"}
    assert referring._genome_names("VG_100K/1.jpg") == (
        "VG_100K/1.jpg",
        "VG_100K_2/1.jpg",
        "images/VG_100K/1.jpg",
        "images2/VG_100K_2/1.jpg",
        "images/1.jpg",
        "images2/1.jpg",
        "1.jpg",
    )
    assert list(referring._ids_in({"id": 1, "regions": [{"image_id": 2}, 3]})) == [1, 2, None]
    assert list(referring._ids_in({"id": 1, "regions": 5})) == [1] and list(referring._ids_in(3)) == [None]
