"""Publishing staged units that are given as tables: what becomes of each row, and which file is written when."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from pipelines import storage
from pipelines.data.ingest import job, lists, publish
from pipelines.data.ingest.deduplicate import NearDuplicate
from pipelines.data.ingest.inputs import INPUTS, STAGING, SetInputs, check_output
from pipelines.data.ingest.lists import RowNames, repeated_rows, write_lists
from pipelines.data.ingest.publish import Piece, ShardPlan
from pipelines.data.ingest.report import Totals
from pipelines.data.ingest.staging import INDEX_SCHEMA, UnitRecord
from pipelines.data.shard_format import RowCounts, ShardInfo
from pipelines.data.sources.base import Rejected, SourceInput, SourceUnit
from pipelines.settings import PrepareDataSettings, SettingsError
from pipelines.storage import Location


def line(name, content, image=0, perceptual=0):
    fields = {"width": 10, "height": 10, "image_bytes": 5, "words": 1, "kept": True}
    hashes = {"content_hash": content.to_bytes(16, "little"), "image_hash": image, "perceptual_hash": perceptual}
    return {"id": name, **hashes, **fields}


class Staged:
    """Units as they would be staged: index lines per unit, files by their rows, rejections."""

    folder = "/staging"

    def __init__(self, *units, rejected=((),), changes=()):
        self.units, self.num_units = units, len(units)
        self.found, self.changed = rejected, changes
        self.asked = []

    def index(self, number, columns=None):
        self.asked.append(("index", number))
        table = pa.Table.from_pylist([entry for part in self.units[number] for entry in part], INDEX_SCHEMA)
        return table.select(columns) if columns else table

    def record(self, number):
        self.asked.append(("record", number))
        files = [
            ShardInfo(f"unit-{number}-{n}.arrow", len(part), 100 * len(part), f"s{n}")
            for n, part in enumerate(self.units[number])
        ]
        rejected = self.found[number] if number < len(self.found) else ()
        changes = self.changed[number] if number < len(self.changed) else {}
        return UnitRecord("f", f"{number}.tar", f"{number}/", files=files, rejected=list(rejected), changes=changes)

    def rejected(self):
        for number in range(self.num_units):
            yield from self.record(number).rejected


def settings(**changes):
    return PrepareDataSettings(source="laion", shard_rows=4, **changes)


def plan(staged, stays, **changes):
    return publish._plan_shards(settings(**changes), "/out", staged, np.array(stays, dtype=bool))


def test_rows_that_stay_go_into_shards_in_order(monkeypatch):
    monkeypatch.setattr(publish, "_SMALL_SHARE", 1)
    units = [[[line(f"{u}{n}", 10 * u + n) for n in range(3)]] for u in range(3)]
    plans, totals = plan(Staged(*units), [1, 1, 0, 1, 1, 1, 0, 0, 0])
    assert [(each.location, [(piece.location, piece.num_rows) for piece in each.pieces]) for each in plans] == [
        ("/out/part-00000.arrow", [("/staging/unit-0-0.arrow", 2)]),
        ("/out/part-00001.arrow", [("/staging/unit-1-0.arrow", 3)]),
    ], "five rows do not fit into four, and a unit without rows is left out"
    assert plans[0].pieces[0].rows.tolist() == [0, 1] and plans[1].pieces[0].rows is None
    assert totals.images == 5 and len(totals.shard_statistics) == 2
    plans, _ = plan(Staged(*units), [1, 0, 0, 1, 1, 1, 0, 0, 1])
    assert [[piece.num_rows for piece in each.pieces] for each in plans] == [[1, 3], [1]]
    large, _ = plan(Staged([[line("a", 1)] * 4], [[line("b", 2)]]), [1] * 5)
    assert [[piece.num_rows for piece in each.pieces] for each in large] == [[4], [1]], "a full file stays alone"


def publish_all(monkeypatch, tmp_path, staged, **changes):
    done = []
    monkeypatch.setattr(
        publish,
        "write_report",
        lambda output, shards, totals: done.append(("report", shards.manifest, output, totals.images)),
    )
    write_lines, write = storage.write_lines, storage.write_atomically
    monkeypatch.setattr(
        storage, "write_lines", lambda at, lines: done.append(at.rsplit("/", 1)[1]) or write_lines(at, lines)
    )
    monkeypatch.setattr(
        storage, "write_atomically", lambda at, data: done.append(str(at).rsplit("/", 1)[1]) or write(at, data)
    )

    def write_shards(plans):
        done.append("shards")
        return [
            ShardInfo(p.location.rsplit("/", 1)[1], sum(piece.num_rows for piece in p.pieces), 7, "x") for p in plans
        ]

    return publish.publish(settings(**changes), "laion", str(tmp_path), staged, write_shards), done


def all_counts(*values):
    return dict(zip(RowCounts.__annotations__, values, strict=True))


def test_texts_have_no_near_duplicates_and_one_row_is_a_set(monkeypatch, tmp_path):
    """Rows without an image have 0 for its hashes."""
    texts = [line(name, content) for name, content in (("a", 1), ("b", 2))]
    counts, _ = publish_all(monkeypatch, tmp_path, Staged([texts]))
    assert counts == all_counts(2, 2, 0, 0, 0, 0, {}, {}) and (tmp_path / "near_duplicates.jsonl").read_bytes() == b""
    counts, done = publish_all(monkeypatch, tmp_path, Staged([texts[:1]]))
    assert counts == all_counts(1, 1, 0, 0, 0, 0, {}, {}) and done[-1] == "manifest.json"


def test_where_nothing_is_kept_the_lists_say_why_and_there_is_no_manifest(monkeypatch, tmp_path):
    (tmp_path / "part-00000.arrow").touch()
    rejected = [Rejected("a", "0.tar", "image a.jpg is bad"), Rejected("b", "0.tar", "few", "min_words")]
    with pytest.raises(publish.NothingKeptError) as error:
        publish_all(monkeypatch, tmp_path, Staged([[]], rejected=(rejected,)))
    assert str(error.value) == (
        "none of the 2 samples of laion could be kept (1 of them, e.g.: image a.jpg is bad). Is it the right input? "
        f"{tmp_path}/quarantine.jsonl lists all."
    )
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"quarantine.jsonl", "removed.jsonl", "near_duplicates.jsonl"}


@pytest.mark.parametrize("duplicates", ["drop", "keep"])
def test_every_sample_is_counted_once_and_the_manifest_comes_last(monkeypatch, tmp_path, duplicates, caplog):
    """Rows 0 and 2 are the same; row 3 is a near duplicate of row 1; row 2, where it stays, is like none."""
    rows = [line("a", 1, 11, 0b1), line("b", 2, 12, 0xFF00), line("c", 1, 13, 0xFF01), line("d", 4, 14, 0xFF03)]
    rejected = [Rejected("e", "0.tar", "broken"), Rejected("f", "0.tar", "tiny", "min_side")]
    rejected = (rejected, [Rejected("g", "1.tar", "few", "min_words")])
    staged = Staged([rows[:2]], [rows[2:]], rejected=rejected, changes=({"x": 2}, {"b": 3, "x": 1}))
    for name in ("part-00009.arrow", "part-00000.txt", "notes.arrow", "part-00000.arrow"):
        (tmp_path / name).touch()
    counts, done = publish_all(monkeypatch, tmp_path, staged, duplicates=duplicates)
    kept = 4 if duplicates == "keep" else 3
    near = [{"id": "d", "near": "b", "bits": 2}]
    near = [{"id": "c", "near": "b", "bits": 1}, *near] if duplicates == "keep" else near
    assert counts == all_counts(7, kept, 4 - kept, 2, 1, len(near), {"min_side": 1, "min_words": 1}, {"b": 3, "x": 3})
    assert list(counts["changes"]) == ["b", "x"], "in one order in every run"
    assert [json.loads(text) for text in (tmp_path / "near_duplicates.jsonl").read_text().splitlines()] == near
    assert done[0] == "shards" and done[-1] == "manifest.json" and done[-2][0] == "report"
    assert caplog.messages == [
        "laion: 1 of 7 samples (14 %) are quarantined; the commonest reason (1): broken. "
        f"{tmp_path}/quarantine.jsonl lists all."
    ]
    assert done[-2][2:] == (str(tmp_path), kept), "a report of the rows that stay"
    manifest = done[-2][1]
    assert (manifest.source, manifest.counts["rows_in"], manifest.settings["shard_rows"]) == ("laion", 7, 4)
    assert [shard.statistics["width"]["most"] for shard in manifest.shards] == [10] * len(manifest.shards)
    assert {path.name for path in tmp_path.iterdir()} >= {"part-00000.txt", "notes.arrow", "part-00000.arrow"}
    assert not (tmp_path / "part-00009.arrow").exists(), "of an earlier run"
    removed = [json.loads(text) for text in (tmp_path / "removed.jsonl").read_text().splitlines()]
    repeated = [{"source": "laion", "shard": "1.tar", "key": "c", "filter": "duplicate", "reason": "same as a"}]
    assert removed[2:] == ([] if duplicates == "keep" else repeated)
    assert [entry["key"] for entry in removed[:2]] == ["f", "g"]


@pytest.mark.parametrize("at_once", [1, 2])
def test_names_of_rows_are_looked_up_in_their_units(monkeypatch, at_once):
    staged = Staged([[line("0/a", 1), line("0/b", 2)], [line("0/d", 3)]], [[]], [[line("2/c", 4)]])
    names = RowNames(staged, np.array([0, 3, 3, 4]))
    assert names.ids(np.array([0, 3, 1, 2, 3, 1])) == ["0/a", "2/c", "0/b", "0/d", "2/c", "0/b"]
    assert [staged.asked.count(("index", number)) for number in range(3)] == [1, 0, 1], "in a bucket each is a request"
    assert names.ids(np.array([], dtype=int)) == []
    assert list(names.shards_and_keys(np.array([1, 3]))) == [("0.tar", "b"), ("2.tar", "c")]
    monkeypatch.setattr(lists, "_NAMED_AT_ONCE", at_once)
    first, second = repeated_rows(names, np.array([2, 3]), np.array([0, 1, 1, 0]))
    assert first == Rejected("d", "0.tar", "same as 0/b", "duplicate")
    assert second == Rejected("c", "2.tar", "same as 0/a", "duplicate")
    near = lists.near_lines(names, [NearDuplicate(3, 0, 2), NearDuplicate(2, 1, 0)])
    assert list(near) == [{"id": "2/c", "near": "0/a", "bits": 2}, {"id": "0/d", "near": "0/b", "bits": 0}]


def test_lists_of_what_gave_no_row(tmp_path):
    staged = Staged(
        [[]],
        rejected=(
            [Rejected("a", "0.tar", "bad"), Rejected("b", "0.tar", "few", "z"), Rejected("c", "0.tar", "f", "a")],
        ),
    )
    found = write_lists("s", str(tmp_path), staged, iter([Rejected("d", "1.tar", "same as x", "duplicate")]))
    assert found == ({"a": 1, "z": 1}, 1) and list(found[0]) == ["a", "z"], "duplicates are counted elsewhere"
    assert (
        tmp_path / lists.QUARANTINE
    ).read_text() == '{"source": "s", "shard": "0.tar", "key": "a", "reason": "bad"}\n'
    removed = [json.loads(text) for text in (tmp_path / lists.REMOVED).read_text().splitlines()]
    assert [(entry["key"], entry["filter"]) for entry in removed] == [("b", "z"), ("c", "a"), ("d", "duplicate")]
    assert list(removed[0]) == ["source", "shard", "key", "filter", "reason"]


def counts(**changes):
    return {**all_counts(10, 5, 0, 2, 3, 0, {"min_side": 1500, "min_words": 2}, {}), **changes}


def test_what_is_told_of_an_ingest(caplog):
    caplog.set_level(logging.INFO)
    totals = Totals()
    totals.add_rejected(
        [Rejected("a", "x", "image a.jpg is bad"), Rejected("b", "x", "image b.jpg is bad"), Rejected("c", "x", "odd")]
    )
    publish._tell("laion", "/out", counts(rows_in=30), totals)
    assert caplog.messages == ["laion: 30 rows in, 5 out; duplicates 0, filtered 2, quarantined 3"], (
        "a tenth is not much"
    )
    publish._tell("laion", "/out", counts(rows_in=1200, quarantined=1000, changes={"cut": 2000, "x": 1}), totals)
    assert caplog.messages[1:] == [
        "laion: 1,200 rows in, 5 out; duplicates 0, filtered 2, quarantined 1,000",
        "laion: 1,000 of 1,200 samples (83 %) are quarantined; the commonest reason (2): image a.jpg is bad. "
        "/out/quarantine.jsonl lists all.",
        "laion: rows that were kept, but changed: cut 2,000, x 1 (docs/data_format.md)",
    ]
    none = publish._nothing_kept("laion", "/out", counts(rows_in=1234, quarantined=2, filtered=2), totals)
    assert none == (
        "none of the 1,234 samples of laion could be kept (2 of them, e.g.: image a.jpg is bad). Is it the right "
        "input? /out/quarantine.jsonl lists all."
    )
    empty = publish._nothing_kept("laion", "/out", counts(rows_in=0, quarantined=0, filtered=0, filters={}), Totals())
    assert empty == "the input of laion holds no samples: is it the right one?"
    filtered = publish._nothing_kept("laion", "/out", counts(quarantined=1, filtered=2), totals)
    assert "(filter min_side: 1,500, filter min_words: 2)" in filtered and filtered.endswith(
        "/out/removed.jsonl lists all."
    )


def test_hashes_of_all_units_follow_one_another_to_their_last_bit():
    most = 2**64 - 1
    units = [[[line("a", most << 64 | 5, most, 2)]], [[]], [[line("b", 6 << 64 | most, 3, most), line("c", 7, 5, 6)]]]
    rows = publish._read_hashes(Staged(*units))
    assert rows.starts.tolist() == [0, 1, 1, 3] and rows.content.tolist() == [[5, most], [most, 6], [7, 0]]
    assert (rows.image.tolist(), rows.perceptual.tolist()) == ([most, 3, 5], [2, most, 6])
    assert {part.dtype for part in (rows.content, rows.image, rows.perceptual)} == {np.dtype(np.uint64)}
    none = publish._read_hashes(Staged([[]]))
    assert (none.starts.tolist(), none.content.shape, none.image.shape) == ([0, 0], (0, 2), (0,))


# ---------------------------------------------------------------- the job


def test_shards_that_are_copied_go_to_the_cluster_and_links_are_made_here(monkeypatch):
    info = ShardInfo("u", 1, 1, "x")
    link, copy = Piece("/u", info, None), Piece("/u", info, np.array([0]))
    plans = [ShardPlan(f"/p{n}", pieces) for n, pieces in enumerate([(link,), (copy,), (link, link), (link,)])]
    asked = []

    def map_units(setup, units, workers, given, *, name):
        asked.append((setup, [number for number, _ in units], workers.count, name))
        yield from ((each, f"cluster {each[1].location}") for each in reversed(units))

    monkeypatch.setattr(job, "map_units", map_units)
    monkeypatch.setattr(job, "write_shard", lambda each: f"here {each.location}")
    found = job._write_shards(settings(num_workers=3), plans)
    assert found == ["here /p0", "cluster /p1", "cluster /p2", "here /p3"]
    assert asked == [(job._shard_writer, [1, 2], 3, "prepare_data: shards")]
    assert job._write_shards(settings(), plans[:2]) == ["here /p0", "here /p1"], "one copy is not worth a task"
    assert job._shard_writer()((7, plans[0])) == "here /p0"


def test_a_vanished_file_is_one_sentence(monkeypatch):
    def gone(*_):
        raise OSError("0.tar is gone")

    monkeypatch.setattr(job, "stage_unit", gone)
    monkeypatch.setattr(job, "write_shard", gone)
    for work in (lambda: job._unit_reader(settings(), "/s")((0, None)), lambda: job._shard_writer()((0, None))):
        with pytest.raises(
            job.UnreadableError, match=r"^0\.tar is gone; finished parts are kept: run the same command"
        ):
            work()


def test_progress_counts_rows_over_all_units(monkeypatch):
    shown, asked = [], {}
    outcomes = [job.UnitOutcome(1000, 900, True), job.UnitOutcome(500, 400, False), job.UnitOutcome(5, 5, True)]

    def map_units(setup, units, workers, given, *, name, num_bytes):
        asked.update(name=name, bytes=[num_bytes(unit) for unit in units], setup=setup)
        yield from zip(units, outcomes, strict=True)

    monkeypatch.setattr(job, "map_units", map_units)
    monkeypatch.setattr(job.Bar, "seconds", property(lambda bar: 2.0))
    monkeypatch.setattr(job.Bar, "update", lambda bar, *now: shown.append((bar.title, *now)))
    units = [SimpleNamespace(num_bytes=size) for size in (3, 4, 5)]
    assert job._run_units(settings(quiet=True), units, "/staging") == 2
    assert shown[1] == ("prepare laion", 2, 3, "rows 1,500 in, 1,300 kept  750 rows/s")
    assert asked["bytes"] == [3, 4, 5] and asked["name"] == "prepare_data"
    assert asked["setup"].args == (settings(quiet=True), "/staging")


def test_an_output_is_a_folder_or_a_uri_named_by_the_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert job._output_folder(settings(), "mine") == f"{tmp_path}/data/mine" and (tmp_path / "data/mine").is_dir()
    assert job._output_folder(settings(output="memory://b/x/"), "mine") == "memory://b/x"
    assert job._locations("/o") == {
        "output": "/o",
        "result": "/o/result.json",
        "manifest": "/o/manifest.json",
        "quarantine": "/o/quarantine.jsonl",
        "removed": "/o/removed.jsonl",
        "near_duplicate_list": "/o/near_duplicates.jsonl",
        "report_json": "/o/report.json",
        "report_html": "/o/report.html",
    }


def test_only_an_empty_folder_or_one_of_ours_is_written_to(tmp_path):
    source = SourceInput("laion", "i", "", "laion", "pair")
    now = SetInputs.of(source, [SourceUnit(source, Location("", "/a"), "a.tar")], settings())
    out = str(tmp_path)
    check_output(out, now, replaces_other=False)
    for name in (".lock", ".draft.tmp"):
        (tmp_path / name).touch()
    check_output(out, now, replaces_other=False)
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).touch()
    with pytest.raises(SettingsError) as error:
        check_output(out, now, replaces_other=True)
    assert str(error.value) == (
        f"output={out!r} holds other files, e.g. 'a.txt', and no prepared data: choose an empty or new folder."
    )
    (tmp_path / STAGING).mkdir()
    check_output(out, now, replaces_other=False)
    (tmp_path / STAGING).rmdir()
    (tmp_path / "manifest.json").write_text('{"format": "tinygptv-shards"}')
    check_output(out, now, replaces_other=False)
    other = SetInputs.of(source, [], settings(min_words=3))
    other.write(out, [])
    with pytest.raises(SettingsError) as error:
        check_output(out, now, replaces_other=False)
    assert str(error.value) == (
        f"output={out!r} holds data that was prepared from something else: min_words was 3 and is 1. Choose another "
        "output, or set overwrite=true to replace it."
    )
    check_output(out, now, replaces_other=True)
    assert (tmp_path / INPUTS).exists(), "nothing is removed by looking"
