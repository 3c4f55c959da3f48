"""The first rows of each data set, with the images that they name: enough to try a recipe, without the archives.

Annotations are read from their servers until there are enough entries, and cut there. ``single_images`` then fetches
the images that their rows name. The folder is laid out as that of whole sets, so every command works on it.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import httpx

from pipelines import storage
from pipelines.data.sources import SOURCES
from pipelines.data.sources.annotations import AnnotationReader
from pipelines.data.sources.json_items import Item, JsonDamage, iterate_items
from pipelines.data.sources.pickles import load_plain_pickle
from pipelines.fetch.data import unpack
from pipelines.fetch.datasets import DataSet
from pipelines.fetch.http import DownloadError, Remote, Retries, refuse_bad_answer
from pipelines.json_files import read_json_object, write_json
from pipelines.settings import FetchSettings, SettingsError
from tinygptv.convert.sources import SourceFile
from tinygptv.json_object import JsonObject

SAMPLE = "sample"
"""Name that asks for samples: of all sets, or of those that are named beside it."""
RECORD_FILE = "sample.json"
DEFAULT_ROWS = 1000

Open = Callable[[], io.BufferedReader]


class Record:
    """``sample.json`` of a folder: how many rows, which files are done, and addresses of images that entries gave."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.path, self.rows = folder / RECORD_FILE, rows
        known: JsonObject = read_json_object(self.path) or {}
        if known.get("rows", rows) != rows:
            raise SettingsError(
                f"{folder} holds samples of {known['rows']} rows: give rows={known['rows']}, or another output=."
            )
        self.files: list[str] = known.get("files", [])
        self.urls: dict[str, dict[str, list[str]]] = known.get("urls", {})

    def add(self, file: str) -> None:
        """Note that a file is done."""
        self.files.append(file)
        write_json(self.path, {"rows": self.rows, "files": self.files, "urls": self.urls})


@dataclass(frozen=True)
class Annotations:
    """Fetches the first entries of annotations.

    Attributes:
        settings: of the fetch.
        folder: of the samples.
        client: with its timeouts and proxies.
        retries: how failures are tried again.
        locate: where a published file is asked for.
        record: what is done already.
    """

    settings: FetchSettings
    folder: Path
    client: httpx.Client
    retries: Retries
    locate: Callable[[SourceFile], Remote]
    record: Record

    def bring(self, each: DataSet) -> None:
        """Bring the first entries of a set, as far as they are not there.

        Raises:
            DownloadError: they cannot be had.
        """
        by_hand = {file.path: self.local(file.path) for file in each.by_hand}
        sources: dict[str, Open] = {file.path: partial(self._open, file) for file in each.files}
        sources |= {path: _opening(found) for path, found in by_hand.items() if found and found.is_file()}
        for path, opened in sources.items():
            if path in each.of_images or path in self.record.files:
                continue
            target = self.folder / path
            storage.make_folder(str(target.parent))
            if path in each.archives:
                self._unpack(each, opened, target, each.cut.get(path, ()))
            else:
                self._cut(each, target, opened)
            self.record.add(path)

    def local(self, path: str) -> Path | None:
        """A whole copy in one of the folders of ``local``, laid out as raw data or flat."""
        for text in self.settings.local:
            for name in (path, path.partition("/")[2], path.rsplit("/", 1)[1]):
                if (found := Path(text).expanduser() / name).exists():
                    return found
        return None

    def _open(self, file: SourceFile) -> io.BufferedReader:
        local = self.local(file.path)
        if local:
            return local.open("rb")
        if self.settings.offline:
            raise DownloadError(f"offline=true, but {file.path} is missing: name the folder that holds it with local=.")
        return io.BufferedReader(_WebStream(self.client, self.locate(file), file.path))

    def _unpack(self, each: DataSet, opened: Open, target: Path, cut: Iterable[str]) -> None:
        """A small archive of annotations is brought whole, and cut once it is unpacked."""

        def bring() -> None:
            with opened() as stream, storage.AtomicFile(str(target)) as sink:
                shutil.copyfileobj(stream, sink, storage.COPY_BYTES)

        with storage.disk_full_as_error(target):
            self.retries.run(target.name, bring)
        unpack(target, quiet=self.settings.quiet)
        for path in (self.folder / name for name in cut):
            if path.suffix == ".p":
                references = [entry for entry in load_plain_pickle(path.read_bytes()) if entry["split"] == "train"]
                storage.write_atomically(str(path), pickle.dumps(references[: self.record.rows], protocol=2))
            else:
                self._cut(each, path, _opening(path))
        target.unlink()

    def _cut(self, each: DataSet, target: Path, opened: Open) -> None:
        """Keep the first entries of a JSON file: of a list, of an object, or of a list in an object."""
        member, count = _member(each), -(-self.record.rows // each.per_entry)

        def read() -> tuple[bool, list[Item]]:
            with opened() as stream:
                is_list = stream.peek(64)[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
                return is_list, list(islice(iterate_items(stream, member, keep_data=True), count))

        try:
            is_list, items = self.retries.run(target.name, read)
        except JsonDamage as error:
            raise DownloadError(f"{target.name} is no list of entries: {error}.") from error
        if not items:
            raise DownloadError(f"{target.name} has no entries{f' in {member!r}' if member else ''}.")
        texts = [item.data if item.key is None else json.dumps(item.key).encode() + b": " + item.data for item in items]
        body = b",\n".join(texts)
        if is_list:
            content = b"[" + body + b"]"
        else:
            content = b"{" + (json.dumps(member).encode() + b": [" + body + b"]" if member else body) + b"}"
        storage.write_atomically(str(target), content)
        self._note_urls(each, items)

    def _note_urls(self, each: DataSet, items: Sequence[Item]) -> None:
        """Remember the addresses of images that entries give themselves."""
        for rule in each.images:
            for item in items if rule.fields else ():
                entry = item.value if isinstance(item.value, dict) else {}
                key = str(entry.get(rule.id, "")) if rule.id else str(item.key)
                urls = [str(entry.get(field, "")) for field in rule.fields]
                self.record.urls.setdefault(each.name, {})[key] = [url for url in urls if url.startswith("http")]


class _WebStream(io.RawIOBase):
    """A file on a server, read as far as it is asked for."""

    def __init__(self, client: httpx.Client, remote: Remote, name: str) -> None:
        request = client.build_request("GET", remote.url, headers={"Accept-Encoding": "identity", **remote.headers})
        self._response = client.send(request, stream=True, follow_redirects=True)
        try:
            refuse_bad_answer(self._response, remote, name)
        except BaseException:
            self._response.close()
            raise
        self._chunks, self._left = self._response.iter_raw(), b""

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """The next bytes; 0 at the end."""
        self._left = self._left or next(self._chunks, b"")
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def close(self) -> None:
        """End the connection."""
        self._response.close()
        super().close()


def _opening(path: Path) -> Open:
    return lambda: path.open("rb")


def _member(each: DataSet) -> str:
    """The list that holds the entries, where the files of a set are objects."""
    readers = [SOURCES[source].reader for source in each.sources]
    return next((reader.member for reader in readers if isinstance(reader, AnnotationReader)), "")
