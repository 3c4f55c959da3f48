"""Single images of samples: which are fetched, from where, and which are left to a person."""

from __future__ import annotations

import errno
from dataclasses import replace
from unittest.mock import Mock

import httpx
import pytest

from pipelines import storage
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
    monkeypatch.setattr(single_images, "_missing", lambda each, folder: names[each.name] if folder == out else [])
    monkeypatch.setattr(
        single_images, "_fetch_all", lambda given, wanted: asked.append(wanted) or (2 if given is known else 0)
    )
    (tmp_path / "usb").mkdir()
    (tmp_path / "usb/1.jpg").touch()
    folder = out = tmp_path / "out"
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
        for missing in ((("", f"x/deep/{unit}.jpg"), ("", "elsewhere")), (), (("", "y/both.jpg"),)):
            yield Rejected("row", "shard", "its image is missing", missing=missing)


def test_sets_that_cannot_be_read_yet_lack_nothing_and_the_others_are_read(tmp_path, monkeypatch, caplog):
    asked = []
    caplog.set_level("DEBUG", "pipelines.fetch.single_images")
    monkeypatch.setattr(single_images, "SOURCES", {name: Source(name, asked) for name in ("a", "broken", "b")})
    each = replace(all_sets()["gqa"], sources=("a", "broken", "b"), input="in")
    assert single_images._missing(each, tmp_path) == [] == asked, "there is nothing to read"
    (tmp_path / "in").mkdir()
    assert single_images._missing(each, tmp_path) == ["a1.jpg", "both.jpg", "a2.jpg", "b1.jpg", "b2.jpg"]
    assert asked == [SourceInput(name, f"{tmp_path}/in", "", name, "vqa") for name in "ab"]
    assert caplog.messages == ["broken: annotations are missing"]


def served(answers, asked):
    """Answers by path: a status with an image, or where it is."""

    def answer(request):
        asked.append(str(request.url))
        found = answers[request.url.path[1:]]
        if isinstance(found, str):
            return httpx.Response(302, headers={"Location": found})
        return httpx.Response(found, content=b"" if found == 204 else b"image")

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


@pytest.mark.parametrize(
    ("of_web", "names", "asked", "got"),
    [
        (False, "gone missing good good", "gone missing good", True),
        (False, "moved", "moved good", True),
        (False, "gone", "gone", False),
        (True, "refused good", "refused good", True),
        (True, "empty good", "empty empty good", True),
        (True, "refused", "refused", False),
    ],
)
def test_an_image_comes_from_the_first_address_that_has_it(tmp_path, caplog, of_web, names, asked, got):
    caplog.set_level("DEBUG", "pipelines.fetch.single_images")
    answers = {"gone": 410, "missing": 404, "good": 200, "moved": "/good", "refused": 403, "empty": 204}
    with served(answers, seen := []) as client:
        image = Wanted(tuple(f"http://h/{name}" for name in names.split()), of_web)
        assert single_images._fetch_one(annotations(tmp_path, client), tmp_path / "a.jpg", image) is got
    assert seen == [f"http://h/{name}" for name in asked.split()]
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == ([("a.jpg", b"image")] if got else [])
    told = {"refused": "http://h/refused refuses access", "empty": "a.jpg from http://h/empty: 2 tries failed in a row"}
    logged = [record.getMessage() for record in caplog.records if record.levelname == "DEBUG"]
    assert len(logged) == of_web and all(text.startswith(told[names.split()[0]]) for text in logged)
    if names.startswith("empty"):
        assert "the last one with: the answer is empty. What" in logged[0]


def test_an_image_is_named_in_what_is_told_of_it(tmp_path, monkeypatch):
    page = httpx.MockTransport(lambda request: httpx.Response(200, headers={"Content-Type": "text/html"}, content=b"x"))
    image = Wanted(("http://h/a",))
    with (
        httpx.Client(transport=page) as client,
        pytest.raises(DownloadError, match=r"a web page of .*not with a\.jpg"),
    ):
        single_images._fetch_one(annotations(tmp_path, client), tmp_path / "a.jpg", image)
    monkeypatch.setattr(storage, "write_atomically", Mock(side_effect=OSError(errno.ENOSPC, "full")))
    full = rf"^no space left while writing {tmp_path}/a\.jpg: "
    with served({"a": 200}, []) as client, pytest.raises(storage.DiskFullError, match=full):
        single_images._fetch_one(annotations(tmp_path, client), tmp_path / "a.jpg", image)


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
    bars, pools, shown, asked, pool = [], [], [], [], single_images.ThreadPoolExecutor

    class Noted(single_images.Bar):
        def __init__(self, title, quiet):
            bars.append((title, quiet))
            super().__init__(title, quiet=True)

        def update(self, done, total, note=""):
            shown.append((done, total, note))

    def fetch_one(given, path, image):
        asked.append((given, path, image))
        return path.name not in ("7", "30")

    monkeypatch.setattr(single_images, "Bar", Noted)
    monkeypatch.setattr(single_images, "ThreadPoolExecutor", lambda size: pools.append(size) or pool(1))
    monkeypatch.setattr(single_images, "_fetch_one", fetch_one)
    known = annotations(tmp_path, quiet=quiet)
    assert single_images._fetch_all(known, {}) == 0
    wanted = {tmp_path / f"{number}": Wanted((f"u{number}",)) for number in range(45)}
    assert single_images._fetch_all(known, wanted) == 2
    assert asked == [(known, path, image) for path, image in wanted.items()]
    assert shown == [(20, 45, "1 lost"), (40, 45, "2 lost"), (45, 45, "2 lost")]
    assert single_images._fetch_all(known, {tmp_path / "a": Wanted()}) == 0 and shown[-1] == (1, 1, "")
    assert bars == [("images", True), ("images", quiet), ("images", quiet)] and pools == [16, 16, 16]


def test_what_is_not_begun_is_not_fetched_after_an_error(tmp_path, monkeypatch):
    begun = []

    def fail(given, path, image):
        begun.append(path.name)
        raise DownloadError("no such host")

    pool = single_images.ThreadPoolExecutor(1)
    cancelled, shutdown = [], pool.shutdown
    monkeypatch.setattr(pool, "shutdown", lambda wait=True, **more: cancelled.append(more) or shutdown(wait, **more))
    monkeypatch.setattr(single_images, "ThreadPoolExecutor", lambda size: pool)
    monkeypatch.setattr(single_images, "_fetch_one", fail)
    with pytest.raises(DownloadError, match="no such host"):
        single_images._fetch_all(annotations(tmp_path), {tmp_path / name: Wanted() for name in "abc"})
    assert cancelled[0] == {"cancel_futures": True} and begun[0] == "a"
