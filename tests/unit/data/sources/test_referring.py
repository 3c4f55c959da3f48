"""Phrases that name a box: slices, keys, boxes, and images by their number."""

from __future__ import annotations

import json
import pickle

import pytest

from pipelines.data.sources import SOURCES, locate, referring
from pipelines.data.sources.base import Filtered, Malformed, Rejected, SourceInput
from pipelines.data.sources.json_rows import id_of
from pipelines.settings import PrepareDataSettings, SettingsError
from pipelines.storage import Location
from tests.source_files import jpeg, refused
from tinygptv.data.sample import Turn


def read(source, given, images):
    chosen, location = locate(PrepareDataSettings(source=source, input=str(given), images=str(images)))
    units = list(chosen.reader.plan(location))
    return units, [found for unit in units for found in chosen.reader.read(unit)]


def test_references_are_cut_into_units_with_the_boxes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(referring, "ENTRIES_PER_UNIT", 2)
    (tmp_path / "COCO_train2014_000000000009.jpg").write_bytes(jpeg(0))
    refs = [
        {
            "ref_id": 10 + n,
            "ann_id": n,
            "image_id": 9,
            "split": "train",
            "sentences": [{"raw": f"Dog {n}!"}, {"raw": f"it {n}"}],
            "file_name": "x",
        }
        for n in range(5)
    ]
    del refs[4]["ref_id"]
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    annotations = [{"id": n, "bbox": [n, 2, 10, 20]} for n in range(5)]
    (tmp_path / "instances.json").write_text(json.dumps({"annotations": annotations}))
    units, rows = read("refcoco", tmp_path, tmp_path)
    assert [(unit.start, unit.stop, unit.first) for unit in units] == [(0, 2, 0), (2, 4, 2), (4, 5, 4)]
    assert [len(unit.details.entries) for unit in units] == [2, 2, 1]
    assert [row.id for row in rows] == [f"refs(unc)/{key}" for key in (10, 11, 12, 13, "number 4")]
    assert [row.boxes for row in rows] == [((float(n), 2.0, 10.0 + n, 22.0),) for n in range(5)]
    assert rows[3].turns[0].answers == ("dog 3", "it 3")
    assert "file_name" not in units[0].details.entries[0][0]


def refcoco(folder, refs, instances='{"annotations": []}'):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "refs(unc).p").write_bytes(refs if isinstance(refs, bytes) else pickle.dumps(refs))
    if instances is not None:
        (folder / "instances.json").write_text(instances)


REF = {"ref_id": 0, "ann_id": "x", "image_id": 9, "split": "train", "sentences": [{"raw": "a dog"}]}


@pytest.mark.parametrize(
    ("refs", "instances", "told"),
    [
        (b"]q\x00", "[]", r"refs\(unc\)\.p cannot be used: not a readable pickle"),
        ([], "[]", r"refs\(unc\)\.p holds no list of references: is it the right file\?"),
        ({"a": REF}, "[]", r"refs\(unc\)\.p holds no list of references"),
        ([REF], None, r"instances\.json cannot be used"),
        ([REF], '{"annotations": [{"id": 1,', r"instances\.json cannot be used: the file is cut off"),
    ],
)
def test_files_of_references_that_cannot_be_used_are_one_sentence(tmp_path, refs, instances, told):
    refcoco(tmp_path, refs, instances)
    with pytest.raises(SettingsError, match=told):
        read("refcoco", tmp_path, tmp_path)


def test_references_are_looked_for_in_their_folder_and_in_the_official_one(tmp_path):
    (tmp_path / "COCO_train2014_000000000009.jpg").write_bytes(jpeg(0))
    with pytest.raises(SettingsError) as error:
        read("refcoco", tmp_path, tmp_path)
    assert str(error.value) == (
        "source=refcoco needs input=: the folder with refs(unc).p and instances.json; looked for "
        f"{tmp_path}/refs(unc).p and {tmp_path}/refcoco/refs(unc).p."
    )
    with pytest.raises(SettingsError, match=r"looked for none: input= is empty\.$"):
        read("refcoco", "", tmp_path)
    refs = [REF, {**REF, "split": "testA"}, {**REF, "ann_id": 8}, "no reference"]
    refcoco(tmp_path / "refcoco", refs, '{"annotations": [{"id": "x", "bbox": [1, 2, 3, 4]}, 5]}')
    for given in (tmp_path, tmp_path / "refcoco", tmp_path / "refcoco/refs(unc).p"):
        (row, other, unknown, broken) = read("refcoco", given, tmp_path)[1]
        assert (row.id, row.boxes, row.turns) == ("refs(unc)/0", ((1.0, 2.0, 4.0, 6.0),), (Turn("", ("a dog",)),))
        assert (other.filter, other.reason) == ("split", "split testA does not train")
        assert (unknown.key, unknown.reason) == ("0", "annotation 8 is not in instances.json")
        assert broken.key == "number 3" and "malformed" in broken.reason


def test_references_of_another_data_set_are_not_taken(tmp_path):
    refcoco(tmp_path / "refcoco", [REF])
    with pytest.raises(SettingsError, match=r"is of refcoco: source=invrefcocop needs the folder refcoco\+\.$"):
        read("invrefcocop", tmp_path / "refcoco", tmp_path)


def test_a_thousand_references_are_a_unit(tmp_path):
    refcoco(tmp_path, [REF] * 1001)
    units = read("refcoco", tmp_path, tmp_path)[0]
    assert [(unit.start, unit.stop, len(unit.details.entries)) for unit in units] == [(0, 1000, 1000), (1000, 1001, 1)]


def test_fifty_images_of_regions_are_a_unit_and_zero_is_a_number(tmp_path):
    region = {"region_id": 0, "phrase": "p", "x": 1, "y": 2, "width": 3, "height": 4}
    entries = [{"id": n, "regions": [region]} for n in range(51)]
    (tmp_path / "region_descriptions.json").write_text(json.dumps(entries))
    paths = [{"id": n, "url": f"https://h/VG_100K/{n}.jpg"} for n in range(50)]
    (tmp_path / "image_data.json").write_text(json.dumps([*paths, {"id": 50}, "none"]))
    units, found = read("refvg", tmp_path, tmp_path)
    assert [len(unit.details.extra.paths) for unit in units] == [50, 0]
    assert {each.key for each in found} == {"0"}, "a region's own number"
    assert found[0].reason.startswith("image VG_100K/0.jpg is missing in ")
    assert found[-1].reason == "image 50 is not in image_data.json"


def test_images_of_visual_genome_are_looked_for_in_both_archives():
    names = referring.GENOME.alternatives("VG_100K_2/2.jpg")
    folders = ("VG_100K_2", "VG_100K", "images/VG_100K", "images2/VG_100K_2", "images", "images2")
    assert names == (*(f"{folder}/2.jpg" for folder in folders), "2.jpg")


def test_images_of_visual_genome_are_looked_for_above_the_annotations(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "VG_100K").mkdir()
    (tmp_path / "VG_100K/1.jpg").write_bytes(jpeg(1))
    region = {"region_id": 7, "phrase": "p", "x": 1, "y": 2, "width": 10, "height": 20}
    (tmp_path / "annotations/region_descriptions.json").write_text(json.dumps([{"id": 1, "regions": [region]}]))
    (tmp_path / "annotations/image_data.json").write_text('[{"image_id": 1, "url": "https://h/VG_100K/1.jpg"}]')
    assert read("refvg", tmp_path, "")[1][0].image == jpeg(1)


def test_regions_have_the_image_that_they_name_and_large_ones_are_left_out(tmp_path):
    for name in ("VG_100K/1.jpg", "VG_100K_2/2.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(jpeg(int(name[-5])))

    def region(number, image_id=None, width=10, height=20, **more):
        named = {} if image_id is None else {"image_id": image_id}
        fields = {"region_id": number, "phrase": f"P {number}.", "x": 1, "y": 2, "width": width, "height": height}
        return {**fields, **named, **more}

    entries = [
        {
            "id": 1,
            "regions": [region(7), region(8, 2), region(9, width=128, height=127), region(10, width=128, height=128)],
        },
        {"id": 3, "regions": [region(11)]},
        {"id": 5, "regions": 5},
    ]
    (tmp_path / "region_descriptions.json").write_text(json.dumps(entries))
    paths = [
        {"image_id": n, "url": f"https://h/rak248/{folder}/{n}.jpg"}
        for n, folder in ((4, "VG_100K"), (2, "VG_100K_2"), (1, "VG_100K"))
    ]
    (tmp_path / "image_data.json").write_text(json.dumps(paths))
    (unit,), found = read("refvg", tmp_path, tmp_path)
    assert list(unit.details.extra.paths.items()) == [(1, "VG_100K/1.jpg"), (2, "VG_100K_2/2.jpg")], "of the slice"
    assert [each.key if isinstance(each, Rejected) else each.id.rsplit("/", 1)[1] for each in found] == [
        "7", "8", "9", "10", "11", "2",
    ]  # fmt: skip
    assert [row.image for row in found[:3]] == [jpeg(1), jpeg(2), jpeg(1)]
    assert found[0].boxes == ((1.0, 2.0, 11.0, 22.0),) and found[0].turns == (Turn("", ("p 7",)),)
    assert (found[3].filter, found[4].reason) == ("region_area", "image 3 is not in image_data.json")
    assert "malformed" in found[5].reason


def test_files_of_references_are_named_where_they_are_missing(tmp_path):
    reader = SOURCES["refcocop"].reader

    def files(given):
        return reader._files(SourceInput("refcocop", given, "", "x", ""))

    assert refused(SettingsError, files, "") == (
        "source=refcocop needs input=: the folder with refs(unc).p and instances.json; looked for none: input= is "
        "empty."
    )
    assert refused(SettingsError, files, str(tmp_path)) == (
        "source=refcocop needs input=: the folder with refs(unc).p and instances.json; looked for "
        f"{tmp_path}/refs(unc).p and {tmp_path}/refcoco+/refs(unc).p."
    )
    (tmp_path / "refcoco+").mkdir()
    for name in ("refcoco+/refs(unc).p", "own.p"):
        (tmp_path / name).touch()
    for given, name in (("", "refcoco+/refs(unc).p"), ("own.p", "own.p")):
        file, instances = files(str(tmp_path / given))
        assert file.location.path == str(tmp_path / name) and instances.path == str(
            (tmp_path / name).parent / "instances.json"
        )
    missing = Location.parse(str(tmp_path / "instances.json"))
    assert refused(SettingsError, referring._boxes_of, missing).startswith(f"{missing} cannot be used: ")
    assert refused(SettingsError, referring._image_paths, missing).startswith(f"{missing} cannot be used: ")
    (tmp_path / "instances.json").write_text("[")
    for read in (referring._boxes_of, referring._image_paths):
        assert "cut off" in refused(SettingsError, read, missing)


def test_references_and_regions_one_by_one():
    ref = {"ref_id": 1, "ann_id": 5, "image_id": 9, "split": "train", "sentences": [{"raw": "Dog."}]}
    (draft,) = referring._reference(ref, [1, 2, 3, 4])
    assert (draft.image, draft.boxes, draft.cleans_answers) == (
        "COCO_train2014_000000000009.jpg",
        ((1.0, 2.0, 4.0, 6.0),),
        True,
    )
    assert refused(Malformed, next, referring._reference(ref, None)) == "annotation 5 is not in instances.json"
    assert refused(Filtered, next, referring._reference({**ref, "split": "val"}, None)) == "split val does not train"
    region = {"x": 1, "y": 2, "width": 128, "height": 128, "phrase": "P"}
    assert refused(Filtered, next, referring._region(region, "a", 7)) == (
        "region of 128 x 128 pixels, 16384 or more in all"
    )
    assert (
        refused(Malformed, next, referring._region({**region, "width": 3}, None, 7))
        == "image 7 is not in image_data.json"
    )
    (draft,) = referring._region({**region, "width": 3}, "VG_100K/7.jpg", 7)
    assert (draft.image, draft.boxes, draft.cleans_answers) == ("VG_100K/7.jpg", ((1.0, 2.0, 4.0, 130.0),), True)
    assert referring._slim({"a": 1, "split": "x"}) == {"split": "x"} and referring._slim(3) == 3
    assert [id_of(entry, "id") for entry in ({"id": 1}, {"id": [1]}, {}, 3)] == [1, None, None, None]


def test_images_of_visual_genome_by_their_last_two_folders(tmp_path):
    entries = [
        {"image_id": 1, "url": "https://h/a/VG_100K/1.jpg"},
        {"id": 2, "url": "https://h/VG_100K_2/2.jpg"},
        {"id": 3},
        4,
    ]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    found = referring._image_paths(Location.parse(str(tmp_path / "a.json")))
    assert found == {1: "VG_100K/1.jpg", 2: "VG_100K_2/2.jpg"}
    assert referring._genome_names("VG_100K/1.jpg") == (
        "VG_100K/1.jpg",
        "VG_100K_2/1.jpg",
        "images/VG_100K/1.jpg",
        "images2/VG_100K_2/1.jpg",
        "images/1.jpg",
        "images2/1.jpg",
        "1.jpg",
    )
    assert list(referring._ids_in({"id": 1, "regions": [{"image_id": 2}, 3]})) == [1, 2, None]
    assert list(referring._ids_in({"id": 1, "regions": 5})) == [1] and list(referring._ids_in(3)) == [None]
