"""Single images of samples: which are fetched, from where, and which are left to a person."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest

from pipelines.data.sources.base import Rejected, SourceInput
from pipelines.fetch import single_images
from pipelines.fetch.datasets import ImageRule, all_sets
from pipelines.fetch.http import DownloadError, Remote, Retries
from pipelines.fetch.sample import Annotations, Record
from pipelines.fetch.single_images import ImagesReport, Wanted, fetch_images
from pipelines.settings import FetchSettings, SettingsError

RULES = (
    ImageRule(r"^a(\d+)", "x/{}.jpg", urls=("http://h/{}", "http://i/{}")),
    ImageRule(r"^w(\d+)", "w/{}.jpg", fields=("url",)),
    ImageRule(r"^z(\d+)", "z/{}.jpg"),
)


def annotations(folder, client=None, most=3, **settings):
    given = FetchSettings(**{"what": ["sample"], "output": str(folder), "quiet": True, **settings})
    return Annotations(given, folder, client, Retries(most=most, sleep=lambda _: None), None, Record(folder, 5))


def test_images_with_an_address_or_a_local_copy_are_fetched_and_the_others_told(tmp_path, monkeypatch):
    gqa, asked = all_sets()["gqa"], []
    first = replace(gqa, name="first", images=RULES, gigabytes=2.5, input="in")
    user = replace(gqa, name="user", images=(), needs=("first",), gigabytes=0)
    other = replace(gqa, name="other", images=(replace(RULES[0], urls=("http://other/{}",)),), needs=())
    names = {"first": ["a1", "w1", "w2", "z1", "z2", "none"], "user": ["a3", "a1", "none"], "other": ["a1"]}
    monkeypatch.setattr(single_images, "all_sets", lambda: {"first": first})
    monkeypatch.setattr(single_images, "_missing", lambda each, folder: names[each.name])
    monkeypatch.setattr(single_images, "_fetch_all", lambda known, wanted: asked.append(wanted) or 2)
    (tmp_path / "usb").mkdir()
    (tmp_path / "usb/1.jpg").touch()
    folder = tmp_path / "out"
    known = annotations(folder, local=[str(tmp_path / "usb")])
    known.record.urls["first"] = {"1": ["http://w/1"]}
    report = fetch_images(known, [first, user, other])
    assert asked == [
        {
            folder / "x/1.jpg": Wanted(("http://h/1", "http://i/1")),
            folder / "w/1.jpg": Wanted(("http://w/1",), of_web=True),
            folder / "w/2.jpg": Wanted((), of_web=True),
            folder / "z/1.jpg": Wanted(),
            folder / "x/3.jpg": Wanted(("http://h/3", "http://i/3")),
        }
    ]
    end = "alone (docs/datasets.md). Unpack it, and name its folder with local=."
    assert report == ImagesReport(
        3,
        2,
        [
            f"first: 2 images are missing; their publisher has them in an archive of 2.5 GB {end}",
            f"user: 1 images are missing; their publisher has them in an archive {end}",
        ],
    )
    assert {path.name for path in folder.iterdir()} == {"x", "w", "z"}, "readers look for these folders"


class Source:
    """A source whose reader rejects rows for their images."""

    task = "vqa"

    def __init__(self, name, asked):
        self.name, self.asked, self.reader = name, asked, self

    def plan(self, given):
        if self.name == "broken":
            raise SettingsError("annotations are missing")
        self.asked.append(given)
        return [f"{self.name}1", f"{self.name}2"]

    def read(self, unit):
        for missing in ((("", f"x/{unit}.jpg"), ("", "elsewhere")), (), (("", "y/both.jpg"),)):
            yield Rejected("row", "shard", "its image is missing", missing=missing)


def test_sets_that_cannot_be_read_yet_lack_nothing_and_the_others_are_read(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(single_images, "SOURCES", {name: Source(name, asked) for name in ("a", "broken", "b")})
    each = replace(all_sets()["gqa"], sources=("a", "broken", "b"), input="in")
    assert single_images._missing(each, tmp_path) == [] == asked, "there is nothing to read"
    (tmp_path / "in").mkdir()
    assert single_images._missing(each, tmp_path) == ["a1.jpg", "both.jpg", "a2.jpg", "b1.jpg", "b2.jpg"]
    assert asked == [SourceInput(name, f"{tmp_path}/in", "", name, "vqa") for name in "ab"]


def served(answers, asked):
    def answer(request):
        asked.append(str(request.url))
        return httpx.Response(answers[request.url.path[1:]], content=b"image")

    return httpx.Client(transport=httpx.MockTransport(answer))


@pytest.mark.parametrize(("of_web", "most", "tries"), [(False, 4, 4), (True, 4, 2), (True, 1, 1)])
def test_a_server_of_the_open_web_is_asked_twice_at_most(tmp_path, of_web, most, tries):
    with served({"a": 503}, asked := []) as client:
        known = annotations(tmp_path, client, most=most, mirror="http://mirror/")
        image = Wanted(("http://h/a?x=1",), of_web)
        if of_web:
            assert single_images._fetch_one(known, tmp_path / "a.jpg", image) is False
        else:
            told = rf"^a\.jpg from http://mirror/a\?x=1: {most} tries failed in a row, the last one with: HTTP 503"
            with pytest.raises(DownloadError, match=told):
                single_images._fetch_one(known, tmp_path / "a.jpg", image)
    assert asked == ["http://mirror/a?x=1"] * tries and list(tmp_path.iterdir()) == []


def test_a_local_copy_comes_before_every_server(tmp_path):
    (tmp_path / "usb/x").mkdir(parents=True)
    (tmp_path / "usb/x/a.jpg").write_bytes(b"local")
    (tmp_path / "out/x").mkdir(parents=True)
    known = annotations(tmp_path / "out", local=[str(tmp_path / "usb")], offline=True)
    assert single_images._fetch_one(known, tmp_path / "out/x/a.jpg", Wanted(("http://h/a",))) is True
    assert (tmp_path / "out/x/a.jpg").read_bytes() == (tmp_path / "usb/x/a.jpg").read_bytes() == b"local"
    assert single_images._fetch_one(known, tmp_path / "out/x/b.jpg", Wanted(("http://h/a",))) is False


def test_an_answer_that_is_no_image_names_it():
    page = httpx.MockTransport(lambda request: httpx.Response(200, headers={"Content-Type": "text/html"}, content=b"x"))
    told = r"^https://\*\*\*@h/a answers with a web page of .*, not with a\.jpg"
    with httpx.Client(transport=page) as client, pytest.raises(DownloadError, match=told):
        single_images._get(client, Remote("https://me:pw@h/a"), "a.jpg")


@pytest.mark.parametrize("quiet", [True, False])
def test_progress_is_shown_where_there_is_something_to_fetch(tmp_path, monkeypatch, quiet):
    bars, pools, bar, pool = [], [], single_images.Bar, single_images.ThreadPoolExecutor
    monkeypatch.setattr(
        single_images, "Bar", lambda title, quiet: bars.append((title, quiet)) or bar(title, quiet=True)
    )
    monkeypatch.setattr(single_images, "ThreadPoolExecutor", lambda size: pools.append(size) or pool(size))
    monkeypatch.setattr(single_images, "_fetch_one", lambda known, path, image: False)
    known = annotations(tmp_path, quiet=quiet)
    assert single_images._fetch_all(known, {}) == 0
    assert single_images._fetch_all(known, {tmp_path / name: Wanted() for name in "abc"}) == 3
    assert bars == [("images", True), ("images", quiet)] and pools == [16, 16]
