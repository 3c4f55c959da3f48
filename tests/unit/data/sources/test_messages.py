"""What a wrong file, entry or image is called: the value, where it is, and the fix."""

from __future__ import annotations

import csv
import errno
import json
import os

import pytest

from pipelines import storage
from pipelines.data.sources import SOURCES, entries, images, locate
from pipelines.data.sources.base import Malformed, MissingImage, SourceInput, find_input
from pipelines.data.sources.delimited import is_delimited, read_delimited
from pipelines.data.sources.images import ImageFolder, ImageLayout, check_image_name, find_image_folder
from pipelines.data.sources.json_entries import detect_form, plan_entries
from pipelines.settings import PrepareDataSettings, SettingsError
from pipelines.storage import Location
from tests.source_files import encode, jpeg, picture, refused

# ---------------------------------------------------------------- the input


def test_a_source_and_a_task_that_do_not_fit():
    def told(**given):
        return refused(SettingsError, locate, PrepareDataSettings(**given))

    assert told(source="lion") == "source='lion' is no known data set; did you mean 'laion'?"
    assert told(source="gqa", split="val") == "split='val' is only for own data; source=gqa reads what is for training."
    assert told(source="gqa", task="vqa") == "task='vqa' is only for own data; source=gqa has the task 'vqa'."
    assert told(source="csv", task="paint").startswith("task='paint' is unknown; known: ")


def test_files_that_are_not_found_are_told_with_what_was_looked_for(tmp_path, caplog):
    given = SourceInput("gqa", str(tmp_path), "", "gqa", "vqa")
    assert refused(SettingsError, find_input, given, "a.json", "{b,c}.json") == (
        f"input={str(tmp_path)!r} matches no file (looked for {tmp_path}/a.json, {tmp_path}/{{b,c}}.json); "
        "check the path."
    )
    assert refused(SettingsError, find_input, given) == (
        f"input={str(tmp_path)!r} matches no file (looked for {tmp_path}); check the path."
    )
    empty = SourceInput("gqa", "", "", "gqa", "vqa")
    assert refused(SettingsError, find_input, empty) == ("source=gqa needs input=: an annotation file, or its folder.")
    for folder in ("z", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "b.json").touch()
    assert refused(SettingsError, find_input, given, "{b,c}.json") == (
        f"input={str(tmp_path)!r} holds {{b,c}}.json more than once, in {tmp_path}/y and {tmp_path}/z: "
        "name one of them."
    )
    assert caplog.text == "", "official names are alternatives, none of them is missing"
    find_input(SourceInput("gqa", f"{tmp_path}/y/{{b,c}}.json", "", "gqa", ""), "x")
    assert "1 of 2 are missing: c.json" in caplog.text, "a pattern of the user's own"


# ---------------------------------------------------------------- files of entries


def form_of(path, data, **more):
    path.write_bytes(data)
    return detect_form(storage.find_files(str(path))[0], **more)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b" \n", "holds no entries: it is empty. Is it the right file?"),
        (
            b"<html><body>it is a page</body>",
            "does not start as JSON with a list or an object of entries but with '<html><body>it is a'; "
            "is it the right file?",
        ),
        (
            b"\0[\0]",
            "does not start as JSON with a list or an object of entries but with '\\x00[\\x00]'; it begins with a zero "
            "byte: is it UTF-16 without a byte order mark?",
        ),
        *(
            (
                data,
                "does not start as JSON with a list or an object of entries but with 'PK\\x03\\x04own.json'; it is an "
                "archive: unpack it, and give the unpacked file",
            )
            for data in (b"PK\x03\x04own.json", b"PK\3\4own.json".ljust(257, b" ") + b"ustar")
        ),
        (b'{"a": 1, "b": "x"}', "holds no entries: its members are a, b. Is it the right file?"),
        (
            b'{"x": [{"a": 1}], "y": [{"a": 2}], "z": 3}',
            "holds several lists (x, y): write the one that is meant into a file of its own.",
        ),
    ],
)
def test_a_file_without_entries(tmp_path, data, told):
    path = tmp_path / "own.json"
    assert refused(SettingsError, form_of, path, data) == f"{path} {told}"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"[]", "holds no entries: is it the right file?"),
        (b"[oops", "holds no entries: the file is cut off or no valid JSON after byte 1"),
        (b'{"annotations": []}', "holds no entries in 'annotations': is it the right file?"),
    ],
)
def test_a_plan_without_entries(tmp_path, data, told):
    path = tmp_path / "own.json"
    form = form_of(path, data, member="annotations")
    source, (file,) = SourceInput("x", str(path), "", "x", ""), storage.find_files(str(path))
    assert refused(SettingsError, lambda: list(plan_entries(source, file, form))) == f"{path} {told}"


# ---------------------------------------------------------------- tables with separators


def rows_of(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read_delimited(Location.parse(str(path))))


def test_headers_and_rows_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.csv"
    message = refused(SettingsError, rows_of, path, '"image"x,caption\na,b\n')
    assert message.startswith(f"{path}: the header cannot be read: ") and "expected after" in message
    assert refused(SettingsError, rows_of, path, "image,\n") == (
        f"{path}: the first line must name every column once; it is 'image,'."
    )
    path.write_text("image,caption\n")
    given = SourceInput("csv", str(path), "", "own", "")
    message = refused(SettingsError, lambda: list(SOURCES["csv"].reader.plan(given)))
    assert message == f"{path} holds no rows: is it the right file?"


def test_fields_may_be_long_and_odd_bytes_cost_their_row_later(tmp_path):
    limit = csv.field_size_limit(100)
    try:
        assert rows_of(tmp_path / "a.csv", f"image,caption\na,{'x' * 200}\n")[0][1]["caption"] == "x" * 200
    finally:
        csv.field_size_limit(limit)
    assert rows_of(tmp_path / "a.csv", b"image,caption\na,caf\xe9\nb,c\n")[1] == (
        "line 3",
        {"image": "b", "caption": "c"},
    )


@pytest.mark.parametrize(
    ("name", "text", "fields"),
    [
        ("a.tsv", "image\na, b\n", {"image": "a, b"}),
        ("A.TSV", "image;caption\na;b\n", {"image;caption": "a;b"}),
        ("a.csv", "image;caption\na, b;c\n", {"image": "a, b", "caption": "c"}),
    ],
)
def test_the_separator_is_that_of_the_header_or_the_ending(tmp_path, name, text, fields):
    assert rows_of(tmp_path / name, text) == [("line 2", fields)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("image,caption\n", True),
        (' "image" , "caption" \n', True),
        ("x;question\n", True),
        ("caption\n", False),
        ("a,b\n", False),
        ("", False),
        ("\nimage,caption\n", True),
        ('{"question", "caption"}', False),
        ("[question,caption]", False),
    ],
)
def test_a_header_names_at_least_two_columns_and_one_of_a_row(tmp_path, text, found):
    (tmp_path / "a").write_text(text)
    assert is_delimited(Location.parse(str(tmp_path / "a"))) is found


def test_both_kinds_of_tables_are_found_in_a_folder(tmp_path):
    (tmp_path / "b.tsv").write_text("image\tcaption\na\tb\n")
    assert [unit.shard for unit in SOURCES["csv"].reader.plan(SourceInput("csv", str(tmp_path), "", "x", ""))] == [
        "b.tsv"
    ]


# ---------------------------------------------------------------- entries


def test_fields_that_are_wrong_are_named():
    assert (
        refused(Malformed, entries.answers_of, {"direct_answers": 3}, "answer")
        == refused(Malformed, entries.answers_of, {"direct_answers": "['a', 'b']"}, "direct_answers")
        == "direct_answers is no list of answers"
    )
    assert refused(Malformed, entries.text_of, {"a": 1, "b": 2}, "c") == "the entry has 'a', 'b', but no 'c'"
    assert refused(Malformed, entries.text_of, {}, "c") == "the entry has no fields, but no 'c'"
    assert refused(Malformed, entries.text_of, {"c": [1]}, "c") == "c is no text but list"
    ocr = {"imageURL": "x/a", "questions": ["q"], "answers": [3], "split": 1}
    assert refused(Malformed, lambda: list(entries.ocrvqa(ocr, "k"))) == "answer is no text but int"
    assert refused(ValueError, lambda: list(entries.ocrvqa({**ocr, "answers": ["a", "b"]}, "k")))
    assert next(entries.ocrvqa({**ocr, "answers": ["a"]}, "k")).image == "k"


@pytest.mark.parametrize(
    ("describe", "entry", "cleans"),
    [
        (entries.align, {"image_id": 1, "caption": "c"}, (False, False)),
        (entries.coco_caption, {"image_id": 1, "caption": "c"}, (False, True)),
        (entries.textcaps, {"image_id": 1, "caption_str": "c"}, (False, True)),
        (entries.vqa("answer"), {"image_id": 1, "question": "q", "answer": "a"}, (True, True)),
        (entries.ocrvqa, {"imageURL": "a.jpg", "questions": ["q"], "answers": ["a"], "split": 1}, (True, True)),
        (entries.grounded_caption, {"image_id": 1, "grounded_caption": "c"}, (False, False)),
        (entries.caption_to_phrase, {"image_id": 1, "caption": "c", "output": "o"}, (False, False)),
        (entries.object_to_phrase, {"image_id": 1, "phrase": "p", "bbox": "b"}, (False, False)),
        (
            entries.unnatural,
            {"instances": [{"instruction_with_input": "i", "constraints": None, "output": "o"}]},
            (True, True),
        ),
    ],
)
def test_texts_are_cleaned_where_the_release_cleans_them(describe, entry, cleans):
    (draft,) = describe(entry, "k")
    assert (draft.cleans_questions, draft.cleans_answers) == cleans


def test_llavas_first_question_loses_its_mark_and_what_was_changed_is_counted():
    talk = [
        ("human", " <image>\nWhat is\nit? <image>\n "),
        ("gpt", "see <image>"),
        ("human", "<image> b\n"),
        ("gpt", "c"),
    ]
    entry = {"id": "1", "conversations": [{"from": side, "value": text} for side, text in [("gpt", "x"), *talk]]}
    (whole,) = entries.llava_conversation(entry, "k")
    (single,) = entries.llava_single(entry, "k")
    assert [turn.question for turn in whole.turns] == ["What isit?", "<image> b\n"]
    assert whole.turns[0].answers == ("see <image>",) and single.turns == whole.turns[:1]
    assert whole.changes == single.changes == ("first_answer_dropped",)
    assert (whole.cleans_questions, single.cleans_questions) == (False, True)
    assert not whole.cleans_answers and not single.cleans_answers


def test_a_lavis_entry_has_no_split():
    entry = {"image": "train2014/a.jpg", "split": "val", "question": "q", "answer": "a"}
    assert next(entries.vqa("answer")(entry, "k")).image == "train2014/a.jpg"


# ---------------------------------------------------------------- images


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(jpeg(0))
    return tmp_path / "images"


def test_images_that_cannot_be_read_are_named(folder):
    def told(name, at=folder, **more):
        return refused(Malformed, ImageFolder(at and Location.parse(str(at)), **more).read, name)

    assert told("a.jpg", at=None) == "image a.jpg is a path, and images= names no folder"
    assert told("../b.jpg") == f"image ../b.jpg is outside of the image folder {folder}"
    assert told("/b.jpg") == (
        f"image /b.jpg is outside of the image folder {folder}: give the folder that holds it as images="
    )
    assert told("\ud800") == "image \\ud800 has a name with half a surrogate pair, which is no character"
    assert told("x" * 300).endswith(f" cannot be read: {os.strerror(errno.ENAMETOOLONG)}")
    assert told("b.jpg") == f"image b.jpg is missing in {folder}"
    assert told("b.jpg", alternatives=lambda name: (name, "c")) == f"image b.jpg is missing in {folder}"
    assert told("b.jpg", alternatives=lambda name: (name, "c", "d", "e")) == (
        f"image b.jpg is missing in {folder}; also looked for c and 2 more names"
    )
    assert told("data:image/jpeg;base64,abc!").startswith("the image's data: URL cannot be decoded: ")
    assert told("DATA:IMAGE/JPEG;BASE64,YWJj") == "image of a data: URL does not hold an image in a known format"
    (folder / "sub.jpg").mkdir()
    assert told("sub.jpg").startswith("image sub.jpg cannot be read: Cannot open for reading: path ")


def test_errors_without_a_number_of_a_remote_storage_are_not_the_rows_fault(folder, monkeypatch):
    def failing(location):
        raise OSError("connection lost")

    monkeypatch.setattr(storage, "read_bytes", failing)
    assert refused(Malformed, ImageFolder(Location("", str(folder))).read, "a.jpg") == (
        "image a.jpg cannot be read: connection lost"
    )
    with pytest.raises(OSError, match="connection lost"):
        ImageFolder(Location("s3://bucket", "images")).read("a.jpg")


def test_bytes_are_called_what_they_are():
    page = refused(Malformed, check_image_name, "a.jpg", b"<html>")
    assert page == "image a.jpg is an HTML page: the download failed"
    wrong = refused(Malformed, check_image_name, "dir.x/a.b.PNG", jpeg(0))
    assert wrong == "image dir.x/a.b.PNG has a wrong extension: it holds a JPEG"
    for name in ("a.jpeg", "a.JFIF", "a.png.jpg", "a.data", "a"):
        check_image_name(name, jpeg(0))
    tiff = encode(picture(0), "TIFF")
    check_image_name("a.tif", tiff), check_image_name("a.tiff", b"MM\x00*" + tiff[4:])


def test_folders_of_images_are_looked_for_three_levels_up(tmp_path):
    source, file = SourceInput("gqa", "", "", "gqa", "vqa"), Location.parse(str(tmp_path / "a/b/c/x.json"))
    layout = ImageLayout(("one", "two", "three"))
    (tmp_path / "two").mkdir()
    above = [f"{tmp_path}/a/b/{up}{name}" for up in ("c/", "") for name in ("one", "two", "three")]
    assert refused(SettingsError, find_image_folder, source, file, layout) == (
        f"source=gqa needs images=: the folder that holds its images; looked for {', '.join(above)} and the same in "
        "the folders above."
    )
    (tmp_path / "a/three").mkdir(parents=True)
    assert find_image_folder(source, file, layout).path == f"{tmp_path}/a/three"
    assert refused(SettingsError, find_image_folder, source, file, ImageLayout()) == (
        "source=gqa needs images=: the folder that holds its images."
    )
    (tmp_path / "images.zip").touch()
    for named in ("/nowhere", f"{tmp_path}/images.zip"):
        given = SourceInput("gqa", "", named, "mine", "vqa")
        assert refused(SettingsError, find_image_folder, given, file, layout) == (
            f"images='{named}' is no folder; give the one that holds the images of gqa."
        )
    assert find_image_folder(source, Location.parse("/x.json"), ImageLayout(("etc",))).path == "/etc"


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("train2014/COCO_train2014_000000000009.jpg", 12),
        ("x/y.png", ("y.png", "x/y.png")),
        ("a/COCO_val2014_9.jpg", ("COCO_val2014_9.jpg", "a/COCO_val2014_9.jpg", "val2014/COCO_val2014_9.jpg")),
    ],
)
def test_names_of_a_coco_image_begin_with_its_own(name, names):
    found = images.coco_names(name)
    if isinstance(names, int):
        number = "000000000009.jpg"
        assert found[:3] == (f"COCO_train2014_{number}", f"train2014/COCO_train2014_{number}", f"train2017/{number}")
        assert set(found[6:]) == {number, f"COCO_val2014_{number}", f"COCO_test2015_{number}"}
    else:
        assert found == names
    assert images.below("a", "b")("x") == ("x", "a/x", "b/x")


def test_a_prefix_of_this_folder_is_taken_off_on_a_disk_alone(folder):
    assert ImageFolder(Location.parse(str(folder)))._below_folder(f"{folder}/./a.jpg") == "a.jpg"
    bucket = ImageFolder(Location("s3://bucket", "images"))
    assert bucket._below_folder("images/a.jpg") == "images/a.jpg"


def test_a_missing_image_is_looked_for_under_all_its_names(folder):
    reader = ImageFolder(Location.parse(str(folder)), lambda name: (f"x/{name}", name))
    assert reader.read("a.jpg") == jpeg(0) and reader._likeliest == 1
    with pytest.raises(MissingImage) as error:
        reader.read("b.jpg")
    assert [at.path for at in error.value.looked_for] == [f"{folder}/x/b.jpg", f"{folder}/b.jpg"]
    assert json.dumps(str(error.value))
