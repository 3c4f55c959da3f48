"""What all sources share: names, reasons, where input is found, and the table of data sets itself."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest

from pipelines.data.sources import SOURCES, locate
from pipelines.data.sources.annotations import AnnotationReader
from pipelines.data.sources.base import (
    Filtered,
    Malformed,
    MissingImage,
    Rejected,
    SourceInput,
    SourceUnit,
    find_input,
    rejection,
    shorten,
)
from pipelines.data.sources.images import COCO, IMAGE_EXTENSIONS
from pipelines.settings import PrepareDataSettings, SettingsError
from pipelines.storage import DiskFullError, Location

UNIT = SourceUnit(SourceInput("laion", "", "", "laion", "pair"), Location("", "/d/a.b.tar"), "d/a.b.tar")


def test_each_source_has_its_task_and_only_captions_of_the_web_are_filtered():
    tasks = {name: source.task for name, source in SOURCES.items()}
    assert tasks == {
        **dict.fromkeys(("laion", "cc_sbu"), "pair"),
        "cc_sbu_align": "align",
        **dict.fromkeys(("llava_conversation", "multitask_conversation"), "conversation"),
        **dict.fromkeys(("llava_detail", "llava_reason"), "instruct"),
        "unnatural_instruction": "text",
        **dict.fromkeys(("refcoco", "refcocop", "refcocog", "refvg"), "refer"),
        **dict.fromkeys(("invrefcoco", "invrefcocop", "invrefcocog"), "identify"),
        "flickr_grounded_caption": "grounding",
        **dict.fromkeys(("flickr_CaptionToPhrase", "flickr_ObjectToPhrase"), "detection"),
        **dict.fromkeys(("coco_caption", "textcaps_caption"), "caption"),
        **dict.fromkeys(("coco_vqa", "ok_vqa", "aok_vqa", "gqa", "ocrvqa"), "vqa"),
        **dict.fromkeys(("webdataset", "jsonl", "csv", "hf", "parquet"), ""),
    }
    assert {name for name, source in SOURCES.items() if source.web} == {"laion", "cc_sbu", "webdataset"}
    readers = {name: SOURCES[name].reader for name in ("refcoco", "refcocop", "refcocog")}
    assert {name: (reader.folder, reader.partition) for name, reader in readers.items()} == {
        "refcoco": ("refcoco", "unc"),
        "refcocop": ("refcoco+", "unc"),
        "refcocog": ("refcocog", "umd"),
    }


def test_files_are_known_by_their_publishers_names():
    files = {
        name: source.reader.files for name, source in SOURCES.items() if isinstance(source.reader, AnnotationReader)
    }
    assert files == {
        "cc_sbu_align": ("filter_cap.json",),
        "llava_conversation": ("conversation_58k.json",),
        "llava_detail": ("detail_23k.json",),
        "llava_reason": ("complex_reasoning_77k.json",),
        "multitask_conversation": ("multitask_conversation.json",),
        "unnatural_instruction": (
            "filtered_unnatural_instruction.json",
            "{full,core}_data.{jsonl,jsonl.gz,json}",
        ),
        "flickr_grounded_caption": ("groundedcaption.json",),
        "flickr_CaptionToPhrase": ("captiontobbox.json",),
        "flickr_ObjectToPhrase": ("phrasetobbox.json",),
        "coco_caption": ("coco_karpathy_train.json", "captions_train2014.json", "captions_train2017.json"),
        "textcaps_caption": ("TextCaps_0.1_train.json",),
        "coco_vqa": ("vqa_{train,val}.json", "v2_OpenEnded_mscoco_train2014_questions.json"),
        "ok_vqa": ("okvqa_train.json", "OpenEnded_mscoco_train2014_questions.json"),
        "aok_vqa": ("aokvqa_v1p0_train.json",),
        "gqa": ("train_balanced_questions.json",),
        "ocrvqa": ("dataset.json",),
    }
    members = {name: SOURCES[name].reader.member for name in files if SOURCES[name].reader.member}
    assert members == {"cc_sbu_align": "annotations", "coco_caption": "annotations", "textcaps_caption": "data"}
    coco = {name for name in files if SOURCES[name].reader.images is COCO}
    assert coco == {name for name in files if name.startswith(("llava", "multi", "coco", "ok_", "aok_"))}
    assert [name for name in files if SOURCES[name].reader.images is None] == ["unnatural_instruction"]
    web = SOURCES["webdataset"].reader
    assert (web.extensions, web.captions) == (
        ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tiff", "tif", "jpe", "jfif", "mpo", "apng"),
        ("json", "txt"),
    )
    assert set(web.extensions) == IMAGE_EXTENSIONS, "no sample is told to use the source that it uses"
    assert (SOURCES["laion"].reader.extensions, SOURCES["laion"].reader.captions) == (("jpg", "jpeg"), ("json",))


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("cc_sbu_align", ("a.jpg", "image/a.jpg")),
        (
            "flickr_grounded_caption",
            ("a.jpg", *(f"{n}/a.jpg" for n in ("flickr30k-images", "flickr30k_images", "images"))),
        ),
        ("textcaps_caption", ("a.jpg", "train_images/a.jpg")),
        ("gqa", ("a.jpg", "images/a.jpg")),
        ("ocrvqa", ("a.jpg", "images/a.jpg")),
    ],
)
def test_images_are_looked_for_under_their_publishers_names(source, names):
    assert SOURCES[source].reader.images.alternatives("a.jpg") == names


def test_image_folders_have_their_publishers_names():
    flickr = ("flickr30k-images", "flickr30k_images", "images", "flickr30k/images", "flickr30k/flickr30k-images")
    trained = (
        "train_images",
        "images/train_images",
        *(f"{n}/train_images" for n in ("textvqa", "TextVQA", "textcaps")),
    )
    books = ("images", *(f"{name}/images" for name in ("ocr_vqa", "ocrvqa", "OCR-VQA", "OCRVQA")))
    folders = {
        name: source.reader.images.folders
        for name, source in SOURCES.items()
        if isinstance(source.reader, AnnotationReader) and source.reader.images not in (None, COCO)
    }
    assert folders == {
        "cc_sbu_align": ("image", "images"),
        **dict.fromkeys(("flickr_grounded_caption", "flickr_CaptionToPhrase", "flickr_ObjectToPhrase"), flickr),
        "textcaps_caption": trained,
        "gqa": ("images", "gqa/images", "GQA/images"),
        "ocrvqa": books,
    }
    roots = ("", "coco/", "COCO/", "coco2014/", "coco2017/", "mscoco/", "coco/images/", "images/")
    roots += ("images/mscoco/images/",)
    splits = [f"{root}{split}" for root in roots for split in ("train2014", "train2017")]
    assert COCO.folders == (*splits, "coco/images", "coco_images", "coco")
    assert COCO.splits == {"train2014", "train2017", "val2014", "val2017", "test2015"}


def test_an_input_is_what_the_settings_say():
    given = PrepareDataSettings(source="jsonl", input="a", images="b", name="mine", task="vqa")
    assert locate(given)[1] == SourceInput("jsonl", "a", "b", "mine", "vqa")
    assert locate(PrepareDataSettings(source="gqa", input="a"))[1] == SourceInput("gqa", "a", "", "gqa", "vqa")


def test_a_rows_id_is_its_file_without_the_ending_and_its_key():
    assert UNIT.row_id("7") == "d/a.b/7"


@pytest.mark.parametrize(
    ("text", "longest", "short"),
    [
        ("a" * 100, 100, "a" * 100),
        ("a" * 101, 100, "a" * 75 + " .. (101 characters)"),
        ("a" * 12_345, 100, "a" * 75 + " .. (12,345 characters)"),
        (" a\n b\t", 100, "a b"),
        ("\ud800", 100, "\\ud800"),
    ],
)
def test_a_text_is_cut_to_one_short_line(text, longest, short):
    assert shorten(text, longest) == short and len(short) <= longest
    assert Rejected(text, "x", text * 3).key == shorten(text)
    assert len(Rejected(text, "x", text * 9).reason) <= 300 and len(Rejected(text, "x", text).key) <= 100


@pytest.mark.parametrize(
    ("error", "reason", "filter_name"),
    [
        (Malformed("bad"), "bad", ""),
        (Filtered("min_words", "few"), "few", "min_words"),
        (KeyError("image"), "malformed entry: it has no 'image'", ""),
        (TypeError("no number"), "malformed entry: TypeError no number", ""),
    ],
)
def test_an_error_of_a_row_sets_it_apart(error, reason, filter_name):
    assert rejection(UNIT, "7", error) == Rejected("7", "d/a.b.tar", reason, filter_name)


def test_a_missing_image_says_where_it_was_looked_for():
    error = MissingImage("gone", [Location("", "/a/1.jpg"), Location("s3://b", "1.jpg")])
    missing = (("", "/a/1.jpg"), ("s3://b", "1.jpg"))
    assert rejection(UNIT, "7", error) == Rejected("7", "d/a.b.tar", "gone", missing=missing)


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "disk"), DiskFullError("full")])
def test_what_is_not_the_rows_fault_is_raised_again(error):
    with pytest.raises(type(error)):
        rejection(UNIT, "7", error)


def found(folder, *defaults):
    files = find_input(SourceInput("x", str(folder), "", "x", ""), *defaults)
    return [file.location.path.removeprefix(f"{folder}/") for file in files]


def test_official_files_are_looked_for_in_order_in_the_folder_and_one_below(tmp_path, caplog):
    for name in ("annotations/b.json", "other/a.json", "c.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]")
    assert found(tmp_path, "c.json", "a.json") == ["c.json"], "in the folder itself"
    assert found(tmp_path, "b.json", "a.json") == ["annotations/b.json"], "the first name that is there"
    assert found(tmp_path / "c.json", "a.json") == [str(tmp_path / "c.json")]
    (tmp_path / "annotations/d.json").write_text("[]")
    assert found(tmp_path, "{b,d}.json") == ["annotations/b.json", "annotations/d.json"], "one folder, several files"
    assert found(tmp_path, "{b,e}.json") == ["annotations/b.json"] and found(tmp_path, "{c,e}.json") == ["c.json"]
    assert not caplog.messages, "official files need not all be there, but those that were asked for one by one"
    found(tmp_path / "annotations/{b,e}.json")
    assert ["1 of 2 are missing" in message for message in caplog.messages] == [True]
    (tmp_path / "other/z.json.gz").touch()
    assert found(tmp_path, "x.json", "z.json") == ["other/z.json.gz"], "somebody packed it"
    (tmp_path / "other/b.json").write_text("[]")
    with pytest.raises(SettingsError, match=r"holds b\.json more than once, in .*/annotations and .*/other: name one"):
        found(tmp_path, "b.json")
    with pytest.raises(SettingsError, match=r"matches no file \(looked for .*/x\.json, .*/y\.json\); check the path"):
        found(tmp_path, "x.json", "y.json")
    (tmp_path / "Questions.zip").touch()
    with pytest.raises(SettingsError, match=r"y\.json\); .*/Questions\.zip may hold it: unpack it first\.$"):
        found(tmp_path, "x.json", "y.json")
    with pytest.raises(SettingsError, match=r"source=x needs input=: a\.json, or its folder"):
        find_input(SourceInput("x", "", "", "x", ""), "a.json")
    with pytest.raises(SettingsError, match=r"source=x needs input=: an annotation file, or its folder"):
        find_input(SourceInput("x", "", "", "x", ""))


@pytest.mark.parametrize("name", ["a.zip", "A.ZIP", "a.rar", "a.7z"])
def test_archives_are_to_be_unpacked(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(SettingsError, match="is an archive: unpack it"):
        found(tmp_path / name)
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(SettingsError, match="is a spreadsheet: save it as CSV"):
        found(tmp_path / "a.xlsx")


def test_files_are_units_with_their_size_and_time(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    (file,) = find_input(SourceInput("x", str(tmp_path / "a.json"), "", "x", ""))
    details = SimpleNamespace()
    unit = SourceUnit.of_file(UNIT.source, file, details)
    assert (unit.source, unit.file, unit.details) == (UNIT.source, Location("", f"{tmp_path}/a.json"), details)
    assert (unit.shard, unit.num_bytes, unit.start, unit.stop, unit.first) == ("a.json", 3, 0, 0, 0)
    assert unit.modified_ns == (tmp_path / "a.json").stat().st_mtime_ns


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("jsonl", "a.jsonl"),
        ("csv", "a.csv"),
        ("parquet", "data/a.parquet"),
        ("webdataset", "a.tar"),
        ("gqa", "q/train_balanced_questions.json"),
    ],
)
def test_a_clone_without_its_large_files_is_told(tmp_path, source, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    for given in (tmp_path, tmp_path / name):
        with pytest.raises(
            SettingsError, match=f"{name} is a Git LFS pointer, not the file: fetch it with `git lfs pull`"
        ):
            list(SOURCES[source].reader.plan(SourceInput(source, str(given), str(tmp_path), source, "vqa")))
