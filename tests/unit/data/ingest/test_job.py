"""Ingest without a cluster: counts, filters, duplicates, bounds, and the same bytes after a crash at any write."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.data.ingest import job as ingest_module
from pipelines.data.ingest.job import ingest
from pipelines.data.shards import ShardSet
from pipelines.settings import PrepareDataSettings, SettingsError
from pipelines.tracking.base import NullTracker
from tests.paths import ROOT
from tests.source_files import encode, jpeg, picture, sample, write_tar, write_web_tar

TIMELESS = ("manifest.json", "quarantine.jsonl", "removed.jsonl", "near_duplicates.jsonl", "report.json", "report.html")


def settings(folder, output="out", **changes):
    place = output if "://" in output else str(folder / output)
    known = {"source": "laion", "input": str(folder / "*.tar"), "output": place, "quiet": True, "num_workers": 0}
    return PrepareDataSettings(**{**known, "tracking_uri": "none", **changes})


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def content(folder) -> dict[str, bytes]:
    """Every file that must not depend on the way to it."""
    names = [path.name for path in Path(folder).glob("*.arrow")]
    return {name: Path(folder, name).read_bytes() for name in sorted(names) + list(TIMELESS)}


def write_messy_tars(folder):
    """Three tars with a known fate for each of their samples."""
    first = [
        *sample("a0", jpeg(0), "a red bus"),
        *sample("a1", jpeg(1), "a cat"),
        *sample("a2", b"junk", "broken"),
        *sample("tiny", jpeg(2, (4, 4)), "tiny"),
    ]
    same_picture = [*sample("b0", jpeg(0), "a red bus"), *sample("b1", jpeg(0), "another caption")]
    near = sample("b2", encode(picture(1, (96, 64)), quality=70), "a cat, larger")
    third = [
        *sample("c0", jpeg(5, (600, 500)), "large"),
        *sample("c1", jpeg(6), "$$$$$$$"),
        *sample("c2", jpeg(7), "last"),
    ]
    write_tar(folder / "00000.tar", first)
    write_tar(folder / "00001.tar", [*same_picture, *near])
    write_tar(folder / "00002.tar", third)


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
    assert [(line["id"], line["near"]) for line in lines(result["near_duplicate_list"])] == [("00001/b2", "00000/a1")]


def test_report_tells_the_same(tmp_path):
    write_messy_tars(tmp_path)
    result = ingest(settings(tmp_path))
    report = json.loads(Path(result["report_json"]).read_text())
    assert report["counts"]["rows_in"] == result["rows_in"]
    assert sum(report["histograms"]["words"]["rows"]) == result["rows_out"]
    assert list(report["quarantine_reasons"].values()) == [1]
    page = Path(result["report_html"]).read_text()
    assert page.count("<img") == result["rows_out"]
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


def test_small_units_are_gathered_and_rows_keep_their_order(tmp_path):
    for number in range(12):
        write_web_tar(tmp_path / f"{number:05d}.tar", number * 9, 9)
    result = ingest(settings(tmp_path))
    shards = ShardSet.open(result["output"])
    assert shards.shard_rows == (108,)
    assert [row.turns[0].answers[0] for row in shards] == [f"picture number {n}" for n in range(108)]


def test_nothing_usable_gives_an_empty_set(tmp_path):
    write_tar(tmp_path / "0.tar", sample("a", b"junk", "x"))
    result = ingest(settings(tmp_path))
    assert (result["rows_in"], result["rows_out"], result["quarantined"]) == (1, 0, 1)
    assert len(ShardSet.open(result["output"])) == 0


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


def test_changed_input_or_settings_make_the_set_anew(tmp_path):
    write_web_tar(tmp_path / "0.tar", 0, 5)
    ingest(settings(tmp_path))
    write_web_tar(tmp_path / "1.tar", 5, 5)
    assert ingest(settings(tmp_path))["rows_out"] == 10
    assert ingest(settings(tmp_path, min_words=4))["rows_out"] == 0
    assert not list((tmp_path / "out").glob("*.arrow"))


def test_leftovers_of_another_run_are_removed(tmp_path):
    write_web_tar(tmp_path / "0.tar", 0, 5)
    (tmp_path / "out").mkdir()
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


class Crash(BaseException):
    """A kill: nothing may catch it and go on."""


def crash_at(monkeypatch, number: int) -> list[str]:
    """Let the process die before its ``number``-th visible change on the disk; returns the changes before it."""
    changes: list[str] = []

    def dying(name: str, change):
        def wrapped(*args, **kwargs):
            if len(changes) == number:
                raise Crash
            changes.append(f"{name} {args[0]}")
            return change(*args, **kwargs)

        return wrapped

    for name in ("replace", "hardlink_to", "unlink"):
        monkeypatch.setattr(Path, name, dying(name, getattr(Path, name)))
    for name in ("remove_folder", "remove_file"):
        monkeypatch.setattr(storage, name, dying(name, getattr(storage, name)))
    return changes


def test_a_crash_at_any_change_of_the_disk_does_not_show_in_the_result(tmp_path):
    write_messy_tars(tmp_path)
    ingest(settings(tmp_path, "whole"))
    number, reused = 0, set()
    while True:
        with pytest.MonkeyPatch.context() as patch:
            changes = crash_at(patch, number)
            try:
                ingest(settings(tmp_path, f"crashed-{number}"))
                break
            except Crash:
                assert len(changes) == number
        reused.add(ingest(settings(tmp_path, f"crashed-{number}"))["reused_units"])
        assert content(tmp_path / f"crashed-{number}") == content(tmp_path / "whole"), changes
        assert not (tmp_path / f"crashed-{number}/_staging").exists()
        number += 1
    assert number > 15
    assert reused == {0, 1, 2, 3}


def test_a_crash_never_lets_a_set_pass_for_one_of_other_settings(tmp_path):
    write_messy_tars(tmp_path)
    ingest(settings(tmp_path, "whole"))
    for number in range(40):
        output = f"mixed-{number}"
        shutil.copytree(tmp_path / "whole", tmp_path / output)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Crash):
            crash_at(patch, number)
            ingest(settings(tmp_path, output, min_words=2))
            break
        ingest(settings(tmp_path, output))
        assert content(tmp_path / output) == content(tmp_path / "whole"), number
    assert number > 15


KILLED = """
import sys
from pipelines.data.ingest.job import ingest
from pipelines.settings import PrepareDataSettings
fields = {"source": "laion", "input": sys.argv[1], "output": sys.argv[2], "tracking_uri": "none", "num_workers": 0}
print("ready", flush=True)
ingest(PrepareDataSettings(**fields))
"""


def test_kill_9_while_working(tmp_path):
    for number in range(8):
        write_web_tar(tmp_path / f"{number:05d}.tar", number * 40, 40, (200, 150))
    ingest(settings(tmp_path, "whole"))
    for delay in (0.03, 0.12):
        output = tmp_path / f"killed-{delay}"
        command = [sys.executable, "-c", KILLED, str(tmp_path / "*.tar"), str(output)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
        ingest(settings(tmp_path, output.name))
        assert content(output) == content(tmp_path / "whole")


def test_full_disk_is_one_sentence_and_the_run_goes_on_later(tmp_path, monkeypatch):
    write_messy_tars(tmp_path)
    ingest(settings(tmp_path, "whole"))
    written = 0

    def write(self, data, original=storage.Path.write_bytes):
        nonlocal written
        written += 1
        if written == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage.Path, "write_bytes", write)
        with pytest.raises(storage.DiskFullError, match=r"no space left .* run the same command again"):
            ingest(settings(tmp_path))
    assert ingest(settings(tmp_path))["reused_units"] == 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_two_runs_do_not_share_a_folder(tmp_path):
    write_messy_tars(tmp_path)
    (tmp_path / "out").mkdir()
    with ingest_module._alone(str(tmp_path / "out")), pytest.raises(SettingsError, match="another run"):
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
