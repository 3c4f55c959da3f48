"""Data sets by name: every source of the recipe has its files, archives unpack safely, lists become tables."""

from __future__ import annotations

import io
import json
import shlex
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pyarrow.csv as pa_csv
import pytest

from pipelines.data.sources import SOURCES
from pipelines.fetch import data
from pipelines.fetch.addresses import published_address
from pipelines.fetch.data import unpack, write_table
from pipelines.fetch.datasets import all_sets, find_sets, set_of, sets_of_stages, with_needs
from pipelines.fetch.http import DownloadError, Retries
from pipelines.fetch.run import fetch
from pipelines.settings import FetchSettings, SettingsError
from pipelines.storage import DiskFullError
from tests.hub_server import serve_files
from tests.paths import ROOT
from tinygptv.convert.sources import SourceFile
from tinygptv.training.stages import RECIPES

OWN = {"webdataset", "jsonl", "csv", "hf", "parquet"}
LINKS = [{"caption": f"a  star\t{n}\n", "url": f"http://x/{n}.jpg"} for n in range(5)]


def zip_of(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:  # its sizes are not those of the files
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


@pytest.fixture
def server():
    with serve_files() as files:
        yield files


def run(server, tmp_path, what, **settings):
    values = {"what": what, "mirror": server.base, "output": str(tmp_path / "raw"), "quiet": True, **settings}
    return fetch(FetchSettings(**values), Retries(most=2, sleep=lambda _: None))


def publish(server, name, contents):
    for file, content in zip(all_sets()[name].files, contents, strict=True):
        server.files[urlsplit(published_address(file)).path] = content


def test_every_source_is_published_in_one_set():
    assert {source for each in all_sets().values() for source in each.sources} == set(SOURCES) - OWN
    stages = RECIPES["paper"]
    assert {s.name for stage in stages for s in stage.sources} <= {
        source for each in sets_of_stages(stages) for source in each.sources
    }
    for each in all_sets().values():
        assert each.files or each.by_hand
        assert all(
            published_address(file).startswith(("https://", "http://images.cocodataset.org/")) for file in each.files
        )
        assert all(file.address.startswith("https://") for file in each.by_hand)
        assert set(each.needs) <= set(all_sets()) and each.license


def test_the_docs_name_every_set_and_input():
    text = (ROOT / "docs/datasets.md").read_text()
    for each in all_sets().values():
        assert f"`{each.name}`" in text, each.name


def test_images_of_other_sets_come_first():
    assert [each.name for each in find_sets("llava")] == ["coco", "llava"]
    assert [each.name for each in find_sets("data1")] == ["laion", "cc_sbu"]
    assert {"coco", "llava", "cc_sbu_align"} == {each.name for each in find_sets("data3")}
    sets = [all_sets()[name] for name in ("llava", "gqa", "vqav2", "llava")]
    assert [each.name for each in with_needs(sets)] == ["coco", "llava", "gqa", "vqav2"], "each once, before its users"
    assert set_of("invrefcocog").name == "refcoco" and find_sets("nothing") == []
    with pytest.raises(SettingsError, match="belongs to no published data set"):
        set_of("own")


def test_archives_are_downloaded_unpacked_and_may_be_removed(server, tmp_path):
    publish(server, "coco", [zip_of(train2014__a="1", train2014__b="22")])
    run(server, tmp_path, "coco")
    folder = tmp_path / "raw/coco"
    assert (folder / "train2014/b").read_text() == "22"
    (folder / "train2014.zip").unlink()
    server.requests.clear()
    run(server, tmp_path, "coco")
    assert not server.requests and not (folder / "train2014.zip").exists()


def test_an_interrupted_unpacking_is_finished(tmp_path, monkeypatch):
    archive = tmp_path / "x.zip"
    archive.write_bytes(zip_of(a="1", b="22"))
    extract = data._extract

    def fail_at_b(opened, member, target):
        if member.filename == "b":
            raise KeyboardInterrupt
        extract(opened, member, target)

    monkeypatch.setattr(data, "_extract", fail_at_b)
    with pytest.raises(KeyboardInterrupt):
        unpack(archive, quiet=True)
    (tmp_path / "a").write_text("x")  # of the right size: not written again
    monkeypatch.setattr(data, "_extract", extract)
    unpack(archive, quiet=True)
    assert (tmp_path / "a").read_text() == "x" and (tmp_path / "b").read_text() == "22"


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    archive = tmp_path / "in/x.zip"
    archive.write_bytes(zip_of(**{name: "1"}))
    with pytest.raises(DownloadError, match="leads out of its folder"):
        unpack(archive, quiet=True)
    assert not list(tmp_path.rglob("evil"))


def test_a_member_that_cannot_be_unpacked_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "x.zip").write_bytes(zip_of(a="1"))
    monkeypatch.setattr(data.shutil, "copyfileobj", lambda source, sink, size: sink.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        unpack(tmp_path / "x.zip", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


def test_folders_of_archives_made_on_windows_are_folders(tmp_path):
    (tmp_path / "x.zip").write_bytes(zip_of(**{"a\\b.txt": "1", "c/": ""}))
    unpack(tmp_path / "x.zip", quiet=True)
    assert (tmp_path / "a/b.txt").read_text() == "1" and not (tmp_path / "a\\b.txt").exists()


def test_a_damaged_archive_is_one_sentence(tmp_path):
    (tmp_path / "x.zip").write_bytes(zip_of(a="1")[:-30])
    with pytest.raises(DownloadError, match=r"x.zip is no whole zip archive: .*Remove it to download it again"):
        unpack(tmp_path / "x.zip")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [(6, 1, "is encrypted"), (8, 9, "method is not supported"), (31, 0xFF, "invalid block type")],
)
def test_an_archive_that_cannot_be_unpacked_is_one_sentence(tmp_path, field, value, reason):
    archive = bytearray(zip_of(a="1"))
    archive[field] = value
    if field < 30:  # stated again at the end, two bytes later
        archive[archive.index(b"PK\x01\x02") + field + 2] = value
    (tmp_path / "x.zip").write_bytes(archive)
    with pytest.raises(DownloadError, match=f"x.zip is no whole zip archive: .*{reason}.*Remove it"):
        unpack(tmp_path / "x.zip", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


@pytest.mark.parametrize("rows", [0, 2])
def test_lists_of_links_become_tables(server, tmp_path, rows, capsys):
    publish(server, "laion", [json.dumps(LINKS).encode()])
    result = run(server, tmp_path, "laion", rows=rows)
    table = (tmp_path / "raw/laion/laion_synthetic_filtered_large.tsv").read_text().splitlines()
    assert table[:2] == ["caption\turl", "a star 0\thttp://x/0.jpg"] and len(table) == 1 + (rows or len(LINKS))
    (command,) = result["commands"]
    words = shlex.split(command)
    assert words[0] == "img2dataset" and words[words.index("--output_folder") + 1].endswith("raw/laion/laion_dataset")
    assert f"Then run: {command}" in capsys.readouterr().out


def test_the_documented_call_has_the_same_options():
    text = (ROOT / "docs/datasets.md").read_text().replace("\\\n", " ")
    documented = shlex.split(text[text.index("img2dataset --url_list") :].split("\n")[0])
    command = data.img2dataset_command(all_sets()["laion"].links, Path("DATA"))
    assert documented == command


def test_img2dataset_is_run_where_it_is_asked_for(server, tmp_path, monkeypatch):
    publish(server, "cc_sbu", [json.dumps(LINKS).encode()])
    with pytest.raises(SettingsError, match=r"img2dataset is not installed: pip install 'tinygptv\[images\]'"):
        run(server, tmp_path, "cc_sbu", images="run")
    tool = tmp_path / "bin/img2dataset"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    assert run(server, tmp_path, "cc_sbu", images="run")["commands"] == []
    assert "--url_list" in (tmp_path / "asked").read_text()


def test_a_damaged_list_is_one_sentence(tmp_path):
    (tmp_path / "list.json").write_text('[{"caption": "a"}]')
    with pytest.raises(DownloadError, match=r"list.json is no list of entries with 'caption' and 'url'.*'url'"):
        write_table(tmp_path / "list.json")
    for text in ("[5]", "[[]]", "[" * 9000 + "]" * 9000, "[" + "[" * 9000 + "]" * 9000 + "]", "["):
        (tmp_path / "list.json").write_text(text)
        with pytest.raises(DownloadError, match=r"list.json is no list of entries with 'caption' and 'url'"):
            write_table(tmp_path / "list.json", quiet=True)
    assert not (tmp_path / "list.tsv").exists()


def test_what_is_left_by_hand_is_told(server, tmp_path):
    (text,) = run(server, tmp_path, ["cc_sbu_align"])["by_hand"]
    assert text.startswith(
        "cc_sbu_align: open https://drive.google.com/file/d/1nJXhoEcy3KTExr17I7BXqY5Y9Lx_-n-9/view in"
    )
    assert text.endswith(f"and put {tmp_path}/raw/cc_sbu_align/filter_cap.json there.")
    (tmp_path / "raw/cc_sbu_align").mkdir()
    (tmp_path / "raw/cc_sbu_align/filter_cap.json").write_text("{}")
    assert run(server, tmp_path, ["cc_sbu_align"])["by_hand"] == []


def test_disk_rows_and_hours_are_told_before(server, tmp_path, capsys):
    run(server, tmp_path, ["data"], dry_run=True, quiet=False)
    out = capsys.readouterr().out
    line = next(row for row in out.splitlines() if row.startswith("laion "))
    assert "2100" in line and "115,000,000" in line and " 23.0 " in line
    assert out.index("together") < out.index("to download")


# ---------------------------------------------------------------- values


def test_addresses_of_the_hubs_kinds_of_repositories():
    file = SourceFile(path="x/a.json", name="a.json", repo="org/name", kind="dataset", revision="r1")
    found = [published_address(replace(file, kind=kind)) for kind in ("dataset", "space", "model")]
    assert found == [
        f"https://huggingface.co/{prefix}org/name/resolve/r1/a.json" for prefix in ("datasets/", "spaces/", "")
    ]


def test_hours_are_those_of_the_line_or_of_the_links_and_sum_up():
    coco, laion = all_sets()["coco"], all_sets()["laion"]
    assert coco.hours == pytest.approx(coco.gigabytes * 1e9 / 12.5e6 / 3600) and coco.hours > 0
    assert laion.hours == laion.rows / 5_000_000
    last = data.describe([coco, laion]).splitlines()[-1]
    assert last.split()[:3] == [
        "together",
        f"{coco.gigabytes + laion.gigabytes:.1f}",
        f"{coco.hours + laion.hours:.1f}",
    ]


def test_an_archive_may_be_made_on_windows(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as opened:
        for name, content in (("images\\", ""), ("images\\a.jpg", "a"), ("images\\sub\\b.jpg", "b")):
            opened.writestr(name, content)
    unpack(tmp_path / "x.zip", quiet=True)
    assert (tmp_path / "images/a.jpg").read_text() + (tmp_path / "images/sub/b.jpg").read_text() == "ab"


def test_a_file_of_another_size_is_unpacked_again(tmp_path):
    (tmp_path / "x.zip").write_bytes(zip_of(a="longer", b="1"))
    (tmp_path / "a").write_text("short")
    (tmp_path / "second name").hardlink_to(tmp_path / "a")
    unpack(tmp_path / "x.zip", quiet=True)
    assert (tmp_path / "a").read_text() == "longer"
    assert (tmp_path / "second name").read_text() == "short", "a new file, never half of one"
    (tmp_path / "a").write_text("mine now")
    unpack(tmp_path / "x.zip", quiet=True)
    assert (tmp_path / "a").read_text() == "mine now", "an archive is unpacked once"


def test_an_archive_that_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    (tmp_path / "x.zip").write_bytes(zip_of(a="12345", b="678"))
    for free, fits in ((7, False), (8, True)):
        monkeypatch.setattr(data.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if fits:
            unpack(tmp_path / "x.zip", quiet=True)
        else:
            with pytest.raises(DiskFullError, match="the archive unpacks to"):
                unpack(tmp_path / "x.zip", quiet=True)
        assert (tmp_path / "a").exists() is fits
    (tmp_path / ".x.zip.unpacked").unlink()
    (tmp_path / "b").unlink()
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: SimpleNamespace(free=3))
    unpack(tmp_path / "x.zip", quiet=True)  # an interrupted run has the rest
    assert (tmp_path / "b").read_text() == "678"


def test_a_drive_is_no_name_in_an_archive(tmp_path):
    with pytest.raises(DownloadError, match="leads out of its folder"):
        data._safe_name("c:evil", tmp_path / "x.zip")
    assert data._safe_name("a\\b/c:d", tmp_path / "x.zip") == "a/b/c:d"


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [(2, 0, "the first 2 links, and all links are"), (0, 3, "all links, and the first 3 links are")],
)
def test_a_table_of_another_number_of_rows_is_not_taken(tmp_path, first, then, told):
    """img2dataset leaves out tars that are there: those of a trial would stay the only ones."""
    (tmp_path / "l.json").write_text(json.dumps(LINKS))
    table = write_table(tmp_path / "l.json", first, quiet=True)
    assert len(table.read_text().splitlines()) == 1 + (first or 5)
    table.write_text(kept := "caption\turl\n")
    assert write_table(tmp_path / "l.json", first, quiet=True).read_text() == kept
    with pytest.raises(SettingsError, match=f"l.tsv holds {told} asked for: give another output=, or remove the table"):
        write_table(tmp_path / "l.json", then, quiet=True)
    table.unlink()
    assert len(write_table(tmp_path / "l.json", then, quiet=True).read_text().splitlines()) == 1 + (then or 5)


def test_a_table_that_was_made_by_hand_is_kept(tmp_path):
    (tmp_path / "l.tsv").write_text("caption\turl\n")
    assert write_table(tmp_path / "l.json", quiet=True).read_text() == "caption\turl\n"


def test_img2dataset_reads_every_caption_as_it_is(tmp_path):
    captions = ['"unbalanced', '"hello" said the dog', 'a 5" disk', '"', '""', "a,b", "back\\slash", "'quoted'", "NA"]
    links = [{"caption": text, "url": f"http://h/{number}"} for number, text in enumerate(captions)]
    (tmp_path / "l.json").write_text(json.dumps(links))
    table = write_table(tmp_path / "l.json", quiet=True)
    assert pa_csv.read_csv(table, parse_options=pa_csv.ParseOptions(delimiter="\t")).to_pylist() == links


def test_captions_that_are_no_text_of_unicode_are_written_all_the_same(tmp_path):
    (tmp_path / "l.json").write_text(r'[{"caption": "caf\u00e9 \ud800", "url": "http://h/\u00e9"}]')
    table = write_table(tmp_path / "l.json", quiet=True)
    assert table == tmp_path / "l.tsv" and table.read_bytes() == "caption\turl\ncaf\u00e9 ?\thttp://h/\u00e9\n".encode()


def test_img2dataset_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(data.shutil, "which", lambda name: name)
    for status in (1, 255):
        monkeypatch.setattr(data, "run_command", lambda command, s=status: s)
        with pytest.raises(DownloadError, match="img2dataset failed"):
            data._run(["img2dataset"])


def test_a_set_of_the_table_has_its_paths_below_its_folder():
    refcoco, coco = all_sets()["refcoco"], all_sets()["coco"]
    for each in all_sets().values():
        folder = {file.path.partition("/")[0] for file in each.files}
        assert each.archives <= {file.path for file in each.files} >= each.of_images
        assert all(path.partition("/")[0] in folder for paths in each.cut.values() for path in paths)
        assert set(each.cut) <= each.archives
    assert refcoco.cut and coco.archives == {"coco/train2014.zip"} and not all_sets()["gqa"].links
    assert all_sets()["laion"].archives == frozenset()


def test_a_long_list_shows_how_much_of_it_is_read(tmp_path, monkeypatch):
    shown = []
    item = SimpleNamespace(data=b'{"caption": "a", "url": "b"}')

    def items(stream, keep_data):
        stream.seek(2 << 20)
        yield from [item] * 5

    class Bar:
        def __init__(self, title, quiet):
            shown.append((title, quiet))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, *given):
            shown.append(given)

    assert data._SHOWN_LINKS == 100_000
    monkeypatch.setattr(data, "_SHOWN_LINKS", 3)
    monkeypatch.setattr(data, "iterate_items", items)
    monkeypatch.setattr(data, "Bar", Bar)
    with (tmp_path / "l.json").open("wb") as stream:
        stream.truncate(5 << 20)
    data.write_table(tmp_path / "l.json", quiet=True)
    assert shown == [("writing l.tsv", True), (2, 5, "MiB  3 links")]
