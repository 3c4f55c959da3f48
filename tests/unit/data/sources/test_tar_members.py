"""Members of a tar and files of a folder: which belong to a sample, which are none, and what each is called."""

from __future__ import annotations

import pytest

from pipelines import storage
from pipelines.data.sources import SOURCES, tar
from pipelines.data.sources.base import Malformed, SourceInput
from pipelines.data.sources.tar import Group, _folder_groups, _json_caption, _member_problem, _sample_folders
from pipelines.data.sources.tar_scan import Member
from tests.source_files import encode, jpeg, picture, sample, write_tar
from tinygptv.data.sample import SampleRow

FILE = Member("x", 512, 1, 0, is_file=True, is_folder=False)
LINK = Member("x", 512, 0, 0, is_file=False, is_folder=False)


@pytest.mark.parametrize(
    ("name", "extension", "member", "problem"),
    [
        ("a/b.jpg", "jpg", FILE, ""),
        ("a..b/c.jpg", "jpg", FILE, ""),
        ("caf\u00e9\udc7f.jpg", "jpg", FILE, ""),
        ("a/../b.jpg", "jpg", FILE, "member a/../b.jpg is outside of its folder"),
        ("/b.jpg", "jpg", FILE, "member /b.jpg is outside of its folder"),
        ("README", "", FILE, "member README is not named key.extension"),
        ("a.jpg", "jpg", LINK, "member a.jpg is a link or device, not a file"),
        ("\udc80.jpg", "jpg", FILE, "the member's name is not UTF-8"),
        ("\udcff.jpg", "jpg", FILE, "the member's name is not UTF-8"),
    ],
)
def test_what_is_wrong_with_a_member(name, extension, member, problem):
    assert _member_problem(name, extension, member) == problem


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"caption": "a"}', ("a", "")),
        ('{"text": "b", "caption": "a"}', ("a", "")),
        ('{"caption": null, "TEXT": "c"}', ("c", "")),
        ('{"caption": ""}', ("", "")),
        ('{"caption": "tab\there"}', ("tab\there", "")),
        ("[1]", (None, "the .json member is no object but list")),
        ("{}", (None, "the .json member has no caption among no fields")),
        ('{"url": 1, "key": 2}', (None, "the .json member has no caption among url, key")),
        ('{"caption": 3, "text": "b"}', (None, "the caption is no text but int")),
    ],
)
def test_the_caption_of_a_json_member(text, found):
    assert _json_caption(text) == found


def read(path, source="laion", task=""):
    reader = SOURCES[source].reader
    given = SourceInput(source, str(path), "", source, task)
    found = [found for unit in reader.plan(given) for found in reader.read(unit)]
    rows = [entry for entry in found if isinstance(entry, SampleRow)]
    return rows, [(entry.key, entry.shard, entry.reason) for entry in found if not isinstance(entry, SampleRow)]


def test_members_of_folders_and_systems_are_no_samples(tmp_path):
    members = [("./.DS_Store", b"x"), ("./__MACOSX/a.jpg", b"x"), ("./d/._a.jpg", b"x"), ("d/Thumbs.db", b"x")]
    members += [(f"./{name}", data) for name, data in sample("d/a", jpeg(0), "one")]
    rows, rejected = read(write_tar(tmp_path / "0.tar", members))
    assert [row.id for row in rows] == ["0/d/a"] and rejected == []


def test_a_rows_task_is_that_of_the_input_or_of_a_pair(tmp_path):
    path = write_tar(tmp_path / "0.tar", sample("a", jpeg(0), "one"))
    assert [read(path, "webdataset", task)[0][0].task for task in ("", "align")] == ["pair", "align"]


def test_texts_are_read_where_they_are_needed_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "_MOST_TEXT_BYTES", 16)
    image, text = ("a.jpg", jpeg(0)), b'{"caption": "x"}'
    assert len(text) == 16
    for members, reason in (
        ([image, ("a.json", text)], None),
        ([image, ("a.json", text + b" ")], "the .json member has 17 bytes"),
        ([image, ("a.json", text), ("a.txt", b"caf\xe9")], "the .txt member is not UTF-8 text (byte 3)"),
        ([image, ("a.txt", b"x")], "no .json member with a caption"),
    ):
        rows, rejected = read(write_tar(tmp_path / "0.tar", members))
        assert [found[2] for found in rejected] == ([] if reason is None else [reason]) and len(rows) == (not reason)
    rows, _ = read(write_tar(tmp_path / "0.tar", [image, ("a.json", b"[1]"), ("a.txt", b"from text")]), "webdataset")
    assert rows[0].turns[0].answers == ("from text",)
    rows, _ = read(
        write_tar(tmp_path / "0.tar", [image, ("a.json", b'{"caption": ""}'), ("a.txt", b"x")]), "webdataset"
    )
    assert rows[0].turns[0].answers == ("",), "an empty caption is one"
    both = [("a.png", encode(picture(1), "PNG")), image, ("a.txt", b"from text"), ("a.json", text)]
    (row,), _ = read(write_tar(tmp_path / "0.tar", both), "webdataset")
    assert (row.image, row.turns[0].answers) == (image[1], ("x",)), "in the reader's order, not the tar's"
    _, [(_, _, reason)] = read(write_tar(tmp_path / "0.tar", [image]), "webdataset")
    assert reason == "no .json or .txt member with a caption"


def test_what_is_cut_off_is_told_with_the_sample_or_the_tar(tmp_path):
    whole = write_tar(tmp_path / "0.tar", [*sample("a", jpeg(0), "one"), ("a.extra", b"x" * 600)]).read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: len(whole.rstrip(b"\0")) - 10])
    rows, rejected = read(tmp_path / "0.tar")
    assert len(rows) == 1, "the sample did not need it"
    assert rejected == [("", "0.tar", "the tar is cut off inside member a.extra")]
    members = [("a.jpg", jpeg(0)), ("a.json", b'{"caption": "one"}' + b" " * 600)]
    whole = write_tar(tmp_path / "0.tar", members).read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: len(whole.rstrip(b"\0")) - 10])
    rows, rejected = read(tmp_path / "0.tar")
    told = "the tar is cut off inside member a.json; no .json member with a caption"
    assert (rows, rejected) == ([], [("a", "0.tar", told)])


def test_a_group_with_a_problem_is_not_split():
    group = Group("a", {"1.jpg": bytes, "2.jpg": bytes, "1.json": bytes}, problem="odd")
    assert tar._split_dotted(group) == [group]
    group.problem, group.cut = "", "cut"
    parts = tar._split_dotted(group)
    assert [(part.key, list(part.members), part.cut) for part in parts] == [
        ("a.1", ["jpg", "json"], "cut"),
        ("a.2", ["jpg"], "cut"),
    ]
    undotted = Group("a", {"json": bytes, "1.jpg": bytes})
    assert [part.key for part in tar._split_dotted(undotted)] == ["a", "a.1"]
    alone = Group("a", {"x.json": bytes, "y.txt": bytes})
    assert tar._split_dotted(alone) == [alone], "no image anywhere"
    plain = Group("a", {"jpg": bytes, "1.json": bytes})
    assert tar._split_dotted(plain) == [plain]


def test_files_of_a_folder_are_samples_by_name(tmp_path):
    for name in ("b.JPG", "b.json", "a.x.png", "a.x.TXT", ".c.jpg", "d", "e.md", ".jpg", "f.jpg"):
        (tmp_path / name).write_text(name)
    groups = _folder_groups(storage.Location.parse(str(tmp_path)))
    assert [(group.key, sorted(group.members)) for group in groups] == [
        ("a.x", ["png", "txt"]),
        ("b", ["jpg", "json"]),
        ("f", ["jpg"]),
    ]
    (tmp_path / "b.jpg").write_text("another")
    assert [group.problem for group in _folder_groups(storage.Location.parse(str(tmp_path)))] == [
        "", "file b.jpg is its second .jpg file", "",
    ]  # fmt: skip
    assert groups[1].members["jpg"]() == b"b.JPG"


def test_folders_of_samples_have_images_and_texts(tmp_path):
    for name in (
        "a/1.JPG",
        "a/1.txt",
        "b/1.jpg",
        "b/1.md",
        "c/1.json",
        ".d/1.jpg",
        ".d/1.txt",
        "e/f/1.jpg",
        "e/f/1.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = list(_sample_folders(storage.Location.parse(str(tmp_path))))
    assert [(folder.path, name) for folder, name in found] == [(f"{tmp_path}/a", "a")]
    (tmp_path / "1.png").touch(), (tmp_path / "1.json").touch()
    assert [name for _, name in _sample_folders(storage.Location.parse(str(tmp_path)))] == [tmp_path.name, "a"]


def test_tars_one_folder_down_are_found_without_a_warning(tmp_path, caplog):
    for name in ("x/1.tgz", "x/0.tar", "y/z/2.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = tar._find_tars(storage.Location.parse(str(tmp_path)))
    assert [file.name for file in found] == ["0.tar", "1.tgz"] and not caplog.text
    (tmp_path / "3.tar.zst").touch()
    assert [file.name for file in tar._find_tars(storage.Location.parse(str(tmp_path)))] == ["3.tar.zst"]


def test_a_plain_local_tar_is_read_where_it_is(tmp_path):
    path = write_tar(tmp_path / "0.tar", sample("a", jpeg(0), "one"))
    with tar._local_copy(storage.Location.parse(str(path))) as (local, damage):
        assert (local, damage) == (path, "")
    storage.write_atomically("memory://tars/0.tar", path.read_bytes())
    with tar._local_copy(storage.Location.parse("memory://tars/0.tar")) as (local, damage):
        assert (local.read_bytes(), damage) == (path.read_bytes(), "") and local.name == "shard.tar"
        assert local.parent.name.startswith("tar-")
    assert not local.exists()


def test_json_that_is_broken_is_malformed():
    with pytest.raises(Malformed, match=r"the \.json member is no valid JSON: Expecting"):
        _json_caption("{")
