"""The drawn world is written in the real sets' formats, so the real readers must take every sample of it."""

from __future__ import annotations

import json

import pytest

from pipelines.data.ingest.check_images import check_image
from pipelines.data.ingest.check_rows import check_row
from pipelines.data.sources import SOURCES, locate
from pipelines.data.sources.base import Rejected
from pipelines.settings import PrepareDataSettings
from tinygptv.data.sample import render_sample
from tinygptv.miniature.formats import INVERSE, SOURCE_FORMATS
from tinygptv.miniature.writers import write_world

NAMES = (*SOURCE_FORMATS, *INVERSE)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, 16, 2, 0, sources=NAMES, workers=1)
    return folder


@pytest.fixture(scope="module")
def remote_world(world):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(f"{world}/", "/drawn-world/", recursive=True)
    return "memory://drawn-world"


@pytest.mark.parametrize("name", NAMES)
def test_every_drawn_sample_is_read_and_rendered(world, name):
    line = json.loads((world / "sources.json").read_text())[name]
    images = str(world / line["images"]) if line["images"] else ""
    settings = PrepareDataSettings(source=name, input=str(world / line["input"]), images=images)
    source, location = locate(settings)
    found = [found for unit in source.reader.plan(location) for found in source.reader.read(unit)]
    assert found
    for row in found:
        assert not isinstance(row, Rejected), row
        checked = check_row(row, web=source.web, settings=settings)
        size = {}
        if checked.image is not None:
            image = check_image(checked.image, settings)
            size = {"width": image.width, "height": image.height}
        exchanges = render_sample(type(row)(**{**vars(checked), **size}), lambda options: options[0])
        assert all(exchange.answer for exchange in exchanges)


@pytest.mark.parametrize("name", NAMES)
def test_object_storage_gives_the_same_rows_as_a_disk(world, remote_world, name):
    line = json.loads((world / "sources.json").read_text())[name]
    found = []
    for root in (str(world), remote_world):
        images = f"{root}/{line['images']}" if line["images"] else ""
        source, location = locate(
            PrepareDataSettings(source=name, input=f"{root}/{line['input']}".rstrip("/."), images=images)
        )
        found.append([row for unit in source.reader.plan(location) for row in source.reader.read(unit)])
    assert found[0]
    assert found[1] == found[0]


def test_nothing_of_the_release_is_left_out_of_the_world():
    assert set(NAMES) == set(SOURCES) - {"webdataset", "jsonl", "csv", "hf", "parquet"}
