"""Samples: which files of a set are cut, unpacked or left out, and how a file on a server is opened."""

from __future__ import annotations

import io
from dataclasses import replace

import httpx
import pytest

from pipelines.data.sources.json_items import Item
from pipelines.fetch import sample as module
from pipelines.fetch.datasets import ByHand, ImageRule, all_sets
from pipelines.fetch.http import DownloadError, Remote, Retries, TryAgainError
from pipelines.fetch.sample import Annotations, Record
from pipelines.settings import FetchSettings
from tinygptv.convert.sources import SourceFile


def annotations(folder, **settings):
    given = FetchSettings(**{"what": ["sample"], "output": str(folder), "quiet": True, **settings})
    return Annotations(given, folder, None, Retries(most=2, sleep=lambda _: None), None, Record(folder, 5))


def test_a_sets_files_are_left_out_unpacked_or_cut_in_their_order(tmp_path, monkeypatch):
    done = []
    (tmp_path / "usb/folder").mkdir(parents=True)
    (tmp_path / "usb/hand.json").write_text("by hand")
    monkeypatch.setattr(Annotations, "_open", lambda self, file: io.BytesIO(file.path.encode()))
    monkeypatch.setattr(
        Annotations,
        "_cut",
        lambda self, each, target, opened: done.append((each.name, opened().read(), target, target.parent.is_dir())),
    )
    monkeypatch.setattr(
        Annotations,
        "_unpack",
        lambda self, each, opened, target, cut: done.append((each.name, opened().read(), target, cut)),
    )
    names = ("g/images.zip", "g/done.json", "g/deep/plain.json", "g/all.zip", "g/refs.zip", "g/last.json")
    each = replace(
        all_sets()["gqa"],
        files=tuple(SourceFile(path=name, name=name, base="https://h/") for name in names),
        of_images=frozenset({"g/images.zip"}),
        archives=frozenset({"g/images.zip", "g/refs.zip", "g/all.zip"}),
        cut={"g/refs.zip": ("g/a.p", "g/b.json")},
        by_hand=tuple(ByHand("https://a", f"g/{name}") for name in ("hand.json", "folder", "none.json")),
    )
    folder = tmp_path / "out"
    folder.mkdir()
    known = annotations(folder, local=[str(tmp_path / "usb")])
    known.record.add("g/done.json")
    known.bring(each)
    assert done == [
        ("gqa", b"g/deep/plain.json", folder / "g/deep/plain.json", True),
        ("gqa", b"g/all.zip", folder / "g/all.zip", ()),
        ("gqa", b"g/refs.zip", folder / "g/refs.zip", ("g/a.p", "g/b.json")),
        ("gqa", b"g/last.json", folder / "g/last.json", True),
        ("gqa", b"by hand", folder / "g/hand.json", True),
    ]
    brought = ["g/done.json", "g/deep/plain.json", "g/all.zip", "g/refs.zip", "g/last.json", "g/hand.json"]
    assert Record(folder, 5).files == known.record.files == brought
    done.clear()
    known.bring(each)
    assert done == [], "all is there"


def test_a_copy_in_its_own_layout_comes_before_a_flat_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("raw/coco/a.json", "raw/a.json", "flat/deep/b.json", "flat/b.json", "flat/c.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    known = annotations(tmp_path / "out", local=["~/raw", "~/flat"])
    found = [known.local(f"coco/{name}") for name in ("a.json", "deep/b.json", "deep/c.json", "deep/d.json")]
    assert found == [*(tmp_path / name for name in ("raw/coco/a.json", "flat/deep/b.json", "flat/c.json")), None]


def test_a_file_of_a_server_is_asked_for_as_it_is_and_redirects_are_followed():
    asked = []

    def answer(request):
        asked.append(
            (request.method, str(request.url), request.headers["Accept-Encoding"], request.headers.get("Authorization"))
        )
        if len(asked) == 1:
            return httpx.Response(302, headers={"Location": "https://cdn/x"})
        return httpx.Response(200, stream=httpx.ByteStream(b"content"))

    remote = Remote("https://h/f", headers={"Authorization": "Bearer t"})
    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        stream = module._WebStream(client, remote, "f")
        assert stream.readable() and stream.read() == b"content"
        stream.close()
    assert asked == [("GET", "https://h/f", "identity", "Bearer t"), ("GET", "https://cdn/x", "identity", None)]
    assert stream.closed and stream._response.is_closed


def test_a_file_that_is_nowhere_is_named(tmp_path):
    page = httpx.MockTransport(lambda request: httpx.Response(200, headers={"Content-Type": "text/html"}))
    with httpx.Client(transport=page) as client:
        known = replace(annotations(tmp_path), client=client, locate=lambda file: Remote(f"https://h/{file.name}"))
        with pytest.raises(DownloadError, match=r"^https://h/x\.json answers with a web page .*, not with g/a\.json: "):
            known._open(SourceFile(path="g/a.json", name="x.json"))
    with pytest.raises(DownloadError, match=r"^offline=true, but g/a\.json is missing: name the folder that holds it"):
        annotations(tmp_path, offline=True)._open(SourceFile(path="g/a.json", name="x.json"))


@pytest.mark.parametrize(("part", "name"), [("_cut", "x.json"), ("_unpack", "x.zip")])
def test_a_server_that_fails_is_tried_again_and_told_with_the_file(tmp_path, part, name):
    calls = []

    def failing():
        calls.append(1)
        raise TryAgainError("cut")

    known, each = annotations(tmp_path), all_sets()["gqa"]
    with pytest.raises(DownloadError, match=f"^{name}: 2 tries failed in a row, the last one with: cut"):
        known._cut(each, tmp_path / name, failing) if part == "_cut" else known._unpack(
            each, failing, tmp_path / name, ()
        )
    assert len(calls) == 2 and [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.parametrize("quiet", [True, False])
def test_an_archive_is_unpacked_as_quietly_as_it_is_asked_for(tmp_path, monkeypatch, quiet):
    unpacked = []
    monkeypatch.setattr(module, "unpack", lambda archive, quiet: unpacked.append((archive.read_bytes(), quiet)))
    known = annotations(tmp_path, quiet=quiet)
    known._unpack(all_sets()["gqa"], lambda: io.BytesIO(b"zip"), tmp_path / "x.zip", ())
    assert unpacked == [(b"zip", quiet)] and list(tmp_path.iterdir()) == []


def test_the_list_of_entries_is_the_one_that_the_sets_reader_reads():
    found = {name: module._member(each) for name, each in all_sets().items()}
    named = {name: member for name, member in found.items() if member}
    assert named == {"cc_sbu_align": "annotations", "coco_caption": "annotations", "textcaps": "data"}
    assert set(found.values()) == {"", "annotations", "data"} and module.DEFAULT_ROWS == 1000


def test_an_entry_without_its_key_is_kept_under_none(tmp_path):
    known = annotations(tmp_path)
    rule = ImageRule("(.*)", "images/{}", fields=("url", "other"), id="image_id")
    entries = [{"image_id": "a", "other": "https://h/2", "url": "http://h/1"}, {"url": "http://h/3"}]
    known._note_urls(replace(all_sets()["gqa"], images=(rule,)), [Item(0, 0, 0, "k", entry) for entry in entries])
    assert known.record.urls == {"gqa": {"a": ["http://h/1", "https://h/2"], "": ["http://h/3"]}}
