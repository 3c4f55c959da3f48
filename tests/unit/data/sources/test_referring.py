"""Phrases that name a box: slices, keys, boxes, and images by their number."""

from __future__ import annotations

import json
import pickle

from pipelines.data.sources import locate, referring
from pipelines.data.sources.base import Rejected
from pipelines.settings import PrepareDataSettings
from tests.source_files import jpeg


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
        {"id": 2, "regions": 5},
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
    assert found[0].boxes == ((1.0, 2.0, 11.0, 22.0),) and found[0].turns[0].answers == ("p 7",)
    assert (found[3].filter, found[4].reason) == ("region_area", "image 3 is not in image_data.json")
    assert "malformed" in found[5].reason
