"""The drawn world: its data sets and benchmarks in the formats of the real ones, and its Arrow shards."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

from pipelines.json_files import read_json_object, write_json
from pipelines.progress import Bar
from pipelines.settings import MiniatureSettings, PrepareDataSettings

DRAWN_FILE = "drawn.json"
"""Written last: the settings that a complete world was drawn with."""


def draw_world(settings: MiniatureSettings) -> dict[str, object]:
    """Draw the world into ``settings.output``; one that was drawn with the same settings is kept.

    Returns:
        ``folder``, ``seconds``.
    """
    from tinygptv.miniature.writers import write_world

    output = settings.output_dir("data/miniature")
    started = time.perf_counter()
    identity = {key: getattr(settings, key) for key in ("seed", "train_scenes", "test_scenes")}
    if read_json_object(output / DRAWN_FILE) != identity:
        (output / DRAWN_FILE).unlink(missing_ok=True)
        with Bar("drawing scenes", quiet=settings.quiet) as bar:
            write_world(
                output,
                settings.train_scenes,
                settings.test_scenes,
                settings.seed,
                workers=os.cpu_count() or 1,
                progress=bar.update,
            )
        write_json(output / DRAWN_FILE, identity)
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
    for name, files in json.loads((world / "sources.json").read_text()).items():
        if sources is None or name in sources:
            settings = make_settings(
                source=name,
                input=str(world / files["input"]),
                images=str(world / files["images"]) if files["images"] else "",
                output=str(shards / name),
            )
            rows += int(ingest(settings)["rows_out"])
    return rows
