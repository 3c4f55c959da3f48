"""Entries of JSON files as byte ranges, and annotation files with broken entries."""

from __future__ import annotations

import io
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import storage
from pipelines.data.sources import json_entries, locate
from pipelines.data.sources import json_items as items_module
from pipelines.data.sources.base import Rejected, SourceInput
from pipelines.data.sources.json_items import JsonDamage, iterate_items, split_items
from pipelines.data.sources.pickles import UnsafePickleError, load_plain_pickle
from pipelines.settings import PrepareDataSettings, SettingsError
from tests.source_files import jpeg

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


class Dripping(io.BytesIO):
    """A stream that gives a few bytes at a time, as if every entry lay across two chunks."""

    def read(self, size=-1):
        return super().read(min(size, 7) if size and size > 0 else 7)


@settings(max_examples=30)
@given(st.lists(VALUES, max_size=8), st.booleans(), st.sampled_from([None, 1]))
def test_list_items_are_found_where_they_lie(values, ascii_only, indent):
    data = json.dumps(values, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    found = list(iterate_items(Dripping(data)))
    assert [json.loads(data[item.start : item.stop]) for item in found] == values


@settings(max_examples=30)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), VALUES, max_size=6))
def test_object_items_keep_their_keys_and_slices_can_be_split_again(values):
    data = json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")
    found = list(iterate_items(Dripping(data)))
    assert [item.key for item in found] == list(values)
    if not found:
        return
    start, stop = found[0].start, found[-1].stop
    again = list(split_items(data[start:stop], start, "members"))
    assert [(item.key, item.start, item.stop) for item in again] == [
        (item.key, item.start, item.stop) for item in found
    ]
    assert [json.loads(data[item.value_start : item.stop]) for item in again] == list(values.values())


def test_member_list_is_found_behind_other_members():
    data = json.dumps({"info": {"annotations": 1}, "n": 12, "annotations": [{"a": 1}, {"a": 2}], "z": 0}).encode()
    assert [item.value for item in iterate_items(Dripping(data), "annotations")] == [{"a": 1}, {"a": 2}]
    assert list(iterate_items(Dripping(data), "images")) == []
    data = json.dumps({"old_annotations": [{"a": 1}], "annotations": [{"a": 2}], "annotations_2": [{"a": 3}]}).encode()
    assert [item.value for item in iterate_items(Dripping(data), "annotations")] == [{"a": 2}]


def test_number_across_two_chunks_is_one_number():
    values = [1.3510798882109894e16, -2.5e-300, 0, 12345678901234567890]
    data = json.dumps(values).encode()
    for padding in range(8):
        found = iterate_items(Dripping(b" " * padding + data))
        assert [item.value for item in found] == values


def test_byte_order_mark_is_skipped():
    assert [item.value for item in iterate_items(io.BytesIO(b'\xef\xbb\xbf[{"a": 1}]'))] == [{"a": 1}]


@pytest.mark.parametrize("data", [b'[{"a": 1}, {"a": 2', b'[{"a": 1} {"a": 2}]', b'[{"a": 1}', b'[{"a": 1}, "x]'])
def test_damage_is_reported_after_what_comes_before_it(data):
    found = []
    with pytest.raises(JsonDamage, match="after byte"):
        found.extend(iterate_items(Dripping(data)))
    stream = iterate_items(Dripping(data))
    assert next(stream).value == {"a": 1}


def test_window_moves_on_so_that_memory_stays_bounded(monkeypatch):
    monkeypatch.setattr(items_module, "_CHUNK_BYTES", 1000)
    data = json.dumps([{"text": "x" * 50}] * 2000).encode()
    scanner = items_module._Scanner(io.BytesIO(data))
    scanner.next_mark()
    longest = max(len(scanner.text) for _ in scanner.elements())
    assert longest < 5000 < len(data)


# ---------------------------------------------------------------- annotation files


def read(source, given, images=""):
    chosen, location = locate(
        PrepareDataSettings(source=source, input=str(given), images=str(images) if images else "")
    )
    return [found for unit in chosen.reader.plan(location) for found in chosen.reader.read(unit)]


def vqa_entry(image="a.jpg", **changes):
    return {"image": f"train2014/{image}", "question": "What?", "answer": ["yes"], **changes}


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(jpeg(0))
    (tmp_path / "images/empty.jpg").write_bytes(b"")
    return tmp_path / "images"


def test_broken_entries_are_set_apart_one_by_one(tmp_path, images):
    entries = [
        vqa_entry(),
        {"image": "a.jpg", "answer": ["x"]},
        vqa_entry("missing.jpg"),
        vqa_entry("empty.jpg"),
        vqa_entry(answer=[1, 2]),
        vqa_entry(question=None),
        "no entry at all",
        vqa_entry(),
    ]
    (tmp_path / "ann.json").write_text(json.dumps(entries))
    found = read("coco_vqa", tmp_path / "ann.json", images)
    reasons = [entry.reason if isinstance(entry, Rejected) else "row" for entry in found]
    expected = ["row", "but no 'question'", "is missing", "is empty", "no text", "no text", "malformed", "row"]
    assert len(reasons) == len(expected)
    assert all(part in reason for part, reason in zip(expected, reasons, strict=True)), reasons
    assert [entry.key for entry in found if isinstance(entry, Rejected)] == ["1", "2", "3", "4", "5", "6"]


def test_paths_that_climb_out_are_refused(tmp_path, images):
    (tmp_path / "secret.jpg").write_bytes(jpeg(1))
    entries = [
        {"image": path, "question": "q", "answer": "a"} for path in ("../secret.jpg", str(tmp_path / "secret.jpg"))
    ]
    (tmp_path / "ann.json").write_text(json.dumps(entries))
    assert ["outside of the image folder" in found.reason for found in read("gqa", tmp_path / "ann.json", images)] == [
        True,
        True,
    ]


def test_entry_that_is_no_utf8_does_not_hide_the_next(tmp_path, images):
    good = json.dumps(vqa_entry()).encode()
    (tmp_path / "ann.json").write_bytes(b"[" + good.replace(b"What", b"Wh\xe9t") + b"," + good + b"]")
    found = read("coco_vqa", tmp_path / "ann.json", images)
    assert "not UTF-8" in found[0].reason
    assert found[1].turns[0].question == "what?"


def test_cut_annotation_file_gives_what_comes_before(tmp_path, images):
    whole = json.dumps([vqa_entry(question=f"q{n}") for n in range(5)])
    (tmp_path / "ann.json").write_text(whole[: int(len(whole) * 0.7)])
    *rows, last = read("coco_vqa", tmp_path / "ann.json", images)
    assert [row.turns[0].question for row in rows] == ["q0", "q1", "q2"]
    assert (last.key, "cut off" in last.reason) == ("", True)


def test_slices_cover_the_file(tmp_path, images, monkeypatch):
    monkeypatch.setattr(json_entries.plan_entries, "__kwdefaults__", {"about": None, "entries_per_unit": 3})
    entries = {f"k{n}": {"imageURL": "x/a.jpg", "questions": [f"q{n}"], "answers": ["a"], "split": 1} for n in range(8)}
    for key in entries:
        (images / f"{key}.jpg").write_bytes(jpeg(0))
    (tmp_path / "dataset.json").write_text(json.dumps(entries))
    source, location = locate(PrepareDataSettings(source="ocrvqa", input=str(tmp_path), images=str(images)))
    units = list(source.reader.plan(location))
    found = [row for unit in units for row in source.reader.read(unit)]
    assert [row.turns[0].question for row in found] == [f"q{n}" for n in range(8)]
    assert len({row.id for row in found}) == 8


def test_wrong_file_and_missing_images_are_the_users_mistakes(tmp_path, images):
    (tmp_path / "ann.json").write_text("hello")
    with pytest.raises(SettingsError, match="does not start as JSON"):
        read("coco_vqa", tmp_path / "ann.json", images)
    (tmp_path / "ann.json").write_text("[]")
    with pytest.raises(SettingsError, match="no entries"):
        read("coco_vqa", tmp_path / "ann.json", images)
    (tmp_path / "ann.json").write_text(json.dumps([vqa_entry()]))
    with pytest.raises(SettingsError, match="needs images="):
        read("coco_vqa", tmp_path / "ann.json")
    with pytest.raises(SettingsError, match="is no folder"):
        read("coco_vqa", tmp_path / "ann.json", tmp_path / "nowhere")


# ---------------------------------------------------------------- pickles


class Runs:
    def __reduce__(self):
        return (print, ("this code ran",))


def test_pickle_that_would_run_code_is_refused(tmp_path, images, capsys):
    with pytest.raises(UnsafePickleError, match="print"):
        load_plain_pickle(pickle.dumps([Runs()]))
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([Runs()], protocol=2))
    (tmp_path / "instances.json").write_text('{"annotations": []}')
    with pytest.raises(SettingsError, match="only lists, dicts"):
        read("refcoco", tmp_path, images)
    assert "this code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_of_every_protocol_are_read(protocol):
    value = [{"a": 1, "b": [1.5, "caf\xe9", None, True], "c": (2, 3)}]
    assert load_plain_pickle(pickle.dumps(value, protocol)) == value


def test_strings_of_python_2_are_latin_1():
    assert load_plain_pickle(b"(lp0\nS'caf\\xe9'\np1\na.") == ["caf\xe9"]


@pytest.mark.parametrize("data", [b"", b"garbage", pickle.dumps([1, 2, 3])[:-3]])
def test_damaged_pickles_are_one_clear_error(data):
    with pytest.raises(ValueError, match="not a readable pickle"):
        load_plain_pickle(data)


def test_reference_without_annotation_or_of_another_split(tmp_path, images):
    (images / "COCO_train2014_000000000009.jpg").write_bytes(jpeg(0))
    ref = {"ref_id": 1, "ann_id": 5, "image_id": 9, "split": "train", "sentences": [{"raw": "Dog."}]}
    refs = [ref, {**ref, "ref_id": 2, "ann_id": 6}, {**ref, "ref_id": 3, "split": "val"}, {"ref_id": 4}]
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    (tmp_path / "instances.json").write_text(json.dumps({"annotations": [{"id": 5, "bbox": [1, 2, 3, 4]}, {"id": 6}]}))
    found = read("refcoco", tmp_path, images)
    assert found[0].boxes == ((1.0, 2.0, 4.0, 6.0),)
    assert [(entry.key, entry.filter) for entry in found[1:]] == [("2", ""), ("3", "split"), ("4", "")]
    assert found[1].reason == "annotation 6 is not in instances.json", "it has no box"


@pytest.mark.parametrize(
    ("data", "kinds"),
    [
        (b"", {}),
        (b"[1]", {}),
        (b"{}", {}),
        (b'{"a": [{"b": 1}], "c": [1], "d": {"e": 1}, "f": 2, "g": []}', dict(zip("acdfg", "lodxx", strict=True))),
        (b'{"a": {"b": 1}, "c": [{"d"', {"a": "d", "c": "l"}),
        (b'{"a": {"b": 1} "c": 1}', {"a": "d"}),
        (b'{"a": 1}, {"b": 2}', {"a": "x"}),
        (b"{3: 1}", {}),
    ],
)
def test_an_outline_names_the_kinds_of_an_objects_members(data, kinds):
    words = {"l": "list", "d": "object", "o": "other", "x": "other"}
    assert items_module.outline(Dripping(data)) == {key: words[kind] for key, kind in kinds.items()}


def test_an_outline_looks_at_the_first_members_and_tells_a_failing_disk(monkeypatch):
    monkeypatch.setattr(items_module, "_LOOKED_AT", 3)
    assert list(items_module.outline(io.BytesIO(json.dumps(dict.fromkeys("abcde")).encode()))) == ["a", "b", "c"]

    def failing(error):
        stream = io.BytesIO(b'{"a": 1, ')
        original = stream.read
        reads = iter([original])

        class Stream:
            def read(self, size):
                return next(reads, lambda size: (_ for _ in ()).throw(error))(size)

        return Stream()

    assert items_module.outline(failing(storage.DamagedFileError("damaged"))) in ({}, {"a": "other"})
    for error in (OSError(5, "disk"), OSError("the network's disk")):  # pyarrow's errors of a bucket have no number
        with pytest.raises(OSError, match="disk"):
            items_module.outline(failing(error))


@pytest.mark.parametrize(
    ("data", "member", "found", "damage"),
    [
        (b'{"a": [1], "a": [2]}', "a", [1, 2], ""),
        (b'{"a": [1]', "a", [1], "after byte 9"),
        (b'{"a": {"a": [9]}}', "a", [], ""),
        (b'{"a": [1]} {"a": [2]}', "a", [1, 2], ""),
        (b'{"a": 1, "b": [2]}', "", [1, [2]], ""),
        (b"[1]]", "", [1], "after byte 3 there is text that belongs to no entry"),
        (b"[1] x", "", [1], "after byte 4 there is text that belongs to no entry"),
        (b'{"a" 1}', "", [], "after byte 6"),
        (b'{"a": 1', "", [1], "after byte 7"),
        (b"x", "", [], "does not start as JSON"),
        (b"", "", [], "does not start as JSON"),
    ],
)
def test_items_up_to_the_damage_which_is_located(data, member, found, damage):
    items, values = iterate_items(Dripping(data), member), []
    if damage:
        with pytest.raises(JsonDamage, match=damage):
            for item in items:
                values.append(item.value)
    else:
        values = [item.value for item in items]
    assert values == found


def test_lists_of_one_file_are_its_parts():
    assert [item.part for item in iterate_items(io.BytesIO(b'[1, 2] [3] {"a": 4}'))] == [1, 1, 2, 3]
    assert [item.part for item in iterate_items(io.BytesIO(b'{"a": [1], "b": 0, "a": [2]}'), "a")] == [1, 2]
    kept = list(iterate_items(io.BytesIO(b'{"k": "caf\xc3\xa9"}'), keep_data=True))
    assert [(item.key, item.data, item.start, item.value_start, item.stop) for item in kept] == [
        ("k", b'"caf\xc3\xa9"', 1, 6, 13)
    ]


def test_slices_are_the_bytes_of_their_entries_and_say_the_number_of_the_first(tmp_path):
    def planned(name, text, member=""):
        path = tmp_path / name
        path.write_bytes(text)
        (file,) = storage.find_files(str(path))
        form = json_entries.detect_form(file, member)
        source = SourceInput("x", str(path), "", "x", "")
        units = list(json_entries.plan_entries(source, file, form, "extra", entries_per_unit=2))
        assert {(unit.num_bytes, unit.details.extra, unit.details.form) for unit in units} == {
            (len(text), "extra", form)
        }
        return [(text[unit.start : unit.stop], unit.first) for unit in units]

    assert planned("a.json", b' [ {"a":1} , {"a":2}, {"a":3} ] ') == [(b'{"a":1} , {"a":2}', 0), (b'{"a":3}', 2)]
    assert planned("b.json", b'{"x": {"a":1}, "y": {}, "z": {}}') == [(b'"x": {"a":1}, "y": {}', 0), (b'"z": {}', 2)]
    assert planned("c.json", b'{"i": 1, "data": [{"a":1}], "rows": 2}', "data") == [(b'{"a":1}', 0)]
    assert planned("d.json", b'[{"a":1}] [{"a":2}, {"a":3}]') == [(b'{"a":1}', 0), (b'{"a":2}, {"a":3}', 1)]
    assert planned("e.jsonl", b'{"a":1}\n{"a":2}\n\n{"a":3}\n{"a":4}') == [
        (b'{"a":1}\n{"a":2}\n', 0),
        (b'\n{"a":3}\n', 2),
        (b'{"a":4}', 4),
    ]
