"""Annotation files of every form, encoding and compression: no entry is lost, whatever the file is called."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import zlib
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from pipelines import storage
from pipelines.data.sources import json_entries, json_items
from pipelines.data.sources.base import Rejected, SourceInput, SourceUnit
from pipelines.data.sources.drafts import Draft, read_drafts
from pipelines.data.sources.json_entries import detect_form, plan_entries, read_entries
from pipelines.data.sources.own_rows import KNOWN_BY
from pipelines.settings import SettingsError
from tinygptv.data.sample import Turn

ENTRIES = [{"a": n, "text": f"caf\u00e9 \u2028 {n}"} for n in range(7)]
KEYED = {f"k{n}": entry for n, entry in enumerate(ENTRIES)}
LIST = json.dumps(ENTRIES, ensure_ascii=False)
LINES = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in ENTRIES)


def read(path, data, member="", row_fields=(), per_unit=3):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    (file,) = storage.find_files(str(path))
    form = detect_form(file, member, row_fields)
    source = SourceInput("x", str(path), "", "x", "")
    units = list(plan_entries(source, file, form, entries_per_unit=per_unit))
    return [found for unit in units for found in read_entries(unit)], len(units)


FORMS = {
    "list": (LIST, 3),
    "list over lines": (json.dumps(ENTRIES, indent=1, ensure_ascii=False), 3),
    "lines": (LINES, 3),
    "lines without a last break": (LINES.rstrip("\n"), 3),
    "lines with blank ones and CRLF": (LINES.replace("\n", "\r\n\r\n"), 5),
    "lines with a byte order mark": ("\ufeff" + LINES, 3),
    "list with a byte order mark": ("\ufeff" + LIST, 3),
    "data": (json.dumps({"info": {"a": 1}, "data": ENTRIES}, ensure_ascii=False), 3),
    "any other list": (json.dumps({"version": "1", "things": ENTRIES, "tags": ["x"]}, ensure_ascii=False), 3),
    "keyed": (json.dumps(KEYED, ensure_ascii=False), 3),
    "two lists": (json.dumps(ENTRIES[:4], ensure_ascii=False) + "\n" + json.dumps(ENTRIES[4:], ensure_ascii=False), 3),
    "two keyed objects": (
        "\n".join(json.dumps(dict(list(KEYED.items())[part]), indent=1) for part in (slice(4), slice(4, 7))),
        3,
    ),
    "objects one after the other": ("".join(json.dumps(entry) for entry in ENTRIES), None),
}


@pytest.mark.parametrize("name", ["own.json", "own.jsonl"])
@pytest.mark.parametrize("form", [name for name in FORMS if name != "objects one after the other"])
def test_what_is_in_the_file_decides_and_not_its_name(tmp_path, form, name):
    text, num_units = FORMS[form]
    found, units = read(tmp_path / name, text)
    assert [entry for _, entry in found] == ENTRIES
    assert units == num_units
    assert len({key for key, _ in found}) == len(ENTRIES)


@pytest.mark.parametrize("form", ["list", "lines", "data", "keyed"])
@pytest.mark.parametrize(
    "pack",
    [
        gzip.compress,
        bz2.compress,
        lzma.compress,
        lambda data: data.decode().encode("utf-16"),
        lambda data: b"\xfe\xff" + data.decode().encode("utf-16-be"),
        lambda data: data.decode().encode("utf-32"),
        lambda data: gzip.compress(data.decode().encode("utf-16")),
    ],
    ids=["gzip", "bz2", "xz", "utf-16", "utf-16-be", "utf-32", "both"],
)
def test_compressed_and_transcoded_files_give_the_same_entries(tmp_path, form, pack, monkeypatch):
    monkeypatch.setattr("pipelines.storage.COPY_BYTES", 11)
    found, units = read(tmp_path / "own.json.gz", pack(FORMS[form][0].encode()))
    assert [entry for _, entry in found] == ENTRIES
    assert units == 1


def test_escapes_survive_in_packed_files(tmp_path):
    text = '[{"a": "\\u4e2d \u4e2d \\ud83d\\ude00 caf\u00e9"}]'
    found, _ = read(tmp_path / "a.json", gzip.compress(text.encode()))
    assert found[0][1] == {"a": "\u4e2d \u4e2d \U0001f600 caf\u00e9"}


@pytest.mark.parametrize("indent", [None, 1])
def test_one_row_is_a_row_and_no_container(tmp_path, indent):
    """A row over several lines was taken for a container: its turns became rows of their own, without its image."""
    for row in (
        {"image": "a.jpg", "conversations": [{"from": "human", "value": "q"}]},
        {"image": "a.jpg", "turns": [{"question": "q", "answers": ["a"]}]},
        {"caption": "q", "objects": [{"name": "cat"}]},
        {"image": "a.jpg", "answers": ["the cat"], "boxes": [[1, 2, 3, 4]]},
        {"image": "a.jpg", "messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"query": "q", "response": "a", "images": [{"path": "a.jpg"}]},
    ):
        found, _ = read(tmp_path / "own.json", json.dumps(row, indent=indent), row_fields=KNOWN_BY)
        assert [entry for _, entry in found] == [row]
    rows = [{"image": "a.jpg", "conversations": [{"from": "human", "value": "q"}]}]
    plain = [{"image": "a.jpg", "question": "q", "answer": "a"}]
    for container, within in (
        ({"description": "mine", "rows": rows}, rows),
        ({"conversations": rows}, rows),
        ({"description": "mine", "instruction": "all", "data": plain}, plain),
        ({"output": plain}, plain),
    ):
        found, _ = read(tmp_path / "own.json", json.dumps(container, indent=indent), row_fields=KNOWN_BY)
        assert [entry for _, entry in found] == within
    if not indent:
        found, _ = read(tmp_path / "one.jsonl", json.dumps({"a": 1}))
        assert [entry for _, entry in found] == [{"a": 1}]


@pytest.mark.parametrize("name", ["own.json", "own.jsonl", "own.json.gz"])
@pytest.mark.parametrize(("joint", "indent"), [("\n", 1), (",\n", 2), (",\n", None), ("", 1), ("\r\n\r\n", 4)])
def test_rows_without_a_list_around_them(tmp_path, name, joint, indent):
    text = joint.join(json.dumps(entry, indent=indent, ensure_ascii=False) for entry in ENTRIES)
    data = text.encode()
    found, units = read(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data, row_fields=("text",))
    assert [(key, entry) for key, entry in found] == [(str(n), entry) for n, entry in enumerate(ENTRIES)]
    assert units == (1 if name.endswith("gz") else 3)
    found, _ = read(tmp_path / name, text[:-20], row_fields=("text",))
    assert [entry for _, entry in found[:-1]] == ENTRIES[:-1] and isinstance(found[-1][1], Rejected)


@pytest.mark.security
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ('{"a": "\\x"}', "no valid JSON"),
        ('{"a": 1,}', "no valid JSON"),
        ("oops", "no valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "no valid JSON"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
    ],
    ids=["escape", "comma", "word", "digits", "depth"],
)
@pytest.mark.parametrize("form", ["list", "lines", "packed list", "packed lines"])
def test_a_broken_entry_costs_itself_alone(tmp_path, broken, reason, form):
    good, lines = '{"a": 1}', form.endswith("lines")
    text = f"{good}\n{broken}\n{good}\n" if lines else f"[{good}, {broken}, {good}]"
    name = "own.jsonl" if lines else "own.json"
    found, _ = read(tmp_path / name, gzip.compress(text.encode()) if form.startswith("packed") else text)
    assert [isinstance(entry, Rejected) for _, entry in found] == [False, True, False]
    assert reason in found[1][1].reason
    assert (found[1][1].key, found[1][1].shard) == ("line 2" if lines else "1", name)
    assert len(found[1][1].reason) < 320


@pytest.mark.parametrize(
    ("text", "last"),
    [
        (LIST[:-30], "cut off or no valid JSON"),
        (LIST + " and more words", "text that belongs to no entry"),
        (LIST + "]", "text that belongs to no entry"),
        (json.dumps({"data": ENTRIES})[:-3], "cut off"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_bytes_that_belong_to_no_entry_are_counted(tmp_path, text, last, packed):
    found, _ = read(tmp_path / "own.json", gzip.compress(text.encode()) if packed else text)
    assert isinstance(found[-1][1], Rejected)
    assert last in found[-1][1].reason
    assert len(found) >= len(ENTRIES)


def test_damaged_compression_keeps_what_comes_before(tmp_path):
    noise = random.Random(0)
    text = "".join(json.dumps({"n": n, "x": noise.random()}) + "\n" for n in range(5000))
    packed = gzip.compress(text.encode())
    found, _ = read(tmp_path / "own.jsonl.gz", packed[: len(packed) // 2])
    assert "compressed data" in found[-1][1].reason
    assert len(found) > 1000


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_list_whose_compression_is_damaged_keeps_every_row_before_it(tmp_path, encoding):
    noise = random.Random(0)
    text = json.dumps([{"n": n, "x": noise.random()} for n in range(5000)]).encode(encoding)
    cut = gzip.compress(text)[:60_000]
    before = zlib.decompressobj(wbits=31).decompress(cut).decode(encoding, "ignore")
    found, _ = read(tmp_path / "own.json.gz", cut)
    assert [entry["n"] for _, entry in found[:-1]] == list(range(before.count("}")))
    assert len(found) > 1000 and "compressed data is damaged or cut off" in found[-1][1].reason


def test_the_entry_before_the_damage_is_kept_where_it_ends_there():
    stream = SimpleNamespace(read=Mock(side_effect=[b'[{"n": 1}, {"n": 2}', storage.DamagedFileError("cut off")]))
    items = json_items.iterate_items(stream)
    assert [next(items).value["n"], next(items).value["n"]] == [1, 2]
    with pytest.raises(storage.DamagedFileError):
        next(items)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no entries: it is empty"),
        (b" \n\n", "holds no entries: it is empty"),
        (b"[]", "holds no entries"),
        (b"{}", "holds no entries"),
        (b"hello", "does not start as JSON"),
        (b"<html>", "does not start as JSON"),
        (b'{"a": 1, "b": "x"}', "holds no entries: its members are a, b"),
        (b'{"one": [{"a": 1}], "two": [{"a": 2}]}', "several lists"),
        ("[1]".encode("utf-16-le"), None),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, data, message):
    if message is None:
        data, message = b"\0[\x001\0]", "zero byte"
    with pytest.raises(SettingsError, match=message):
        read(tmp_path / "own.json", data)


def test_the_official_list_is_taken_where_there_are_several(tmp_path, caplog):
    text = json.dumps({"images": [{"id": 1}], "annotations": ENTRIES, "licenses": [{"id": 1}]})
    assert [entry for _, entry in read(tmp_path / "a.json", text, member="annotations")[0]] == ENTRIES
    assert [entry for _, entry in read(tmp_path / "a.json", text)[0]] == ENTRIES
    assert "entries are read from 'annotations' alone" in caplog.text


def test_slices_of_a_file_larger_than_the_window_parse_back(tmp_path, monkeypatch):
    monkeypatch.setattr(json_items, "_CHUNK_BYTES", 40)
    monkeypatch.setattr(json_entries, "_HEAD_BYTES", 10)
    for form in ("list", "data", "keyed", "two lists"):
        found, _ = read(tmp_path / "own.json", FORMS[form][0])
        assert [entry for _, entry in found] == ENTRIES, form


def test_samples_of_one_entry_have_different_ids(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{}]))
    (file,) = storage.find_files(str(tmp_path / "x.json"))
    source = SourceInput("x", str(tmp_path / "x.json"), "", "x", "")
    (unit,) = plan_entries(source, file, detect_form(file, "", ()), entries_per_unit=3)
    drafts = [Draft((Turn("", (f"answer {number}",)),), None) for number in range(3)]
    rows = list(read_drafts(unit, "0", lambda: iter(drafts), None, None))
    assert [row.turns[0].answers[0] for row in rows] == ["answer 0", "answer 1", "answer 2"]
    assert len({row.id for row in rows}) == 3


@pytest.mark.parametrize("pack", [gzip.compress, lambda data: data])
def test_the_last_line_needs_no_break_and_lines_keep_their_numbers(tmp_path, pack):
    text = '{"a": 1}\n\n{"a": 2}\n{"a": 3}'
    found, _ = read(tmp_path / "own.jsonl", pack(text.encode()), per_unit=2)
    assert found == [("line 1", {"a": 1}), ("line 3", {"a": 2}), ("line 4", {"a": 3})]


def test_entries_of_slices_are_numbered_through_the_file(tmp_path):
    found, units = read(tmp_path / "own.json", json.dumps([{"a": n} for n in range(5)]), per_unit=2)
    assert [key for key, _ in found] == ["0", "1", "2", "3", "4"] and units == 3
    lines = "".join(f'{{"a": {n}}}\n' for n in range(6))
    found, units = read(tmp_path / "own.jsonl", lines, per_unit=3)
    assert [key for key, _ in found] == [f"line {n}" for n in range(1, 7)] and units == 2


def test_a_file_that_lacks_its_official_list_is_told_which_it_has(tmp_path):
    text = json.dumps({"images": [{"id": 1}], "info": {"a": 1}})
    found, _ = read(tmp_path / "a.json", text, member="annotations")
    assert [entry for _, entry in found] == [{"id": 1}], "another list of entries is taken"
    with pytest.raises(SettingsError, match="holds no entries in 'annotations': its members are info, n"):
        read(tmp_path / "a.json", json.dumps({"info": {"a": 1}, "n": 3}), member="annotations")


def test_of_several_lists_the_usual_name_is_taken_in_a_fixed_order(tmp_path):
    names = ["data", "annotations", "rows", "samples", "items", "examples", "entries", "questions", "train"]
    for number in range(len(names) - 1):
        lists = {name: [{"of": name}] for name in reversed(names[number:])}
        found, _ = read(tmp_path / "a.json", json.dumps(lists))
        assert found == [("0", {"of": names[number]})]


@pytest.mark.parametrize(
    ("name", "text", "is_whole", "found"),
    [
        ("a.json", '{"a": 1}\n{"a": 2}', True, True),
        ("a.json", '{"a": 1}\n[1]', True, False),
        ("a.json", '{"a": 1}\n', False, False),
        ("a.jsonl", '{"a": 1}\nx', True, True),
        ("a.jsonl", '{"a": 1}\n', False, True),
        ("a.json", '{"row": 1}\n', True, True),
        ("a.json", '{"row": 1}', False, False),
        ("a.json", '{"a": 1}', True, False),
        ("a.jsonl", '{"a": 1}', True, True),
        ("a.jsonl", '{"a": [{"b": 1}]}', True, False),
        ("a.jsonl", '{"a": {"b": 1}}', True, False),
        ("a.jsonl", '{"a": {"b": 1}, "c": 2}', True, True),
        ("a.jsonl", '{"a": [1], "b": []}', True, True),
        ("a.jsonl", "{}", True, True),
        ("a.jsonl", '{"a": {\n"b": 1}}', True, False),
        ("a.jsonl", '{ \n"b": 1}', True, False),
        ("a.jsonl", '{"a": [\n1]}', True, False),
        ("a.jsonl", '{"a": 1,\n"b": 1}', True, False),
        ("a.jsonl", '{"a": 1 oops\n{"b": 1}', True, True),
        ("a.jsonl", '"x",\n{"b": 1}', True, True),
        ("a.jsonl", '{"a": 1, ', False, True),
        ("a.json", '{"a": 1 oops\n{"b": 1}', True, False),
        *((f"A.NDJSON.{ending}", "oops\n{}", True, True) for ending in ("gz", "BZ2", "zst", "xz", "lz4")),
        ("a.jsonlines", "oops\n{}", True, True),
        ("a.jsonl.bak", "oops\n{}", True, False),
    ],
)
def test_json_lines_are_known_by_their_first_lines_or_their_name(name, text, is_whole, found):
    assert json_entries._is_lines(name, text.encode(), is_whole, ("row",)) is found


@pytest.mark.parametrize(("size", "is_whole"), [(9, True), (10, True), (11, False), (30, False)])
def test_the_head_of_a_file_and_whether_it_is_all(monkeypatch, size, is_whole):
    monkeypatch.setattr(json_entries, "_HEAD_BYTES", 10)
    stream = io.BytesIO(b"x" * size)
    assert json_entries._read_head(stream) == (b"x" * min(size, 10), is_whole)
    assert stream.tell() <= 16, "no more is read"


class Failing(io.BytesIO):
    """Four bytes, then an error."""

    def __init__(self, error, data=b"four"):
        super().__init__(data)
        self.error = error

    def read(self, size=-1):
        data = super().read(size)
        if not data:
            raise self.error
        return data


def test_a_head_that_is_damaged_is_not_all_and_a_disk_that_fails_is_told():
    assert json_entries._read_head(Failing(storage.DamagedFileError("damaged"))) == (b"four", False)
    with pytest.raises(OSError, match="disk"):
        json_entries._read_head(Failing(OSError(5, "disk")))


def test_a_network_that_fails_is_no_damage_of_the_file(tmp_path, monkeypatch):
    """pyarrow's errors of a bucket have no number, as its errors of damaged compression: a retry finds the rows."""
    away = OSError("When reading s3://bucket/a.json: AWS Error NETWORK_CONNECTION")
    packed = "a".encode("utf-16")
    damaged = json_entries._Transcoded(Failing(storage.DamagedFileError("damaged"), packed), "utf-16")
    assert damaged.read(9) == b"a"
    with pytest.raises(storage.DamagedFileError):
        damaged.read(9)
    with pytest.raises(storage.DamagedFileError):  # whoever asks for all of it would take a part for the whole
        json_entries._Transcoded(Failing(storage.DamagedFileError("damaged"), packed), "utf-16").read()
    for read in (json_entries._read_head, lambda stream: json_entries._Transcoded(stream, "utf-16").read(9)):
        with pytest.raises(OSError, match="NETWORK_CONNECTION"):
            read(Failing(away, packed))
    (tmp_path / "a.json").write_text('[{"a": 1}]')
    (file,) = storage.find_files(str(tmp_path / "a.json"))
    monkeypatch.setattr(json_entries, "open_entries", lambda location: nullcontext(Failing(away, b"[1,")))
    form = json_entries.JsonForm("list", is_packed=True)
    unit = SourceUnit.of_file(SourceInput("x", str(tmp_path), "", "x", ""), file, json_entries.JsonDetails(form))
    for read in (lambda: json_entries._all_items(file, form), lambda: list(json_entries.read_entries(unit))):
        with pytest.raises(OSError, match="NETWORK_CONNECTION"):
            read()


def test_a_transcoded_stream_gives_what_is_asked_for(monkeypatch):
    monkeypatch.setattr("pipelines.storage.COPY_BYTES", 3)

    def stream(data):
        return json_entries._Transcoded(io.BytesIO(data), "utf-16")

    text = "caf\u00e9 \u4e2d"
    packed, plain = text.encode("utf-16"), text.encode()
    found = stream(packed)
    assert [found.read(2), found.read(3), found.read(), found.read(5), found.read()] == [
        plain[:2],
        plain[2:5],
        plain[5:],
        b"",
        b"",
    ]
    assert found.readable() and io.BufferedReader(stream(packed), 4).read() == plain
    assert stream(packed[:-1]).read() == "caf\u00e9 \ufffd".encode(), "half a character"
    buffer = bytearray(4)
    assert (stream(packed).readinto(buffer), bytes(buffer)) == (4, plain[:4])


def numbers_of(items):
    return [item.value["a"] for item in items if item.value]


@pytest.mark.parametrize("kind", ["list", "lines"])
def test_what_a_packed_files_reader_needs_is_made_of_all_its_entries(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(json_entries, "_LINE_CHUNK", 1000)
    monkeypatch.setattr(json_items, "_CHUNK_BYTES", 1000)
    noise = np.random.default_rng(0).random(3000).tolist()
    entries = [json.dumps({"a": n, "x": x}) for n, x in enumerate(noise)]
    packed = gzip.compress(("\n".join(entries) if kind == "lines" else f"[{','.join(entries)}]").encode())
    path = tmp_path / "own.json.gz"
    for data, least in ((packed, 3000), (packed[: len(packed) // 2], 500)):
        path.write_bytes(data)
        (file,) = storage.find_files(str(path))
        source, form = SourceInput("x", str(path), "", "x", ""), detect_form(file)
        (unit,) = plan_entries(source, file, form, about=numbers_of)
        numbers = unit.details.extra
        assert numbers == list(range(len(numbers))) and least <= len(numbers) <= 3000
        assert (len(numbers) == 3000) is (data == packed)


def test_broken_entries_say_where_and_why(tmp_path):
    found, _ = read(tmp_path / "own.json", b'[{"a": 1}, oops, {"b": "caf\xe9"}, {"c": "tab\there"}]')
    assert [entry.reason for _, entry in found[1:3]] == [
        "the entry (from byte 11) is no valid JSON: Expecting value: line 1 column 1 (char 0)",
        "the entry (from byte 17) is not UTF-8 text (byte 10 of it)",
    ]
    assert found[3] == ("3", {"c": "tab\there"}), "a raw control character"
    found, _ = read(tmp_path / "own.jsonl", b'{"a": 1}\n{"a": \n{"b": "caf\xe9"}\n\xef\xbb\xbf{}\n')
    assert [(key, entry.reason[:28]) for key, entry in found[1:]] == [
        ("line 2", "the line is no valid JSON: E"),
        ("line 3", "the line is not UTF-8 text ("),
        ("line 4", "the line is no valid JSON: U"),
    ], "a byte order mark belongs to the first line"
