"""Writes the miniature to disk: images once per scene, annotations in the real sets' formats, benchmarks beside it.

Work is cut into chunks of scenes that do not depend on how many processes share it, so a world is the same to the byte
for any number of workers.
"""

from __future__ import annotations

import multiprocessing
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tinygptv.miniature.draw import encode_jpeg
from tinygptv.miniature.entries import Entry, coco_name
from tinygptv.miniature.formats import IMAGE_PATHS, INVERSE, SOURCE_FORMATS, add_web_sample, write_json
from tinygptv.miniature.question_files import BENCHMARK_SPLITS, BENCHMARKS, benchmarks_of
from tinygptv.miniature.scenes import Scene, SceneKey, generator, make_scene
from tinygptv.training.stages import RECIPES

CHUNK = 500
"""Scenes of a unit of work, and of a tar shard."""

Progress = Callable[[int, int], None]
Entries = dict[str, list[Entry]]


def mini_sources() -> tuple[str, ...]:
    """The data sets that the recipe ``mini`` trains on, each once."""
    return tuple(dict.fromkeys(source.name for stage in RECIPES["mini"] for source in stage.sources))


def write_world(
    out_dir: str | Path,
    train_scenes: int,
    test_scenes: int,
    seed: int = 0,
    sources: Sequence[str] | None = None,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, dict[str, str | None]]:
    """Draw a world: training sources from the split ``train``, benchmarks from ``test`` and the harder splits.

    Args:
        out_dir: folder to write to; gets ``sources.json`` and ``benchmarks/``.
        train_scenes: scenes of the training split; a set takes all or every n-th of them (``SourceFormat.every``).
        test_scenes: scenes of the test split; each harder split has a quarter of it. 0 writes no benchmarks.
        seed: everything follows from it.
        sources: data sets to write; None takes those of the recipe ``mini``.
        workers: processes; the result does not depend on it.
        progress: called with scenes done and scenes in all, after each chunk.

    Returns:
        The content of ``sources.json``: name -> ``{"input": ..., "images": ...}``, relative to ``out_dir``.

    Raises:
        ValueError: a data set is unknown.
    """
    root = Path(out_dir)
    names = tuple(sources) if sources is not None else mini_sources()
    homes = tuple(dict.fromkeys(_home(name) for name in names))
    chunks = [_Chunk(root, seed, "train", number, start, min(start + CHUNK, train_scenes), homes)
              for number, start in enumerate(range(0, train_scenes, CHUNK))]  # fmt: skip
    for split in BENCHMARK_SPLITS:
        size = test_scenes if split == "test" else (test_scenes + 3) // 4
        chunks += [
            _Chunk(root, seed, split, 0, start, min(start + CHUNK, size), None) for start in range(0, size, CHUNK)
        ]

    collected: Entries = defaultdict(list)
    total, done = sum(chunk.stop - chunk.start for chunk in chunks), 0
    for chunk, made in zip(chunks, _each(chunks, workers), strict=True):
        for name, entries in made.items():
            collected[name] += entries
        done += chunk.stop - chunk.start
        if progress:
            progress(done, total)

    for home in homes:
        save = SOURCE_FORMATS[home].save
        if save:
            save(root, collected[home])
    for name in BENCHMARKS if test_scenes else ():
        write_json(root / "benchmarks" / f"{name}.json", collected[f"benchmarks/{name}"])
    listed = {
        name: {"input": SOURCE_FORMATS[_home(name)].input, "images": SOURCE_FORMATS[_home(name)].images}
        for name in names
    }
    write_json(root / "sources.json", listed)
    return listed


@dataclass(frozen=True)
class _Chunk:
    """A range of scenes of one split. ``homes`` are the sets to write; None writes benchmark records."""

    root: Path
    seed: int
    split: str
    number: int
    start: int
    stop: int
    homes: tuple[str, ...] | None


def _home(name: str) -> str:
    home = INVERSE.get(name, name)
    if home not in SOURCE_FORMATS:
        raise ValueError(
            f"the miniature has no data set {name!r}; it has {', '.join(sorted({*SOURCE_FORMATS, *INVERSE}))}."
        )
    return home


def _each(chunks: Sequence[_Chunk], workers: int) -> Iterable[Entries]:
    """The entries of every chunk, in order."""
    if workers <= 1 or len(chunks) <= 1:
        yield from map(_make_chunk, chunks)
        return
    # Forking a process that may hold threads of torch or Ray is not safe.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(chunks)), mp_context=context) as pool:
        yield from pool.map(_make_chunk, chunks)


def _make_chunk(chunk: _Chunk) -> Entries:
    """Write the images and tar shards of a chunk; returns the entries for the files that are written at the end."""
    scenes = [make_scene(chunk.seed, chunk.split, index) for index in range(chunk.start, chunk.stop)]
    if chunk.homes is None:
        return _write_benchmark_chunk(chunk, scenes)
    entries: Entries = {home: [] for home in chunk.homes}
    images = _ImageFiles(chunk.root)
    for home in chunk.homes:
        form = SOURCE_FORMATS[home]
        chosen = [scene for scene in scenes if scene.key.index % form.every == 0]
        described = [(scene, form.describe(scene, generator(scene.key, f"{home}:{chunk.seed}"))) for scene in chosen]
        if form.save is None:
            _write_shard(chunk.root / home / f"{chunk.number:05d}.tar", chunk.number, described, images)
            continue
        for scene, found in described:
            entries[home] += found
            if form.image_folder:
                images.put(scene, IMAGE_PATHS[form.image_folder](scene))
    return entries


def _write_shard(path: Path, number: int, described: Sequence[tuple[Scene, list[Entry]]], images: _ImageFiles) -> None:
    if not described:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, (scene, found) in enumerate(described):
            add_web_sample(tar, f"{number:05d}{index:04d}", found[0], images.jpeg(scene))


def _write_benchmark_chunk(chunk: _Chunk, scenes: Sequence[Scene]) -> Entries:
    entries: Entries = defaultdict(list)
    images = _ImageFiles(chunk.root / "benchmarks" / "images")
    for scene in scenes:
        images.put(scene, coco_name(scene))
        for name in benchmarks_of(chunk.split):
            records = BENCHMARKS[name](scene, generator(scene.key, name))
            entries[f"benchmarks/{name}"] += [dict(record) for record in records]
    return entries


class _ImageFiles:
    """Draws each scene once and puts its file wherever it belongs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._jpegs: dict[SceneKey, bytes] = {}
        self._written: set[str] = set()
        self._folder = cache(lambda folder: folder.mkdir(parents=True, exist_ok=True))

    def jpeg(self, scene: Scene) -> bytes:
        """The scene's file."""
        if scene.key not in self._jpegs:
            self._jpegs[scene.key] = encode_jpeg(scene)
        return self._jpegs[scene.key]

    def put(self, scene: Scene, path: str) -> None:
        """Write the scene's file to ``path``, once."""
        if path not in self._written:
            self._written.add(path)
            target = self.root / path
            self._folder(target.parent)
            target.write_bytes(self.jpeg(scene))
