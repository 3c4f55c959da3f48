"""The drawn world: its data sets and benchmarks in the formats of the real ones, and its Arrow shards."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NotRequired, TypedDict

from pipelines.fingerprint import Fingerprint, claim
from pipelines.json_files import read_json_object
from pipelines.progress import Bar
from pipelines.settings import MiniatureSettings, PrepareDataSettings

SOURCES_FILE = "sources.json"
"""Data sets of the world and their files; written last."""

_RESULTS = (
    *("benchmarks", "cc_sbu", "cc_sbu_align", "coco_caption", "coco_vqa", "flickr30k", "gqa", "laion", "llava", "refs"),
    *("train2014", "train2017", "textcaps", "unnatural_instruction", SOURCES_FILE, "result.json"),
)


class MiniatureResult(TypedDict):
    """``result.json`` of a task of the miniature, and the path of that file.

    Attributes:
        folder: output.
        seconds: of the task.
        rows: of the example's files.
        scores: of the pretrained parts on held-out scenes.
        checkpoint: folder of the pretrained backbones.
        package_data: folder of the shipped weights.
        bytes: of the shipped weights.
        result: path of the file.
    """

    folder: str
    seconds: NotRequired[float]
    rows: NotRequired[dict[str, int]]
    scores: NotRequired[dict[str, float]]
    checkpoint: NotRequired[str]
    package_data: NotRequired[str]
    bytes: NotRequired[int]
    result: NotRequired[str]


def draw_world(settings: MiniatureSettings) -> MiniatureResult:
    """Draw the world into ``settings.output``; one that was drawn with the same settings is kept.

    Returns:
        ``folder``, ``seconds``.

    Raises:
        OtherInputsError: the folder holds a world of other settings.
    """
    from tinygptv.miniature.writers import write_world

    output = settings.output_dir("data/miniature")
    started = time.perf_counter()
    fields = {key: getattr(settings, key) for key in ("seed", "train_scenes", "test_scenes")}
    claim(output, Fingerprint.of("draw", **fields), _RESULTS, overwrite=settings.overwrite)
    if read_json_object(output / SOURCES_FILE) is None:
        with Bar("drawing scenes", quiet=settings.quiet) as bar:
            write_world(
                output,
                settings.train_scenes,
                settings.test_scenes,
                settings.seed,
                workers=os.cpu_count() or 1,
                progress=bar.update,
            )
    return {"folder": str(output), "seconds": round(time.perf_counter() - started, 1)}


def prepare_world(
    world: Path,
    shards: Path,
    make_settings: Callable[..., PrepareDataSettings],
    sources: Collection[str] | None = None,
) -> int:
    """Prepare a drawn world's data sets as Arrow shard sets, one folder each below ``shards``; finished ones are kept.

    Args:
        world: folder of ``draw_world``.
        shards: folder of the shard sets.
        make_settings: settings of one ingest from ``source``, ``input``, ``images`` and ``output``.
        sources: names of the data sets; None takes all.

    Returns:
        Rows of all shard sets.
    """
    from pipelines.data.ingest.job import ingest

    rows = 0
    for name, files in json.loads((world / SOURCES_FILE).read_text()).items():
        if sources is None or name in sources:
            settings = make_settings(
                source=name,
                input=str(world / files["input"]),
                images=str(world / files["images"]) if files["images"] else "",
                output=str(shards / name),
            )
            rows += int(ingest(settings, replaces_other=True)["rows_out"])  # a world may be drawn again
    return rows
