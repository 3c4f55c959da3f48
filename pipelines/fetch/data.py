"""Fetch data sets by name: downloads, unpacked archives, links as a table for img2dataset, and what is left by hand."""

from __future__ import annotations

import csv
import json
import logging
import lzma
import shlex
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

from pipelines import storage
from pipelines.cli import run_command
from pipelines.data.sources.json_items import iterate_items
from pipelines.fetch.datasets import DataSet, LinkList
from pipelines.fetch.http import DownloadError
from pipelines.json_files import read_json_object, write_json
from pipelines.progress import Bar
from pipelines.settings import FetchSettings, SettingsError
from tinygptv.convert.sources import SourceFile

logger = logging.getLogger(__name__)

UNPACKED = ".unpacked"
"""Ending of the note beside an archive whose files are there."""
_ZIP_ERRORS = (zipfile.BadZipFile, RuntimeError, EOFError, zlib.error, lzma.LZMAError)
"""What zipfile raises for damage, and for encryption and compression that it cannot read."""
_COPY_BYTES = 8 << 20
_SHOWN_LINKS = 100_000


def describe(sets: Sequence[DataSet]) -> str:
    """A table of sets: disk, rows, hours, licence."""
    lines = [f"{'set':24}{'GB':>8}{'rows':>14}{'hours':>8}  licence"]
    for each in sets:
        rows = f"{each.rows:,}" if each.rows else "-"
        lines.append(f"{each.name:24}{each.gigabytes or '-':>8}{rows:>14}{each.hours:8.1f}  {each.license}")
    total, hours = sum(each.gigabytes for each in sets), sum(each.hours for each in sets)
    lines.append(f"{'together':24}{total:8.1f}{'':14}{hours:8.1f}  100 Mbit/s; links: one machine with 1 Gbit/s")
    return "\n".join(lines)


def missing_by_hand(sets: Sequence[DataSet], folder: Path) -> list[str]:
    """What a person has to fetch, a sentence each."""
    return [
        f"{each.name}: open {file.address} in a browser, and put {folder / file.path} there."
        for each in sets
        for file in each.by_hand
        if not (folder / file.path).exists()
    ]


def files_left(each: DataSet, folder: Path) -> list[SourceFile]:
    """The files of a set, without archives that were unpacked and then removed."""
    return [file for file in each.files if (folder / file.path).is_file() or not _note(folder / file.path).exists()]


def finish_sets(sets: Sequence[DataSet], folder: Path, settings: FetchSettings) -> list[str]:
    """Unpack archives and turn lists of links into tables; returns the commands that download their images.

    Raises:
        DownloadError: an archive or list is damaged, or img2dataset failed.
        SettingsError: img2dataset is asked for and not installed.
    """
    commands = []
    for each in sets:
        for name in sorted(each.archives):
            if (folder / name).is_file():
                unpack(folder / name, quiet=settings.quiet)
        if each.links:
            write_table(folder / each.links.file, settings.rows, quiet=settings.quiet)
            command = img2dataset_command(each.links, folder)
            commands.append(shlex.join(command))
            if settings.images == "run":
                _run(command)
    return [] if settings.images == "run" else commands


def _run(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        raise SettingsError("img2dataset is not installed: pip install 'tinygptv[images]', or run the printed command.")
    if run_command(command):
        raise DownloadError("img2dataset failed, as it says above; run the same command to resume.")


# ---------------------------------------------------------------------- archives


def unpack(archive: Path, *, quiet: bool = False) -> None:
    """Unpack a zip beside itself; files that are whole already are left as they are.

    Raises:
        DownloadError: it is no zip, is damaged or encrypted, or a name in it leads out of the folder.
        DiskFullError: there is no room; what is unpacked is kept.
    """
    note = _note(archive)
    if note.exists():
        return
    folder = archive.parent
    try:
        with zipfile.ZipFile(archive) as opened, storage.disk_full_as_error(folder):
            members = [member for member in opened.infolist() if not member.filename.endswith(("/", "\\"))]
            targets = {folder / _safe_name(member.filename, archive): member for member in members}
            left = [(m, t) for t, m in targets.items() if not (t.is_file() and t.stat().st_size == m.file_size)]
            _check_room([m for m, _ in left], folder)
            with Bar(f"unpacking {archive.name}", quiet=quiet) as bar:
                for number, (member, target) in enumerate(left, 1):
                    _extract(opened, member, target)
                    if number % 100 == 0 or number == len(left):
                        bar.update(number, len(left), "files")
    except _ZIP_ERRORS as error:
        raise DownloadError(f"{archive} is no whole zip archive: {error}. Remove it to download it again.") from error
    note.touch()


def _note(archive: Path) -> Path:
    return archive.with_name(f".{archive.name}{UNPACKED}")


def _check_room(members: Sequence[zipfile.ZipInfo], folder: Path) -> None:
    needed, free = sum(member.file_size for member in members), shutil.disk_usage(folder).free
    if needed > free:
        raise storage.DiskFullError(
            f"{folder} has {free / 1e9:.1f} GB free, but the archive unpacks to {needed / 1e9:.1f} GB: free some space."
        )


def _safe_name(name: str, archive: Path) -> str:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0]:
        raise DownloadError(f"{archive} holds {name[:200]!r}, which leads out of its folder: it is not unpacked.")
    return "/".join(parts)


def _extract(opened: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    storage.make_folder(str(target.parent))
    draft = storage.draft_of(target)
    try:
        with opened.open(member) as source, draft.open("wb") as sink:
            shutil.copyfileobj(source, sink, _COPY_BYTES)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


# ---------------------------------------------------------------------- links


def img2dataset_command(links: LinkList, folder: Path, *, threads: int = 128, processes: int = 16) -> list[str]:
    """The call that downloads a list's images as tars, with the settings of MiniGPT-4."""
    table = table_of(folder / links.file)
    options = {
        "url_list": str(table),
        "input_format": "tsv",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "output_folder": str(folder / links.output),
        "processes_count": str(processes),
        "thread_count": str(threads),
        "image_size": "224",
        "incremental_mode": "incremental",
    }
    return ["img2dataset", *(word for key, value in options.items() for word in (f"--{key}", value))]


def table_of(list_file: Path) -> Path:
    """Where the table of a list goes: ``NAME.tsv`` beside ``NAME.json``."""
    return list_file.with_suffix(".tsv")


def write_table(list_file: Path, rows: int = 0, *, quiet: bool = False) -> Path:
    """Turn a JSON list of ``{"caption", "url"}`` into the table that img2dataset reads, one entry at a time.

    img2dataset leaves out tars that are there, so a table of another number of rows would never be downloaded whole.

    Args:
        list_file: several gigabytes at the paper's scale.
        rows: how many to take; 0 takes all.
        quiet: no progress.

    Raises:
        DownloadError: the file is no such list.
        SettingsError: there is a table of another number of rows.
    """
    table = table_of(list_file)
    note = table.with_name(f".{table.name}.rows.json")
    made = read_json_object(note) if table.is_file() else None
    if made and made.get("rows") != rows:
        raise SettingsError(
            f"{table} holds {_links(made.get('rows'))}, and {_links(rows)} are asked for: give another output=, or "
            "remove the table and the tars that were made of it."
        )
    if made or (table.is_file() and not rows):
        return table
    write_json(note, {"rows": rows})
    total = list_file.stat().st_size
    with (
        storage.AtomicFile(str(table)) as file,
        Bar(f"writing {table.name}", quiet=quiet) as bar,
        list_file.open("rb") as stream,
    ):
        # with quotes where a text holds some: img2dataset reads the table as CSV
        sink = SimpleNamespace(write=lambda line: file.write(line.encode("utf-8", "replace")))
        writer = csv.writer(sink, delimiter="\t", lineterminator="\n")
        writer.writerow(("caption", "url"))
        try:
            for number, item in enumerate(iterate_items(stream, keep_data=True), 1):
                entry = json.loads(item.data)
                writer.writerow(" ".join(str(entry[key]).split()) for key in ("caption", "url"))
                if number % _SHOWN_LINKS == 0:
                    bar.update(stream.tell() >> 20, total >> 20, f"MiB  {number:,} links")
                if number == rows:
                    break
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DownloadError(
                f"{list_file} is no list of entries with 'caption' and 'url', or is damaged: {error!r}. Remove it to "
                "download it again."
            ) from error
    return table


def _links(rows: object) -> str:
    return f"the first {rows} links" if rows else "all links"
