"""Samples of data sets: their annotations, then their images, then what is left to a person."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pipelines import storage
from pipelines.fetch.addresses import address, open_client
from pipelines.fetch.data import describe, finish_sets, missing_by_hand
from pipelines.fetch.datasets import DATA_GROUPS, DataSet, all_sets, find_sets, with_needs
from pipelines.fetch.http import Remote, Retries
from pipelines.fetch.results import LOCK_FILE, FetchResult
from pipelines.fetch.sample import DEFAULT_ROWS, SAMPLE, Annotations, Record
from pipelines.fetch.single_images import ImagesReport, fetch_images
from pipelines.json_files import write_json
from pipelines.settings import FetchSettings, SettingsError
from tinygptv.convert.sources import SourceFile


def fetch_samples(settings: FetchSettings, retries: Retries) -> FetchResult:
    """The first rows of data sets, with their images.

    Raises:
        SettingsError: a name is no data set, or the folder holds something else.
        DownloadError: annotations cannot be had, or a server of images fails at every try.
    """
    names = [name for name in settings.what if name != SAMPLE] or ["data"]
    sets = with_needs(each for name in names for each in find_sets(name))
    if unknown := [name for name in names if not find_sets(name)]:
        raise SettingsError(
            f"what={','.join(settings.what)}: {', '.join(unknown)} is no data set; samples are made of "
            f"{', '.join([*DATA_GROUPS, *all_sets()])}."
        )
    folder, rows = settings.output_dir("raw_sample"), settings.rows or DEFAULT_ROWS
    if (folder / LOCK_FILE).exists():
        raise SettingsError(f"{folder} holds whole data sets or weights: give another output= for samples.")
    record = Record(folder, rows)
    if settings.dry_run:
        print(
            f"{describe(sets)}\nSizes of the whole sets; of each the first {rows:,} rows are taken, with their images.",
            flush=True,
        )
    commands: list[str] = []
    report = ImagesReport(0, 0, [])
    with (
        storage.locked(folder / ".fetch", f"another fetch is writing to {folder}: wait for it."),
        open_client() as client,
    ):
        if not settings.dry_run:
            annotations = Annotations(settings, folder, client, retries, partial(_locate, settings), record)
            commands, report = _bring(annotations, sets)
    by_hand = [
        f"{text} Or name the folder that holds it with local=." for text in missing_by_hand(sets, folder)
    ] + report.left
    for text in [*by_hand, *(f"Then run: {command}" for command in commands)]:
        print(text, flush=True)
    result = FetchResult(
        folder=str(folder),
        files={},
        bytes_downloaded=0,
        by_hand=by_hand,
        commands=commands,
        sample={"rows": rows, "files": record.files, "images": report.found, "lost": report.lost},
        result=str(folder / "result.json"),
    )
    write_json(folder / "result.json", result)
    return result


def _locate(settings: FetchSettings, file: SourceFile) -> Remote:
    url, headers = address(file, settings)
    return Remote(url, headers=headers)


def _bring(annotations: Annotations, sets: Sequence[DataSet]) -> tuple[list[str], ImagesReport]:
    """Annotations, then images; returns the commands that download lists of links, too."""
    for each in sets:
        annotations.bring(each)
        if each.sources and not annotations.settings.quiet:
            print(f"{each.name}: first {annotations.record.rows:,} rows", flush=True)
    commands = finish_sets([each for each in sets if each.links], annotations.folder, annotations.settings)
    report = fetch_images(annotations, sets)
    print(f"{report.found:,} images fetched, {report.lost:,} not there.", flush=True)
    return commands, report
