"""Images that annotations name: which names are there, which lead out, and which folder holds them."""

from __future__ import annotations

import base64
import errno
import os
import urllib.parse
from unittest.mock import Mock

import pytest

from pipelines import storage
from pipelines.data.sources.base import Malformed, MissingImage, SourceInput
from pipelines.data.sources.images import (
    COCO,
    IMAGE_EXTENSIONS,
    ImageFolder,
    ImageLayout,
    check_image_name,
    coco_names,
    find_image_folder,
)
from pipelines.settings import SettingsError
from pipelines.storage import Location
from tests.source_files import encode, jpeg, picture


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(jpeg(0))
    (tmp_path / "secret.jpg").write_bytes(jpeg(1))
    return tmp_path / "images"


def reader(folder, **more):
    return ImageFolder(Location.parse(str(folder)), **more)


def test_names_below_the_folder(folder):
    images = reader(folder)
    for name in ("a.jpg", "./a.jpg", str(folder / "a.jpg"), f"file://{folder}/a.jpg", f"file://{folder}/%61.jpg"):
        assert images.read(name) == jpeg(0)
    (folder / "sub").mkdir()
    (folder / "sub/b.jpg").write_bytes(jpeg(2))
    (folder / "sub/a.jpg").write_bytes(jpeg(3))
    assert images.read("sub\\b.jpg") == images.read("sub/b.jpg") == jpeg(2)
    assert images.read("sub/a.jpg") == jpeg(3), "another image of that name was read before"


@pytest.mark.security
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.jpg", "outside of the image folder"),
        ("sub/../../secret.jpg", "outside of the image folder"),
        ("..\\secret.jpg", "outside of the image folder"),
        ("/etc/passwd", "give the folder that holds it as images="),
        ("file:///etc/a.jpg", "give the folder that holds it as images="),
        ("", "name is empty"),
        ("  ", "name is empty"),
        ("https://example.com/a.jpg", "is a URL: download it"),
        ("s3://bucket/a.jpg", "is a URL"),
        ("b.jpg", "is missing in"),
        ("a" * 5000 + ".jpg", "cannot be read"),
        ("a\0b.jpg", "outside of the image folder"),
        ("\ud800.jpg", "half a surrogate pair"),
        (".", "outside of the image folder"),
        ("data:image/jpeg;base64,!!!", "cannot be decoded"),
        ("data:image/jpeg,abc", "does not hold an image in a known format"),
        ("data:image/jpeg;base64", "does not begin with data:"),
    ],
)
def test_names_that_cannot_be_read(folder, name, reason):
    with pytest.raises(Malformed, match=reason) as error:
        reader(folder).read(name)
    assert len(str(error.value)) < 320 + len(str(folder))


@pytest.mark.security
def test_a_name_that_looks_like_options_is_a_file_name(folder):
    name = "a.jpg?endpoint_override=evil:9000&scheme=http"
    with pytest.raises(MissingImage, match="is missing"):
        reader(folder).read(name)
    (folder / name).write_bytes(jpeg(3))
    assert reader(folder).read(name) == jpeg(3)


def test_data_urls_hold_the_image(folder):
    text = base64.b64encode(jpeg(4)).decode()
    wrapped = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    quoted = urllib.parse.quote(text, safe="")
    for body in (text, wrapped, text.replace("+", "-"), text.replace("/", "_"), quoted):
        assert reader(folder).read(f"data:;base64,{body}") == jpeg(4)
    assert {"+", "/"} < set(text) and "%" in quoted
    for url in (f"data:image/jpeg;base64,{text}", f"DATA:image/jpeg;a=b;BASE64,{text}", text, wrapped):
        assert reader(folder).read(url) == jpeg(4)


def test_errors_of_the_disk_are_not_the_rows_fault(folder, monkeypatch):
    def failing(location):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(storage, "read_bytes", failing)
    with pytest.raises(OSError, match="Input/output"):
        reader(folder).read("a.jpg")


def test_a_missing_image_is_named_with_the_names_that_were_tried(folder):
    def told(*more):
        with pytest.raises(MissingImage) as error:
            reader(folder, alternatives=lambda name: (name, *more)).read("b.jpg")
        return str(error.value)

    assert told() == told("c.jpg") == f"image b.jpg is missing in {folder}"
    assert told("c.jpg", "d.jpg", "e.jpg") == (
        f"image b.jpg is missing in {folder}; also looked for c.jpg and 2 more names"
    )


@pytest.mark.parametrize("forms", [("caf\u00e9.jpg", "cafe\u0301.jpg"), ("\ud55c.jpg", "\u1112\u1161\u11ab.jpg")])
def test_a_name_is_found_as_macos_writes_it_and_as_others_do(folder, forms):
    for named, there in (forms, forms[::-1]):
        (folder / there).write_bytes(jpeg(7))
        assert reader(folder).read(named) == jpeg(7)
        (folder / there).unlink()


def test_a_folder_is_no_image(folder):
    (folder / "b.jpg").mkdir()
    with pytest.raises(Malformed, match=r"^image b\.jpg cannot be read: "):
        reader(folder).read("b.jpg")


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("a.png", ("a.png",)),
        ("x/cat.jpg", ("cat.jpg", "x/cat.jpg")),
        ("1234567890123.jpg", None),
        ("vg/VG_100K/9.jpg", ("9.jpg", "vg/VG_100K/9.jpg")),
        ("gqa/images/498027.jpg", ("498027.jpg", "gqa/images/498027.jpg")),
    ],
)
def test_names_that_are_no_number_of_coco_are_taken_as_they_are(name, names):
    assert coco_names(name) == (names or (name,))


def test_missing_images_say_where_they_were_looked_for(folder):
    with pytest.raises(MissingImage) as error:
        reader(folder, alternatives=lambda name: (name, f"sub/{name}")).read("b.jpg")
    assert error.value.looked_for == (Location.parse(f"{folder}/b.jpg"), Location.parse(f"{folder}/sub/b.jpg"))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "HTML page"),
        (b"<?xml version='1.0'?><Error>", "XML"),
        (b"<svg xmlns=", "SVG"),
        *((b"\x00\x00\x00\x18ftyp" + brand, "a HEIC image") for brand in (b"heic", b"heix", b"mif1")),
        *((b"\x00\x00\x00" + size + b"ftypavif", "an AVIF image") for size in (b"\x1c", b" ", b"\x2c")),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "a JPEG XL image"),
        (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "a JPEG 2000 image"),
        (b"anything", "known format"),
        (encode(picture(0), "PNG"), "wrong extension: it holds a PNG"),
    ],
)
def test_bytes_that_are_no_such_image_are_called_what_they_are(data, what):
    with pytest.raises(Malformed, match=what):
        check_image_name("a.jpg", data)


FORMATS = (
    ("JPEG", b"\xff\xd8\xff\xe0", {"jpg", "jpeg", "jpe", "jfif", "mpo"}),
    ("PNG", b"\x89PNG\r\n\x1a\n", {"png", "apng"}),
    ("GIF", b"GIF89a", {"gif"}),
    ("BMP", b"BM", {"bmp"}),
    ("TIFF", b"II*\x00", {"tif", "tiff"}),
    ("TIFF", b"MM\x00*", {"tif", "tiff"}),
    ("WEBP", b"RIFF", {"webp"}),
)


@pytest.mark.parametrize(("kind", "data", "extensions"), FORMATS)
def test_each_format_has_extensions_of_its_own(kind, data, extensions):
    assert frozenset().union(*(names for _, _, names in FORMATS)) == IMAGE_EXTENSIONS
    for extension in (*extensions, *map(str.upper, extensions), "image", "7"):
        check_image_name(f"a.{extension}", data + b"more")
    for extension in IMAGE_EXTENSIONS - extensions:
        with pytest.raises(Malformed, match=rf"^image b\.{extension} has a wrong extension: it holds a {kind}$"):
            check_image_name(f"b.{extension}", data + b"more")


# ---------------------------------------------------------------- COCO, in every layout


@pytest.mark.parametrize(
    "asked",
    ["COCO_train2014_000000000009.jpg", "000000000009.jpg", "train2014/COCO_train2014_000000000009.jpg", "9.jpg"],
)
@pytest.mark.parametrize(
    "there",
    [
        "COCO_train2014_000000000009.jpg",
        "train2014/COCO_train2014_000000000009.jpg",
        "train2017/000000000009.jpg",
        "val2014/COCO_val2014_000000000009.jpg",
        "val2017/000000000009.jpg",
        "000000000009.jpg",
    ],
)
def test_a_coco_image_is_found_under_every_name_that_it_has(tmp_path, asked, there):
    path = tmp_path / there
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(jpeg(0))
    images = reader(tmp_path, alternatives=coco_names)
    assert images.read(asked) == jpeg(0)


@pytest.mark.parametrize("asked", ["COCO_val2014_000000000009.jpg", "val2014/COCO_val2014_000000000009.jpg"])
def test_a_coco_image_of_validation_is_found_in_its_own_folder_alone(tmp_path, asked):
    for folder in ("train2014", "val2014"):
        (tmp_path / folder).mkdir()
    (tmp_path / "train2014/COCO_train2014_000000000009.jpg").write_bytes(jpeg(1))
    with pytest.raises(MissingImage):
        reader(tmp_path, alternatives=coco_names).read(asked)
    (tmp_path / "val2014/COCO_val2014_000000000009.jpg").write_bytes(jpeg(0))
    assert reader(tmp_path, alternatives=coco_names).read(asked) == jpeg(0)
    with pytest.raises(MissingImage):
        reader(tmp_path / "train2014", alternatives=coco_names).read(asked)


def test_the_name_that_was_found_last_is_tried_first(tmp_path, monkeypatch):
    (tmp_path / "train2017").mkdir()
    for n in range(3):
        (tmp_path / f"train2017/{n:012d}.jpg").write_bytes(jpeg(n))
    tried = []
    original = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda at: (tried.append(at.path), original(at))[1])
    images = reader(tmp_path, alternatives=coco_names)
    for n in range(3):
        images.read(f"COCO_train2014_{n:012d}.jpg")
    assert [path.endswith(f"train2017/{n:012d}.jpg") for n, path in enumerate(tried[-2:], 1)] == [True, True]
    images = reader(tmp_path, alternatives=lambda name: (name, f"train2017/{name}"))
    images.read(f"{0:012d}.jpg")
    tried.clear()
    images.read(f"{1:012d}.jpg")
    assert tried == [f"{tmp_path}/train2017/{1:012d}.jpg"], "the last one, too"


def test_a_name_with_fewer_alternatives_is_found_after_one_with_more(folder):
    (folder / "deep").mkdir()
    (folder / "deep/b.jpg").write_bytes(jpeg(1))
    images = reader(folder, alternatives=lambda name: (name, f"deep/{name}") if name == "b.jpg" else (name,))
    assert images.read("b.jpg") == jpeg(1)
    assert images.read("a.jpg") == jpeg(0)


@pytest.mark.parametrize(
    ("annotations", "images", "found"),
    [
        ("vqa/vqa_train.json", "vqa/train2014", "vqa"),
        ("vqa/vqa_train.json", "coco/train2014", "coco"),
        ("coco/annotations/captions_train2014.json", "coco/train2014", "coco"),
        ("coco/annotations/captions_train2014.json", "coco/images/train2017", "coco/images"),
        ("llava/conversation_58k.json", "coco/train2017", "coco"),
        ("a/b/c.json", "coco/images", "coco/images"),
        *(("a/b.json", f"{name}/train2014", name) for name in ("COCO", "coco2014", "coco2017", "mscoco", "images")),
    ],
)
def test_coco_folders_are_looked_for_beside_and_above(tmp_path, annotations, images, found):
    (tmp_path / images).mkdir(parents=True)
    file = Location.parse(str(tmp_path / annotations))
    source = SourceInput("coco_vqa", "", "", "coco_vqa", "vqa")
    assert find_image_folder(source, file, COCO).path == str(tmp_path / found)


def test_the_nearest_folder_counts_and_of_several_beside_it_the_first(tmp_path):
    file = Location.parse(str(tmp_path / "far/up/here/y.json"))
    layout = ImageLayout(("one", "two/deep"))

    def found(images="", layout=layout):
        return find_image_folder(SourceInput("gqa", "", images, "gqa", "vqa"), file, layout).path

    (tmp_path / "one").mkdir()
    (tmp_path / "far/up/here").mkdir(parents=True)
    (tmp_path / "far/one").touch()  # no folder
    with pytest.raises(SettingsError) as error:
        found()
    looked = [f"{tmp_path}/far/{folder}{name}" for folder in ("up/here/", "up/", "") for name in ("one", "two/deep")]
    assert str(error.value) == (
        "source=gqa needs images=: the folder that holds its images; looked for "
        f"{', '.join(looked)} and the same in the folders above."
    )
    (tmp_path / "far/one").unlink()
    for name in ("far/one", "far/up/two/deep", "far/up/one", "far/up/here/two/deep"):
        (tmp_path / name).mkdir(parents=True)
        assert found() == str(tmp_path / name)
    assert found(str(tmp_path / "one")) == str(tmp_path / "one"), "the settings win"
    assert found(layout=ImageLayout((".", "one"))) == str(tmp_path / "far/up/one")
    assert found(layout=ImageLayout((".", "none"))) == str(tmp_path / "far/up/here"), "where none of the others is"


def test_an_image_of_several_entries_is_read_once(folder, monkeypatch):
    read, original = [], storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda at: read.append(at.name) or original(at))
    for number in range(33):
        (folder / f"{number}.jpg").write_bytes(jpeg(7))
    images = reader(folder)
    for number in (0, 0, *range(1, 32), 0, 32, 1, 0):
        images.read(f"{number}.jpg")
    assert read == [f"{number}.jpg" for number in (0, *range(1, 32), 32, 1)], "the last 32 are kept"


@pytest.mark.parametrize(
    "number",
    [
        errno.EISDIR,
        errno.EACCES,
        errno.EPERM,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.EINVAL,
        errno.EILSEQ,
        errno.ENXIO,
    ],
)
def test_an_error_of_one_file_costs_its_row_alone(folder, monkeypatch, number):
    monkeypatch.setattr(storage, "read_bytes", Mock(side_effect=OSError(number, "x")))
    with pytest.raises(Malformed, match=rf"^image a\.jpg cannot be read: {os.strerror(number)}$"):
        reader(folder).read("a.jpg")


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT, errno.EMFILE, errno.ENOMEM, errno.ESTALE])
def test_an_error_of_the_disk_or_network_ends_the_run(folder, monkeypatch, number):
    monkeypatch.setattr(storage, "read_bytes", Mock(side_effect=OSError(number, "x")))
    with pytest.raises(OSError) as error:
        reader(folder).read("a.jpg")
    assert error.value.errno == number


def test_folders_that_are_not_there_are_listed(tmp_path):
    file = Location.parse(str(tmp_path / "x/y.json"))
    with pytest.raises(SettingsError, match=r"needs images=: .*x/pictures.*folders above"):
        find_image_folder(SourceInput("gqa", "", "", "gqa", "vqa"), file, ImageLayout(("pictures",)))
    for nowhere in (f"{tmp_path}/nowhere", f"memory://bucket/{tmp_path.name}/nowhere"):
        with pytest.raises(SettingsError, match=f"images='{nowhere}' is no folder; give the one .* images of gqa"):
            find_image_folder(SourceInput("gqa", "", nowhere, "gqa", "vqa"), file, ImageLayout())


def test_a_file_that_may_not_be_read_is_not_missing(folder, monkeypatch):
    for number, kind in ((errno.EACCES, Malformed), (errno.ENOENT, MissingImage), (errno.ENOTDIR, MissingImage)):

        def failing(location, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(storage, "read_bytes", failing)
        with pytest.raises(Malformed) as error:
            reader(folder).read("a.jpg")
        assert type(error.value) is kind


@pytest.mark.security
def test_a_folder_whose_name_begins_alike_is_another(folder):
    other = folder.with_name("images-of-others")
    other.mkdir()
    (other / "a.jpg").write_bytes(jpeg(3))
    with pytest.raises(Malformed, match="outside of the image folder"):
        reader(folder).read(str(other / "a.jpg"))
