"""Ingest without a cluster: counts, filters, duplicates, bounds, and what is refused or continued."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from pipelines.data.ingest import job as ingest_module
from pipelines.data.ingest import publish as publish_module
from pipelines.data.ingest.job import ingest
from pipelines.data.ingest.publish import NothingKeptError
from pipelines.data.ingest.staging import CONTENT_SETTINGS
from pipelines.data.shards import ShardSet
from pipelines.settings import PrepareDataSettings, SettingsError
from pipelines.tracking.base import NullTracker
from tests.ingest_runs import TIMELESS, content, lines, settings, write_messy_tars
from tests.source_files import jpeg, sample, write_tar, write_web_tar


def test_every_sample_is_accounted_for(tmp_path):
    write_messy_tars(tmp_path)
    result = ingest(settings(tmp_path))
    expected = {"rows_in": 10, "rows_out": 6, "duplicates": 1, "filtered": 2, "quarantined": 1, "near_duplicates": 1}
    assert {key: result[key] for key in expected} == expected
    assert result["filters"] == {"min_letters": 1, "min_side": 1}
    assert json.loads(Path(result["result"]).read_text()) == result

    shards = ShardSet.open(result["output"])
    shards.verify()
    assert [row.id for row in shards] == ["00000/a0", "00000/a1", "00001/b1", "00001/b2", "00002/c0", "00002/c2"]
    assert shards.row(0).image == jpeg(0)
    assert (shards.row(4).width, shards.row(4).height) == (600, 500)

    quarantine = lines(result["quarantine"])
    assert [list(line) for line in quarantine] == [["source", "shard", "key", "reason"]]
    assert (quarantine[0]["shard"], quarantine[0]["key"]) == ("00000.tar", "a2")
    removed = {line["key"]: line["filter"] for line in lines(result["removed"])}
    assert removed == {"tiny": "min_side", "c1": "min_letters", "b0": "duplicate"}
    (repeated,) = [line for line in lines(result["removed"]) if line["key"] == "b0"]
    assert (repeated["shard"], repeated["reason"]) == ("00001.tar", "same as 00000/a0")
    assert [(line["id"], line["near"]) for line in lines(result["near_duplicate_list"])] == [("00001/b2", "00000/a1")]


def test_report_tells_the_same(tmp_path, capsys):
    write_messy_tars(tmp_path)
    result = ingest(settings(tmp_path, quiet=False))
    assert " 3/3  rows 10 in, 7 kept  " in capsys.readouterr().err.splitlines()[-1], "duplicates are dropped later"
    report = json.loads(Path(result["report_json"]).read_text())
    rows = {name: [row for row in histogram["rows"] if row] for name, histogram in report.pop("histograms").items()}
    assert rows == {
        "width": [4, 1, 1],
        "height": [4, 1, 1],
        "aspect_ratio": [1, 5],
        "image_kilobytes": [5, 1],
        "words": [2, 2, 2],
    }
    shard = ShardSet.open(result["output"]).manifest.shards[0]
    counts = ("rows_in", "rows_out", "duplicates", "filtered", "quarantined", "near_duplicates", "filters", "changes")
    assert report == {
        "source": "laion",
        "counts": {name: result[name] for name in counts},
        "settings": {name: getattr(settings(tmp_path), name) for name in CONTENT_SETTINGS},
        "shards": 1,
        "bytes": shard.bytes,
        "images": 6,
        "images_with_original_bytes": 5,
        "quarantine_reasons": {"image .. does not hold an image in a known format": 1},
    }
    assert {name: spread["least"] for name, spread in shard.statistics.items()}["width"] == 48
    assert lines(result["quarantine"])[0]["source"] == "laion"
    page = Path(result["report_html"]).read_text()
    assert dict(re.findall(r"<div class=tile><b>(\d+)</b><span>(.*?)</span>", page)[::-1]) == {
        "10": "rows in",
        "6": "rows out",
        "2": "filtered",
        "1": "duplicates",
    }
    tiles = re.findall(r"<div class=tile><b>(\d+)</b><span>(.*?)</span>", page)
    assert [name for _, name in tiles[4:]] == ["quarantined", "near-duplicates (kept)", "shards"]
    assert page.count("<img") == result["rows_out"] and "a cat, larger<i>00001/b2</i>" in page
    assert "<td>min_letters</td><td>1</td>" in page and "<td>jpeg_quality</td><td>90</td>" in page
    assert "http" not in page.replace("http-equiv", ""), "the page must need no network"


@pytest.mark.parametrize("output", ["out", "memory://tracked/out"])
def test_tracker_gets_settings_counts_and_report(tmp_path, monkeypatch, output):
    told = {}

    class Recording(NullTracker):
        def params(self, values):
            told.update(values)

        def metrics(self, values, step):
            told.update(values)

        def artifact(self, path, folder=""):
            told[path.name] = path.read_bytes()

    monkeypatch.setattr(ingest_module, "open_tracker", lambda *arguments, **more: Recording())
    write_messy_tars(tmp_path)
    ingest(settings(tmp_path, output))
    assert (told["source"], told["image_size"], told["rows_in"], told["quarantined"]) == ("laion", 448, 10, 1)
    assert told["units"] == 3 and "filters" not in told, "numbers alone"
    assert told["report.html"].startswith(b"<!doctype html>")
    assert len(told["quarantine.jsonl"].splitlines()) == 1


def test_duplicates_can_be_kept(tmp_path):
    write_messy_tars(tmp_path)
    result = ingest(settings(tmp_path, duplicates="keep"))
    assert (result["rows_out"], result["duplicates"]) == (7, 0)


def test_shards_stay_within_their_bounds(tmp_path):
    write_web_tar(tmp_path / "0.tar", 0, 150)
    result = ingest(settings(tmp_path, shard_rows=40))
    assert ShardSet.open(result["output"]).shard_rows == (40, 40, 40, 30)
    big = tmp_path / "big"
    write_tar(
        big / "0.tar", [m for n in range(40) for m in sample(f"{n}", jpeg(n, (300, 300)) + b"\0" * 60_000, f"t {n}")]
    )
    result = ingest(settings(big, shard_mb=1))
    shards = ShardSet.open(result["output"])
    assert len(shards.shard_rows) >= 3
    assert all(info.bytes < 1.1e6 for info in shards.manifest.shards)
    assert [row.id for row in shards] == [f"0/{n}" for n in range(40)]


def test_statistics_of_a_shard_are_those_of_the_rows_that_stay(tmp_path):
    """One unit of three files; the second and third sample repeat the first."""
    captions = ["one", "one", "one", "one two three", "one two three four", "one two"]
    images = [jpeg(0)] * 3 + [jpeg(n, (48 + n, 32)) for n in range(3, 6)]
    write_tar(tmp_path / "0.tar", [m for n in range(6) for m in sample(f"{n}", images[n], captions[n])])
    result = ingest(settings(tmp_path, shard_rows=2))
    assert (result["duplicates"], result["rows_out"]) == (2, 4)
    found = [info.statistics for info in ShardSet.open(result["output"]).manifest.shards]
    assert [each["words"] for each in found] == [
        {"least": 1, "mean": 1, "most": 1},
        {"least": 3, "mean": 3, "most": 3},
        {"least": 2, "mean": 3, "most": 4},
    ]
    assert [each["width"]["most"] for each in found] == [48, 51, 53]
    report = json.loads(Path(result["report_json"]).read_text())
    files = list((tmp_path / "out").glob("part-*.arrow"))
    assert (report["shards"], report["bytes"]) == (3, sum(file.stat().st_size for file in files))


def test_small_units_are_gathered_and_rows_keep_their_order(tmp_path):
    for number in range(12):
        write_web_tar(tmp_path / f"{number:05d}.tar", number * 9, 9)
    result = ingest(settings(tmp_path))
    shards = ShardSet.open(result["output"])
    assert shards.shard_rows == (108,)
    assert [row.turns[0].answers[0] for row in shards] == [f"picture number {n}" for n in range(108)]


def test_an_ingest_that_keeps_nothing_fails_with_the_commonest_reason(tmp_path):
    junk = [member for n in range(9) for member in sample(f"{n}", b"junk", "x")]
    write_tar(tmp_path / "0.tar", [*junk, *sample("empty", b"", "x")])
    for _ in range(2):
        with pytest.raises(
            NothingKeptError, match=r"none of the 10 samples .*9 of them, e\.g\.: image 0\.jpg does not"
        ):
            ingest(settings(tmp_path))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"quarantine.jsonl", "removed.jsonl", "near_duplicates.jsonl", ".lock"}
    assert len(lines(tmp_path / "out/quarantine.jsonl")) == 10
    write_web_tar(tmp_path / "0.tar", 0, 3)
    assert ingest(settings(tmp_path))["rows_out"] == 3


def test_an_ingest_whose_filters_remove_everything_fails_too(tmp_path):
    members = [member for n in range(5) for member in sample(f"{n}", jpeg(n), f"picture number {n}")]
    write_tar(tmp_path / "0.tar", [*members, *sample("junk", b"junk", "x")])
    with pytest.raises(NothingKeptError, match=r"filter min_words: 5.*removed\.jsonl"):
        ingest(settings(tmp_path, min_words=4))


@pytest.mark.parametrize(("good", "bad", "warns"), [(9, 1, False), (10, 2, True)])
def test_more_than_a_tenth_in_quarantine_is_warned_of_with_the_commonest_reason(tmp_path, caplog, good, bad, warns):
    good = [member for n in range(good) for member in sample(f"g{n}", jpeg(n), f"number {n}")]
    write_tar(tmp_path / "0.tar", [*good, *(m for n in range(bad) for m in sample(f"b{n}", b"junk", "x"))])
    ingest(settings(tmp_path))
    told = [record.getMessage() for record in caplog.records if "quarantined" in record.getMessage()]
    assert bool(told) is warns
    if warns:
        assert "2 of 12 samples (17 %)" in told[0] and "known format" in told[0]


@pytest.mark.parametrize("source", ["jsonl", "parquet", "hf", "coco_vqa"])
def test_input_without_entries_is_one_sentence(tmp_path, source):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "images").mkdir()
    if source in ("parquet", "hf"):
        pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "own.parquet")
    else:
        (tmp_path / "own.jsonl").write_bytes(b"" if source == "jsonl" else b"\n \n")
    given = next(path for path in tmp_path.iterdir() if path.is_file())
    with pytest.raises(SettingsError, match="holds no entries"):
        ingest(settings(tmp_path, source=source, input=str(given), images=str(tmp_path / "images")))


def test_finished_set_is_verified_and_not_made_again(tmp_path):
    write_messy_tars(tmp_path)
    first = ingest(settings(tmp_path))
    again = ingest(settings(tmp_path))
    assert again["reused_units"] == again["units"] == 3
    assert {k: v for k, v in again.items() if k not in ("seconds", "reused_units")} == {
        k: v for k, v in first.items() if k not in ("seconds", "reused_units")
    }
    shard = tmp_path / "out/part-00000.arrow"
    expected = content(tmp_path / "out")
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    assert ingest(settings(tmp_path))["reused_units"] == 0
    assert content(tmp_path / "out") == expected


def test_overwrite_reads_everything_again_and_until_it_is_done_there_is_no_manifest(tmp_path, monkeypatch):
    write_web_tar(tmp_path / "0.tar", 0, 5)
    with monkeypatch.context() as patched:  # a kill at the end of the first run
        patched.setattr(ingest_module.storage, "remove_folder", lambda location: None)
        ingest(settings(tmp_path))
    assert list((tmp_path / "out/_staging").iterdir())
    publish, there = ingest_module.publish, []

    def looking(*arguments):
        there.append((tmp_path / "out/manifest.json").exists())
        if len(there) == 1:
            raise KeyboardInterrupt
        return publish(*arguments)

    monkeypatch.setattr(ingest_module, "publish", looking)
    with pytest.raises(KeyboardInterrupt):
        ingest(settings(tmp_path, overwrite=True))
    assert ingest(settings(tmp_path))["reused_units"] == 1, "what replaces a set is continued, too"
    assert ingest(settings(tmp_path, overwrite=True))["reused_units"] == 0
    assert there == [False] * 3


CHANGED = {
    "image_size": 64,
    "jpeg_quality": 80,
    "shard_rows": 3,
    "shard_mb": 1,
    "min_side": 9,
    "max_aspect_ratio": 19.0,
    "max_megapixels": 99.0,
    "min_words": 2,
    "min_letters": 0.2,
    "max_repetition": 0.6,
    "duplicates": "keep",
    "near_duplicate_bits": 3,
}


@pytest.mark.parametrize("key", sorted(PrepareDataSettings.model_fields))
def test_every_setting_is_known_to_change_the_content_or_not_to(key):
    where = {
        "source",
        "input",
        "images",
        "output",
        "name",
        "task",
        "split",
    }  # part of the input, or of where the set is
    how = {
        "recipe",
        "seed",
        "tracking_uri",
        "experiment",
        "ray_address",
        "ray_loopback",
        "num_cpus",
        "object_store_mb",
        "quiet",
    }
    assert (key in CONTENT_SETTINGS) == (key in CHANGED) == (key not in where | how | {"num_workers", "overwrite"})


@pytest.mark.parametrize("key", CHANGED)
def test_a_set_of_other_settings_is_refused_with_the_difference_and_replaced_on_demand(tmp_path, key):
    write_web_tar(tmp_path / "0.tar", 0, 5)
    ingest(settings(tmp_path))
    before = content(tmp_path / "out")
    changed = {key: CHANGED[key]}
    with pytest.raises(SettingsError, match=rf"{key} was .* and is {CHANGED[key]!r}.*overwrite=true"):
        ingest(settings(tmp_path, **changed))
    assert content(tmp_path / "out") == before
    assert ingest(settings(tmp_path, **changed, overwrite=True))["reused_units"] == 0
    assert ShardSet.open(str(tmp_path / "out")).manifest.settings[key] == CHANGED[key]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda folder: write_web_tar(folder / "1.tar", 5, 5), r"1 more files, e\.g\. 1\.tar"),
        (lambda folder: write_web_tar(folder / "0.tar", 7, 4), r"file 0\.tar was changed"),
    ],
)
def test_a_set_of_other_input_is_refused_and_replaced_on_demand(tmp_path, change, difference):
    write_web_tar(tmp_path / "0.tar", 0, 5)
    ingest(settings(tmp_path))
    change(tmp_path)
    with pytest.raises(SettingsError, match=difference):
        ingest(settings(tmp_path))
    replaced = ingest(settings(tmp_path), replaces_other=True)
    assert replaced["rows_out"] != 5
    assert ingest(settings(tmp_path))["reused_units"] == replaced["units"]


def test_other_sources_and_names_are_refused(tmp_path):
    write_web_tar(tmp_path / "0.tar", 0, 5)
    ingest(settings(tmp_path))
    with pytest.raises(SettingsError, match="source was 'laion' and is 'cc_sbu'"):
        ingest(settings(tmp_path, source="cc_sbu"))
    with pytest.raises(SettingsError, match="name was 'laion' and is 'mine'"):
        ingest(settings(tmp_path, name="mine"))


def test_a_folder_with_other_peoples_files_is_refused(tmp_path):
    write_web_tar(tmp_path / "0.tar", 0, 5)
    (tmp_path / "out").mkdir()
    for name in ("part-00000.arrow", "manifest.json"):
        (tmp_path / "out" / name).write_text("{}")
        with pytest.raises(SettingsError, match=r"holds other files, e\.g\."):
            ingest(settings(tmp_path, overwrite=True))
        assert (tmp_path / "out" / name).read_text() == "{}"
    with pytest.raises(SettingsError, match="holds other files"):
        ingest(settings(tmp_path, "."))  # the folder of the input itself


def test_images_that_were_missing_and_are_there_now_are_read(tmp_path, caplog):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"image": f"{n}.jpg", "caption": f"c {n}"}) + "\n" for n in range(3)))
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    given = settings(tmp_path, source="jsonl", input=str(own))
    assert ingest(given)["rows_out"] == 1
    with caplog.at_level("INFO"):
        assert ingest(given)["reused_units"] == 1
    assert "images that they name were not looked at again" in caplog.text
    (tmp_path / "2.jpg").write_bytes(jpeg(2))
    assert ingest(given)["rows_out"] == 2
    assert "images that were missing are there now" in caplog.text


def test_leftovers_of_another_run_are_removed(tmp_path):
    write_web_tar(tmp_path / "0.tar", 0, 5)
    (tmp_path / "out/_staging").mkdir(parents=True)
    for name in ("part-00007.arrow", ".part-00001.arrow.tmp"):
        (tmp_path / "out" / name).write_bytes(b"old")
    ingest(settings(tmp_path))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"part-00000.arrow", "inputs.json", "result.json", ".lock", *TIMELESS}


def test_order_of_the_units_does_not_show(tmp_path, monkeypatch):
    for number in range(6):
        write_web_tar(tmp_path / f"{number:05d}.tar", number * 9, 9)
    write_messy_tars(tmp_path)
    ingest(settings(tmp_path, "straight"))
    original = ingest_module.map_units

    def shuffled(setup, units, *arguments, **more):
        yield from original(setup, random.Random(0).sample(units, len(units)), *arguments, **more)

    monkeypatch.setattr(ingest_module, "map_units", shuffled)
    ingest(settings(tmp_path, "shuffled", num_cpus=7))
    assert content(tmp_path / "shuffled") == content(tmp_path / "straight")


def test_two_runs_do_not_share_a_folder(tmp_path):
    write_messy_tars(tmp_path)
    (tmp_path / "out").mkdir()
    with ingest_module.storage.alone(str(tmp_path / "out")), pytest.raises(SettingsError, match="another run"):
        ingest(settings(tmp_path))


def test_object_storage_gives_the_same_as_a_disk(tmp_path):
    import fsspec

    write_messy_tars(tmp_path)
    ingest(settings(tmp_path, "whole"))
    memory = fsspec.filesystem("memory")
    for path in tmp_path.glob("*.tar"):
        memory.pipe(f"/in/{path.name}", path.read_bytes())
    result = ingest(settings(tmp_path, input="memory://in/*.tar", output="memory://out/set"))
    assert result["rows_out"] == 6
    names = {path.rsplit("/", 1)[-1] for path in memory.ls("/out/set", detail=False)}
    assert names == {"part-00000.arrow", "inputs.json", "result.json", *TIMELESS}
    for name in ("part-00000.arrow", "manifest.json", "quarantine.jsonl"):
        assert memory.cat(f"/out/set/{name}") == (tmp_path / "whole" / name).read_bytes()
    again = ingest(settings(tmp_path, input="memory://in/*.tar", output="memory://out/set"))
    assert again["reused_units"] == 3


def test_text_only_data_has_no_images(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"question": f"q{n}", "answer": "a"}) + "\n" for n in range(5))
    )
    result = ingest(settings(tmp_path, source="jsonl", input=str(tmp_path / "t.jsonl")))
    row = ShardSet.open(result["output"]).row(4)
    assert (row.image, row.width, row.height, row.task) == (None, 0, 0, "text")


def test_changes_are_summed_over_the_units_and_near_duplicates_are_looked_for_as_asked(tmp_path, monkeypatch):
    asked = []
    original = publish_module.find_near_duplicates
    monkeypatch.setattr(
        publish_module, "find_near_duplicates", lambda *given: asked.append(given[2]) or original(*given)
    )
    for number in range(2):
        line = json.dumps({"question": f"q{number}", "answers": ["", "a"]}) + "\n"
        (tmp_path / f"{number}.jsonl").write_text(line * (number + 1))
    given = settings(tmp_path, source="jsonl", input=str(tmp_path), duplicates="keep", near_duplicate_bits=6)
    assert ingest(given)["changes"] == {"empty_answer_dropped": 3} and asked == [6]
