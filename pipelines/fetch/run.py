"""Fetch what is named: find what is here already, say what is missing, check the disk, download, record.

``fetch.lock.json`` in the folder records every file: size, SHA-256, address and revision. A file whose publisher states
no hash is compared with what was recorded at its first download.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from pipelines import storage
from pipelines.fetch.addresses import address, open_client, published_address
from pipelines.fetch.data import describe, files_left, finish_sets, missing_by_hand
from pipelines.fetch.datasets import DATA_GROUPS, all_sets, find_sets, with_needs
from pipelines.fetch.download import check_file, download, part_of, size_of
from pipelines.fetch.http import DownloadError, Remote, Retries, ask
from pipelines.fetch.results import LOCK_FILE, FetchResult, LockEntry
from pipelines.fetch.sample import RECORD_FILE as SAMPLE_RECORD
from pipelines.fetch.sample import SAMPLE
from pipelines.fetch.samples import fetch_samples
from pipelines.json_files import read_json_object, write_json
from pipelines.progress import Bar
from pipelines.redact import redact
from pipelines.settings import FetchSettings, SettingsError
from tinygptv.convert.sources import SourceFile, all_parts, find_parts, groups

logger = logging.getLogger(__name__)

MARGIN_BYTES = 256 << 20
"""Room that stays free on the disk."""
SHOWN_EVERY_S = 0.25
LEAST_SHOWN_BYTES = 5_000_000


@dataclass(frozen=True)
class Wanted:
    """A file that is asked for.

    Attributes:
        source: the published file.
        target: where it goes.
        remote: where it is, and what is stated about it.
        is_here: nothing has to be done.
    """

    source: SourceFile
    target: Path
    remote: Remote
    is_here: bool

    @property
    def num_bytes(self) -> int:
        """Its size: as it is here, as its server says, or as it was published."""
        return size_of(self.target) if self.is_here else self.remote.num_bytes or self.source.num_bytes

    @property
    def bytes_left(self) -> int:
        """To download, as far as is known."""
        return 0 if self.is_here else max(0, self.remote.num_bytes - size_of(part_of(self.target)))


def fetch(settings: FetchSettings, retries: Retries | None = None) -> FetchResult:
    """Bring the named weights and data sets into a folder.

    Args:
        settings: what, where from and where to.
        retries: how failures are tried again.

    Raises:
        SettingsError: nothing of that name is published.
        DownloadError: a file cannot be had; those before it are kept.
        DiskFullError: there is no room.
    """
    if SAMPLE in settings.what:
        return fetch_samples(settings, retries or Retries())
    sets = with_needs(each for name in settings.what for each in find_sets(name))
    names = [name for name in settings.what if not find_sets(name)]
    files = named_files(names) if names or not sets else []
    folder = settings.output_dir("raw" if sets else "weights")
    if (folder / SAMPLE_RECORD).exists():
        raise SettingsError(f"{folder} holds samples of data sets: give another output= for whole ones.")
    if sets and not settings.quiet:
        print(describe(sets), flush=True)
    busy = f"another fetch is writing to {folder}: wait for it, or give another output=."
    with storage.locked(folder / ".fetch", busy), open_client() as client:
        job = _Fetch(settings, folder, client, retries or Retries(most=1 if settings.dry_run else Retries.most))
        here = job.run([*files, *(file for each in sets for file in files_left(each, folder))])
        commands = [] if settings.dry_run else finish_sets(sets, folder, settings)
    by_hand = missing_by_hand(sets, folder)
    for text in [*by_hand, *(f"Then run: {command}" for command in commands)]:
        print(text, flush=True)
    result = FetchResult(
        folder=str(folder),
        files=here,
        bytes_downloaded=job.bytes_downloaded,
        num_bytes=job.num_bytes,
        by_hand=by_hand,
        commands=commands,
        result=str(folder / "result.json"),
    )
    write_json(folder / "result.json", result)
    return result


def named_files(names: Sequence[str]) -> list[SourceFile]:
    """The files of groups and parts, each once.

    Raises:
        SettingsError: nothing is named, or a name is unknown.
    """
    if not names:
        raise SettingsError(f"give what=NAME: {', '.join([*groups(), *all_parts(), *DATA_GROUPS, *all_sets()])}.")
    try:
        parts = [part for name in names for part in find_parts(name)]
    except ValueError as error:
        raise SettingsError(
            f"what={','.join(names)}: {error} Data sets: {', '.join([*DATA_GROUPS, *all_sets()])}."
        ) from error
    return list(dict.fromkeys(file for part in parts for file in part.files))


class _Fetch:
    """One run: the files are looked at first, so that everything is known before the first byte is downloaded."""

    def __init__(self, settings: FetchSettings, folder: Path, client: httpx.Client, retries: Retries) -> None:
        self.settings, self.folder, self.client, self.retries = settings, folder, client, retries
        self.lock: dict[str, LockEntry] = (read_json_object(folder / LOCK_FILE) or {}).get("files", {})
        self.bytes_downloaded = self.num_bytes = 0

    def run(self, files: Iterable[SourceFile]) -> dict[str, LockEntry]:
        """Bring the files; returns their entries in the lock file."""
        wanted = [self._look(file) for file in files]
        self.num_bytes = sum(each.num_bytes for each in wanted)
        self._tell(wanted)
        if not self.settings.dry_run:
            self._check_disk(wanted)
            self._refuse_offline(wanted)
            for each in wanted:
                if not each.is_here:
                    self._download(each)
        return {each.source.path: self.lock[each.source.path] for each in wanted if each.source.path in self.lock}

    # ------------------------------------------------------------------ what is here

    def _look(self, file: SourceFile) -> Wanted:
        """Find a file in the folder or beside it; ask its server about it where it has to be downloaded."""
        target = self.folder / file.path
        remote = self._remote(file)
        if target.is_file() and self._is_recorded(file, target):
            return Wanted(file, target, remote, is_here=True)
        if target.is_file():
            self._record(file, target, self._checked(target, remote))
            return Wanted(file, target, remote, is_here=True)
        for found in self._elsewhere(file):
            if self._take(file, found, target, remote):
                return Wanted(file, target, remote, is_here=True)
        if not self.settings.offline and not (remote.num_bytes and remote.sha256):
            remote = self._asked(file, remote)
        return Wanted(file, target, remote, is_here=False)

    def _is_recorded(self, file: SourceFile, target: Path) -> bool:
        entry, stat = self.lock.get(file.path), target.stat()
        if entry is None or self.settings.verify:
            return False
        as_recorded = (entry["bytes"], entry["modified_ns"]) == (stat.st_size, stat.st_mtime_ns)
        return as_recorded and (self.settings.accept_changed or file.sha256 in ("", entry["sha256"]))

    def _elsewhere(self, file: SourceFile) -> Iterator[Path]:
        """Places where the file may lie already: the folders of ``local``, and the hub's cache."""
        for text in self.settings.local:
            folder = Path(text).expanduser()
            if not folder.is_dir():
                raise SettingsError(f"local={text} is no folder.")
            is_flat = "/" not in file.path or folder.name == Path(file.path).parent.name
            names = [file.path, file.name] if is_flat else [file.path]
            yield from (folder / name for name in names if (folder / name).is_file())
        if file.repo:
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(file.repo, file.name, revision=file.revision, repo_type=file.kind)
            if isinstance(cached, str):
                yield Path(cached).resolve()

    def _take(self, file: SourceFile, found: Path, target: Path, remote: Remote) -> bool:
        try:
            sha256 = check_file(found, remote)
        except DownloadError as error:
            logger.warning("not taken: %s", error)
            return False
        storage.make_folder(str(target.parent))
        storage.link_or_copy(str(found), str(target))
        self._record(file, target, sha256)
        return True

    def _checked(self, path: Path, remote: Remote) -> str:
        try:
            return check_file(path, remote)
        except DownloadError as error:
            raise DownloadError(
                f"{error} Remove it to download it again; accept_changed=true takes it as it is."
            ) from error

    # ------------------------------------------------------------------ where it is

    def _remote(self, file: SourceFile) -> Remote:
        url, headers = address(file, self.settings)
        sha256, num_bytes, stated_by = file.sha256, file.num_bytes, file.stated_by
        entry = self.lock.get(file.path)
        if not sha256 and entry:
            sha256, num_bytes, stated_by = entry["sha256"], entry["bytes"], f"{LOCK_FILE} (the first download)"
        if self.settings.accept_changed:
            sha256, num_bytes = "", 0
        return Remote(url, num_bytes, sha256, stated_by=stated_by or "its publisher", headers=headers)

    def _asked(self, file: SourceFile, remote: Remote) -> Remote:
        """Add what the server says about a file whose size or hash is recorded nowhere."""
        try:
            stated = ask(self.client, remote, file.path, self.retries)
        except DownloadError:
            if self.settings.dry_run:
                return remote
            raise
        return replace(
            remote,
            num_bytes=remote.num_bytes or stated.num_bytes,
            sha256=remote.sha256 or stated.sha256,
            git_sha1=stated.git_sha1,
        )

    # ------------------------------------------------------------------ before and while downloading

    def _tell(self, wanted: Sequence[Wanted]) -> None:
        if self.settings.quiet:
            return
        missing = [each for each in wanted if not each.is_here]
        for each in wanted:
            size = _gigabytes(each.bytes_left) if each.remote.num_bytes else "unknown size"
            print(f"  {each.source.path}: {'here' if each.is_here else f'{size}, {each.remote.shown}'}", flush=True)
        left, unknown = sum(each.bytes_left for each in missing), sum(not each.remote.num_bytes for each in missing)
        print(
            f"{len(wanted) - len(missing)} of {len(wanted)} files are in {self.folder}; {_gigabytes(left)} to download"
            f"{f', and {unknown} of unknown size' if unknown else ''}.",
            flush=True,
        )

    def _check_disk(self, wanted: Sequence[Wanted]) -> None:
        needed = sum(each.bytes_left for each in wanted)
        free = shutil.disk_usage(self.folder).free
        if needed and needed + MARGIN_BYTES > free:
            raise storage.DiskFullError(
                f"{self.folder} has {_gigabytes(free)} free, but {_gigabytes(needed)} are to be downloaded: free some, "
                "or give another output=."
            )

    def _refuse_offline(self, wanted: Sequence[Wanted]) -> None:
        missing = [each.source.path for each in wanted if not each.is_here]
        if self.settings.offline and missing:
            raise DownloadError(
                f"offline=true, but {len(missing)} files are missing in {self.folder}: {', '.join(missing)}. "
                "Name the folder that holds them with local=."
            )

    def _download(self, each: Wanted) -> None:
        storage.make_folder(str(each.target.parent))
        begun = size_of(part_of(each.target))
        with Bar(each.source.path, quiet=self.settings.quiet or each.bytes_left < LEAST_SHOWN_BYTES) as bar:
            shown_at = 0.0

            def report(done: int, total: int) -> None:
                nonlocal begun, shown_at
                begun = min(begun, done)  # the server sends the file from its start
                if bar.seconds - shown_at > SHOWN_EVERY_S or done == total:
                    shown_at = bar.seconds
                    speed = (done - begun) / shown_at / 1e6
                    bar.update(done >> 20, max(total, done) >> 20, f"MiB  {speed:.1f} MB/s")

            sha256 = download(self.client, each.remote, each.target, report, self.retries)
        self.bytes_downloaded += size_of(each.target) - begun
        self._record(each.source, each.target, sha256)

    def _record(self, file: SourceFile, target: Path, sha256: str) -> None:
        stat = target.stat()
        self.lock[file.path] = {
            "bytes": stat.st_size,
            "sha256": sha256,
            "modified_ns": stat.st_mtime_ns,
            "address": redact(published_address(file)),
            "revision": file.revision,
            "license": file.license,
        }
        write_json(self.folder / LOCK_FILE, {"files": dict(sorted(self.lock.items()))})


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= LEAST_SHOWN_BYTES else f"{num_bytes / 1e6:.3f} MB"
