"""What a fetch says and writes: the list before it, what is left to a person, the result, the room that it needs."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipelines.fetch import run as fetching
from pipelines.fetch import samples
from pipelines.fetch.data import describe, files_left, img2dataset_command, missing_by_hand, table_of
from pipelines.fetch.datasets import ByHand, LinkList, all_sets, find_sets
from pipelines.fetch.http import DownloadError, Remote, Retries, Stated
from pipelines.fetch.results import LOCK_FILE
from pipelines.fetch.run import Wanted, _Fetch, _gigabytes, fetch
from pipelines.fetch.single_images import ImagesReport
from pipelines.settings import FetchSettings, SettingsError
from pipelines.storage import DiskFullError, locked
from tinygptv.convert.sources import SourceFile

FILE = SourceFile(path="a/b.bin", name="b.bin", base="https://files.example/", license="MIT", revision="r1")


def job(folder, retries=None, **settings):
    given = FetchSettings(**{"quiet": True, "output": str(folder), **settings})
    return _Fetch(given, folder, None, retries or Retries(most=1))


def wanted(folder, size, name="b.bin", is_here=False, url="https://me:hush@files.example/x"):
    return Wanted(replace(FILE, path=name), folder / name, Remote(url, num_bytes=size), is_here)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0.000 MB"),
        (1_234_567, "1.235 MB"),
        (4_999_999, "5.000 MB"),
        (5_000_000, "0.01 GB"),
        (8_615_000_000, "8.62 GB"),
    ],
)
def test_sizes(num_bytes, text):
    assert _gigabytes(num_bytes) == text


def test_the_room_that_is_needed_is_told(tmp_path, monkeypatch):
    files = [wanted(tmp_path, 6_000_000_000), wanted(tmp_path, 10**12, "there", is_here=True)]
    free = {tmp_path: 5_500_000_000}
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    with pytest.raises(DiskFullError) as caught:
        job(tmp_path)._check_disk(files)
    assert str(caught.value) == (
        f"{tmp_path} has 5.50 GB free, but 6.00 GB are to be downloaded: free some, or give another output=."
    )
    job(tmp_path)._check_disk(files[1:])
    for spare in (0, -1):
        free[tmp_path] = 6_000_000_000 + 256 * 2**20 + spare
        with pytest.raises(DiskFullError) if spare else nullcontext():
            job(tmp_path)._check_disk(files)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    job(tmp_path)._check_disk(files[1:])
    assert fetching.MARGIN_BYTES == 256 * 2**20


def test_an_entry_of_the_lock_file(tmp_path):
    running = job(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / FILE.path).write_bytes(b"12345")
    running._record(replace(FILE, path="z"), tmp_path / FILE.path, "first")
    running._record(FILE, tmp_path / FILE.path, "sha")
    files = json.loads((tmp_path / LOCK_FILE).read_text())["files"]
    assert list(files) == ["a/b.bin", "z"]
    assert files["a/b.bin"] == {
        "bytes": 5,
        "sha256": "sha",
        "modified_ns": (tmp_path / FILE.path).stat().st_mtime_ns,
        "address": "https://files.example/b.bin",
        "revision": "r1",
        "license": "MIT",
    }
    assert job(tmp_path).lock == files, "the next run begins with it"


# ------------------------------------------------------------------------------------------ the whole, without its work


@pytest.fixture
def fetched(monkeypatch):
    """What a run is asked for; nothing is downloaded."""
    asked = SimpleNamespace(files=[], finished=[], retries=None)

    def run(self, files):
        asked.files, asked.retries, self.bytes_downloaded = [file.path for file in files], self.retries, 12
        return {"a": {"bytes": 1}}

    def finish(sets, folder, settings):
        asked.finished.append(([each.name for each in sets], folder))
        return ["img2dataset now"]

    monkeypatch.setattr(_Fetch, "run", run)
    monkeypatch.setattr(fetching, "finish_sets", finish)
    monkeypatch.setattr(fetching, "missing_by_hand", lambda sets, folder: ["open it."] if sets else [])
    return asked


def test_what_lacks_offline_is_named_and_counted(tmp_path):
    files = [wanted(tmp_path, 5, "a"), wanted(tmp_path, 5, "b", is_here=True), wanted(tmp_path, 5, "c")]
    with pytest.raises(DownloadError) as caught:
        job(tmp_path, offline=True)._refuse_offline(files)
    assert str(caught.value) == (
        f"offline=true, but 2 files are missing in {tmp_path}: a, c. Name the folder that holds them with local=."
    )
    job(tmp_path)._refuse_offline(files)
    job(tmp_path, offline=True)._refuse_offline(files[1:2])


@pytest.mark.parametrize(("what", "folder"), [("vision", "weights"), ("okvqa", "raw")])
def test_a_dry_run_tries_once_and_unpacks_nothing(fetched, tmp_path, monkeypatch, what, folder):
    monkeypatch.chdir(tmp_path)
    result = fetch(FetchSettings(what=what, dry_run=True, quiet=True))
    assert result["folder"] == str(tmp_path / folder) and result["commands"] == []
    assert fetched.retries.most == 1 and not fetched.finished


def test_without_a_name_the_names_are_told(tmp_path):
    with pytest.raises(SettingsError) as caught:
        fetch(FetchSettings(output=str(tmp_path)))
    text = str(caught.value)
    assert text.startswith("give what=NAME: released, start, stages, vision, ") and text.endswith(", gqa, ocrvqa.")
    assert ", data, data1, data2, data3, data4, laion, " in text
    with pytest.raises(SettingsError, match=r"what=vision,none: 'none' names no weights; .* Data sets: data, data1"):
        fetching.named_files(["vision", "none"])


def test_a_file_is_asked_for_by_its_path_and_compared_by_its_whole_hash(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(fetching, "ask", lambda client, remote, name, retries: asked.append(name) or Stated(5))
    assert job(tmp_path)._asked(FILE, Remote("u")).num_bytes == 5 and asked == ["a/b.bin"]
    (tmp_path / "a").mkdir()
    (tmp_path / FILE.path).write_bytes(b"12345")
    job(tmp_path)._record(FILE, tmp_path / FILE.path, "a" * 64)
    assert job(tmp_path)._is_recorded(replace(FILE, sha256="a" * 64), tmp_path / FILE.path)
    for other in ("a" * 63 + "b", "a" * 8, "b" + "a" * 63):
        assert not job(tmp_path)._is_recorded(replace(FILE, sha256=other), tmp_path / FILE.path)


# ------------------------------------------------------------------------------------------------------------ samples


@pytest.fixture
def sampled(monkeypatch):
    """Samples without downloads: what is asked for, in order."""
    done = []
    monkeypatch.setattr(samples.Annotations, "bring", lambda self, each: done.append((each.name, self.record.rows)))
    monkeypatch.setattr(samples, "finish_sets", lambda sets, *_: done.append([s.name for s in sets]) or ["run this"])
    report = ImagesReport(1234, 5, ["unpack it."])
    monkeypatch.setattr(samples, "fetch_images", lambda notes, sets: done.append([s.name for s in sets]) or report)
    monkeypatch.setattr(samples, "missing_by_hand", lambda sets, folder: ["open it."])
    return done


def test_a_dry_run_of_samples_brings_nothing(sampled, tmp_path, capsys):
    result = fetch(FetchSettings(what=["sample", "okvqa"], rows=7, dry_run=True, output=str(tmp_path)))
    table = describe([all_sets()["coco"], all_sets()["okvqa"]])
    first, rest = capsys.readouterr().out.split("\nSizes of the whole sets; ")
    assert first == table and rest.startswith("of each the first 7 rows are taken, with their images.\n")
    assert sampled == [] and result["commands"] == [] and result["sample"]["images"] == 0


def test_annotations_are_asked_for_with_the_hubs_token_and_each_set_is_told(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(samples, "address", lambda file, settings: (f"http://hub/{file.path}", {"Authorization": "x"}))
    monkeypatch.setattr(samples.Annotations, "bring", lambda self, each: asked.append(self.locate(FILE)))
    finished, imaged = [], []
    monkeypatch.setattr(samples, "finish_sets", lambda sets, *_: finished.extend(each.name for each in sets) or [])
    report = ImagesReport(1, 0, [])
    monkeypatch.setattr(samples, "fetch_images", lambda _, sets: imaged.extend(each.name for each in sets) or report)
    fetch(FetchSettings(what=["sample", "laion", "okvqa"], output=str(tmp_path), rows=2000))
    assert asked == [Remote("http://hub/a/b.bin", headers={"Authorization": "x"})] * 3
    assert finished == ["laion"] and imaged == ["laion", "coco", "okvqa"]
    out = capsys.readouterr().out.splitlines()
    assert out == ["laion: first 2,000 rows", "okvqa: first 2,000 rows", "1 images fetched, 0 not there."]


def test_a_sample_has_a_thousand_rows_and_its_folder_for_itself(sampled, tmp_path):
    settings = FetchSettings(what=["sample", "okvqa"], output=str(tmp_path), quiet=True)
    assert fetch(settings)["sample"]["rows"] == 1000 and sampled[0] == ("coco", 1000)
    busy = f"^another fetch is writing to {tmp_path}: wait for it"
    with locked(tmp_path / ".fetch", "busy"), pytest.raises(SettingsError, match=busy):
        fetch(settings)


def test_samples_of_nothing_known_name_what_there_is(tmp_path, monkeypatch, capsys):
    with pytest.raises(SettingsError) as caught:
        fetch(FetchSettings(what=["sample", "okvqa", "none", "neither"], output=str(tmp_path)))
    text = "what=sample,okvqa,none,neither: none, neither is no data set; samples are made of data, data1, "
    assert str(caught.value).startswith(text)
    monkeypatch.chdir(tmp_path)
    assert samples.fetch_samples(FetchSettings(what=["sample"], dry_run=True, quiet=True), Retries())["folder"] == (
        f"{tmp_path}/raw_sample"
    )
    assert capsys.readouterr().out.startswith(describe(find_sets("data")) + "\nSizes of"), "without a name, of all"


# -------------------------------------------------------------------------------------------------------- parts of it


def test_what_a_person_fetches_is_told_until_it_is_there(tmp_path):
    each = replace(all_sets()["gqa"], by_hand=(ByHand("https://a", "gqa/x.json"), ByHand("https://b", "gqa/y")))
    text = f"gqa: open https://b in a browser, and put {tmp_path}/gqa/y there."
    assert missing_by_hand([each], tmp_path)[1] == text and len(missing_by_hand([each], tmp_path)) == 2
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa/x.json").touch()
    assert missing_by_hand([each], tmp_path) == [text]


def test_an_archive_is_left_out_once_it_was_unpacked_and_removed(tmp_path):
    coco = all_sets()["coco"]
    (archive,) = (tmp_path / name for name in coco.archives)
    assert files_left(coco, tmp_path) == list(coco.files)
    archive.parent.mkdir(parents=True)
    archive.with_name(f".{archive.name}.unpacked").touch()
    assert [file.path for file in files_left(coco, tmp_path)] == [
        file.path for file in coco.files if file.path not in coco.archives
    ]
    archive.touch()
    assert files_left(coco, tmp_path) == list(coco.files)


def test_the_call_of_img2dataset(tmp_path):
    command = img2dataset_command(LinkList("a/l.json", "a/tars"), tmp_path, threads=3, processes=2)
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert command[0] == "img2dataset" and table_of(tmp_path / "a.b/l.1.json") == tmp_path / "a.b/l.1.tsv"
    assert options == {
        "--url_list": f"{tmp_path}/a/l.tsv",
        "--input_format": "tsv",
        "--url_col": "url",
        "--caption_col": "caption",
        "--output_format": "webdataset",
        "--output_folder": f"{tmp_path}/a/tars",
        "--processes_count": "2",
        "--thread_count": "3",
        "--image_size": "224",
        "--incremental_mode": "incremental",
    }
