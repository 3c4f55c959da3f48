"""Sets of data as their table says, samples of them, single images, and archives."""

from __future__ import annotations

import json
import shlex
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from pipelines.fetch import data, datasets, samples, single_images
from pipelines.fetch.datasets import all_sets
from pipelines.fetch.http import DownloadError, Remote, Retries, TryAgainError
from pipelines.fetch.results import LOCK_FILE
from pipelines.settings import FetchSettings, SettingsError

NO_RETRIES = Retries(most=1)


def test_a_set_is_read_from_its_table():
    table = {"folder": "d", "title": "T", "sources": ["gqa"], "license": "L", "gigabytes": 2.5, "rows": 7}
    plain = datasets._data_set("x", table)
    assert (plain.name, plain.input, plain.files, plain.links, plain.per_entry) == ("x", "d", (), None, 1)
    assert (plain.title, plain.sources, plain.gigabytes, plain.rows, plain.license) == ("T", ("gqa",), 2.5, 7, "L")
    files = [
        {"url": "https://h/a/b.zip", "name": "c.zip", "unpack": True, "cut": ["e.json", "f.p"]},
        {"url": "https://h/i.zip", "name": "i.zip", "unpack": True, "of_images": True},
        {"url": "https://h/j.json", "name": "j.json"},
    ]
    more = {
        "input": "d/in",
        "files": files,
        "by_hand": [{"address": "https://p", "path": "d/p"}],
        "needs": ["coco"],
        "list": {"file": "l.json", "output": "out"},
        "images": [
            {"match": "m", "path": "i/{}", "urls": ["u", "v"], "fields": ["f"], "id": "k"},
            {"match": "n", "path": "j"},
        ],
        "per_entry": 3,
    }
    found = datasets._data_set("x", {**table, **more})
    assert [(file.path, file.base, file.name, file.license) for file in found.files] == [
        ("d/c.zip", "https://h/a/", "b.zip", "L"),
        ("d/i.zip", "https://h/", "i.zip", "L"),
        ("d/j.json", "https://h/", "j.json", "L"),
    ]
    assert (found.input, found.needs, found.per_entry) == ("d/in", ("coco",), 3)
    assert found.archives == {"d/c.zip", "d/i.zip"} and found.of_images == {"d/i.zip"}
    assert found.cut == {"d/c.zip": ("d/e.json", "d/f.p")}
    assert (found.links.file, found.links.output) == ("d/l.json", "d/out")
    assert [(hand.address, hand.path) for hand in found.by_hand] == [("https://p", "d/p")]
    rules = [(rule.match, rule.path, rule.urls, rule.fields, rule.id) for rule in found.images]
    assert rules == [("m", "d/i/{}", ("u", "v"), ("f",), "k"), ("n", "d/j", (), (), "")]


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_sample_of_sets(tmp_path, monkeypatch, capsys, dry_run):
    done = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(samples.Annotations, "bring", lambda self, each: done.append((each.name, self.record.rows)))
    folder, names = tmp_path / "raw_sample", []

    def finish(sets, where, given):
        assert (where, given) == (folder, settings)
        done.append([each.name for each in sets])
        return ["c"]

    def images(given, sets):
        assert (given.settings, given.folder, given.retries) == (settings, folder, NO_RETRIES)
        assert not given.client.is_closed
        names.append([each.name for each in sets])
        return single_images.ImagesReport(1200, 3, ["left"])

    def missing(sets, where):
        assert ([each.name for each in sets], where) == (["laion"], folder)
        return ["open it."]

    monkeypatch.setattr(samples, "finish_sets", finish)
    monkeypatch.setattr(samples, "fetch_images", images)
    monkeypatch.setattr(samples, "missing_by_hand", missing)
    settings = FetchSettings(what=["sample", "laion"], rows=50, dry_run=dry_run)
    result = samples.fetch_samples(settings, NO_RETRIES)
    out = capsys.readouterr().out
    by_hand = ["open it. Or name the folder that holds it with local=.", *([] if dry_run else ["left"])]
    assert (result["folder"], result["by_hand"]) == (f"{tmp_path}/raw_sample", by_hand)
    assert (result["files"], result["bytes_downloaded"]) == ({}, 0)
    assert result["result"] == f"{tmp_path}/raw_sample/result.json"
    if dry_run:
        assert done == [] and result["commands"] == [] and "the first 50 rows are taken, with their images.\n" in out
        assert result["sample"] == {"rows": 50, "files": [], "images": 0, "lost": 0}
    else:
        assert done == [("laion", 50), ["laion"]] and out.startswith(
            "laion: first 50 rows\n1,200 images fetched, 3 not"
        )
        assert result["sample"] == {"rows": 50, "files": [], "images": 1200, "lost": 3}
        assert out.endswith(f"\n{by_hand[0]}\nleft\nThen run: c\n") and result["commands"] == ["c"]
    assert json.loads((tmp_path / "raw_sample/result.json").read_text()) == result
    assert names == ([] if dry_run else [["laion"]])
    with pytest.raises(SettingsError, match=r"^what=sample,nope: nope is no data set; samples are made of data, data1"):
        samples.fetch_samples(FetchSettings(what=["sample", "nope"]), NO_RETRIES)
    settings = FetchSettings(what=["sample", "laion"], rows=50, quiet=True)
    samples.fetch_samples(settings, NO_RETRIES)
    assert "first 50 rows" not in capsys.readouterr().out
    (tmp_path / "raw_sample" / LOCK_FILE).touch()
    with pytest.raises(
        SettingsError, match="raw_sample holds whole data sets or weights: give another output= for samples"
    ):
        samples.fetch_samples(FetchSettings(what=["sample", "laion"]), NO_RETRIES)


def test_where_an_image_is_and_goes():
    rule = datasets.ImageRule(r"a(\d+)\.jpg", "x/{}.jpg", urls=("http://h/{}", "http://i/{}"))
    of_web = datasets.ImageRule(r"b(\d+)", "y/{}", fields=("url",))
    each = replace(all_sets()["gqa"], input="gqa/in")
    given = {"7": ["http://w/7"]}
    found = [single_images._find(each, name, (rule, of_web), given) for name in ("a7.jpg", "b7", "b8", "c")]
    assert found == [
        ("x/7.jpg", single_images.Wanted(("http://h/7", "http://i/7"), False)),
        ("y/7", single_images.Wanted(("http://w/7",), True)),
        ("y/8", single_images.Wanted((), True)),
        ("gqa/in/c", single_images.Wanted()),
    ]


@pytest.mark.parametrize(
    ("status", "content", "found"), [(404, b"x", None), (410, b"", None), (200, b"image", b"image")]
)
def test_an_answer_without_an_image(status, content, found):
    asked = []

    def answer(request):
        asked.append(str(request.url))
        if len(asked) == 1:
            return httpx.Response(302, headers={"Location": "https://cdn/a"})
        return httpx.Response(status, content=content)

    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        assert single_images._get(client, Remote("https://h/a"), "a.jpg") == found
        assert asked == ["https://h/a", "https://cdn/a"]
    empty = httpx.MockTransport(lambda request: httpx.Response(200))
    with httpx.Client(transport=empty) as client, pytest.raises(TryAgainError, match="the answer is empty"):
        single_images._get(client, Remote("https://h/a"), "a.jpg")


def test_sets_are_finished_with_their_archives_rows_and_commands(tmp_path, monkeypatch):
    done, laion = [], all_sets()["laion"]
    monkeypatch.setattr(data, "unpack", lambda archive, quiet: done.append((archive, quiet)))
    monkeypatch.setattr(data, "write_table", lambda file, rows, quiet: done.append((file, rows, quiet)))
    monkeypatch.setattr(data, "_run", done.append)
    (tmp_path / "r").mkdir()
    for name in ("b.zip", "a.zip"):
        (tmp_path / "r" / name).touch()
    archives = replace(all_sets()["gqa"], archives=frozenset({"r/b.zip", "r/removed.zip", "r/a.zip"}))
    command = data.img2dataset_command(laion.links, tmp_path)
    for images, quiet, told in (("print", True, [shlex.join(command)]), ("run", False, [])):
        settings = FetchSettings(images=images, rows=7, quiet=quiet)
        assert data.finish_sets([archives, laion], tmp_path, settings) == told
        unpacked = [(tmp_path / "r/a.zip", quiet), (tmp_path / "r/b.zip", quiet)]
        listed = (tmp_path / "laion/laion_synthetic_filtered_large.json", 7, quiet)
        assert done == [*unpacked, listed, *([] if told else [command])]
        done.clear()


def test_unpacking_shows_every_hundredth_file_and_the_last(tmp_path, monkeypatch):
    shown, bars, bar_class = [], [], data.Bar
    monkeypatch.setattr(data, "Bar", lambda title, quiet: bars.append((title, quiet)) or bar_class(title, quiet=quiet))
    monkeypatch.setattr(bar_class, "update", lambda bar, *now: shown.append(now))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(201):
            archive.writestr(f"d/{number}", "x")
    data.unpack(tmp_path / "a.zip")
    assert shown == [(100, 201, "files"), (200, 201, "files"), (201, 201, "files")]
    (tmp_path / ".a.zip.unpacked").unlink()
    data.unpack(tmp_path / "a.zip", quiet=True)
    assert bars == [("unpacking a.zip", False), ("unpacking a.zip", True)]
    assert len(list((tmp_path / "d").iterdir())) == 201


def test_what_does_not_fit_or_leads_out_is_told_with_its_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9))
    data._check_room([SimpleNamespace(file_size=10**9)], tmp_path)
    with pytest.raises(data.storage.DiskFullError) as error:
        data._check_room([SimpleNamespace(file_size=10**9), SimpleNamespace(file_size=15 * 10**8)], tmp_path)
    assert str(error.value) == f"{tmp_path} has 1.0 GB free, but the archive unpacks to 2.5 GB: free some space."
    name = "../" + "x" * 300
    with pytest.raises(DownloadError) as error:
        data._safe_name(name, Path("/a.zip"))
    assert str(error.value) == f"/a.zip holds {name[:200]!r}, which leads out of its folder: it is not unpacked."


def test_a_table_of_sets_has_columns():
    sets = [
        replace(all_sets()["gqa"], gigabytes=20.5, rows=943000, license="CC"),
        replace(all_sets()["gqa"], gigabytes=0, rows=0),
    ]
    head, first, second, last = data.describe(sets).splitlines()
    assert head == f"{'set':24}{'GB':>8}{'rows':>14}{'hours':>8}  licence"
    assert first == f"{'gqa':24}{'20.5':>8}{'943,000':>14}{sets[0].hours:8.1f}  CC"
    assert second.split()[:3] == ["gqa", "-", "-"] and last.startswith(f"{'together':24}{20.5:8.1f}")
    assert last.split()[2] == f"{sets[0].hours:.1f}" and sets[0].hours > 0
