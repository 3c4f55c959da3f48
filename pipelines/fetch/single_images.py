"""Images one by one: those that the rows of a sample name, from publishers that serve single images.

Each set's own reader says which images its rows lack, so this holds for every format that is read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import httpx

from pipelines import storage
from pipelines.data.sources import SOURCES
from pipelines.data.sources.base import Rejected, SourceInput
from pipelines.fetch.datasets import DataSet, ImageRule, all_sets
from pipelines.fetch.http import DownloadError, Remote, TryAgainError, on_mirror, refuse_bad_answer
from pipelines.fetch.sample import Annotations
from pipelines.progress import Bar
from pipelines.settings import SettingsError

logger = logging.getLogger(__name__)

CONNECTIONS = 16
"""Images that are fetched at a time."""


@dataclass(frozen=True)
class Wanted:
    """An image that rows name.

    Attributes:
        urls: its addresses, tried in order; empty where none is known.
        of_web: they are of the open web, where links die: a server that fails costs that image alone.
    """

    urls: tuple[str, ...] = ()
    of_web: bool = False


@dataclass(frozen=True)
class ImagesReport:
    """What became of the images of samples.

    Attributes:
        found: how many are there.
        lost: how many their servers do not have.
        left: sets whose images come in an archive alone, a sentence each.
    """

    found: int
    lost: int
    left: list[str]


def fetch_images(annotations: Annotations, sets: Sequence[DataSet]) -> ImagesReport:
    """Fetch the images that the rows of the sets name and that are not there.

    Raises:
        DownloadError: a publisher's server fails at every try; the images before are kept.
    """
    wanted: dict[Path, Wanted] = {}
    left = []
    for each in sets:
        rules = each.images or tuple(rule for name in each.needs for rule in all_sets()[name].images)
        for rule in rules:
            storage.make_folder(str((annotations.folder / rule.path).parent))
        in_archive = 0
        for name in _missing(each, annotations.folder):
            path, image = _find(each, name, rules, annotations.record.urls.get(each.name, {}))
            if image.urls or image.of_web or annotations.local(path):
                wanted.setdefault(annotations.folder / path, image)
            else:
                in_archive += 1
        if in_archive:
            size = f" of {each.gigabytes:g} GB" if each.gigabytes else ""
            left.append(
                f"{each.name}: {in_archive} images are missing; their publisher has them in an archive{size} alone "
                "(docs/datasets.md). Unpack it, and name its folder with local=."
            )
    lost = _fetch_all(annotations, wanted)
    return ImagesReport(len(wanted) - lost, lost, left)


def _missing(each: DataSet, folder: Path) -> list[str]:
    """Names of images that the readers of a set look for and do not find, each once."""
    names: dict[str, None] = {}
    for source in each.sources:
        if each.links or not (folder / each.input).exists():
            continue
        given = SourceInput(source, str(folder / each.input), "", source, SOURCES[source].task)
        reader = SOURCES[source].reader
        try:
            results = (result for unit in reader.plan(given) for result in reader.read(unit))
            looked_for = [result.missing[0] for result in results if isinstance(result, Rejected) and result.missing]
        except SettingsError as error:  # annotations that a person has to fetch, or a folder of images that is missing
            logger.debug("%s: %s", source, error)
            continue
        names |= dict.fromkeys(path.rsplit("/", 1)[-1] for _, path in looked_for)
    return list(names)


def _find(each: DataSet, name: str, rules: Sequence[ImageRule], given: dict[str, list[str]]) -> tuple[str, Wanted]:
    """Where an image goes below the folder, and where it is; without an address where no rule is for it."""
    for rule in rules:
        if found := re.search(rule.match, name):
            urls = given.get(found[1], ()) if rule.fields else (url.format(found[1]) for url in rule.urls)
            return rule.path.format(found[1]), Wanted(tuple(urls), bool(rule.fields))
    return f"{each.input}/{name}", Wanted()


def _fetch_all(annotations: Annotations, wanted: dict[Path, Wanted]) -> int:
    """Several at a time; returns how many are lost."""
    lost = 0
    with (
        ThreadPoolExecutor(CONNECTIONS) as pool,
        Bar("images", quiet=annotations.settings.quiet or not wanted) as bar,
    ):
        jobs = [pool.submit(_fetch_one, annotations, path, image) for path, image in wanted.items()]
        try:
            for number, job in enumerate(jobs, 1):
                lost += not job.result()
                if number % 20 == 0 or number == len(jobs):
                    bar.update(number, len(jobs), f"{lost} lost" if lost else "")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return lost


def _fetch_one(annotations: Annotations, target: Path, image: Wanted) -> bool:
    """One image from the first place that has it; False where none has."""
    settings = annotations.settings
    if local := annotations.local(str(target.relative_to(annotations.folder))):
        storage.link_or_copy(str(local), str(target))
        return True
    retries = (
        replace(annotations.retries, most=min(2, annotations.retries.most)) if image.of_web else annotations.retries
    )
    for url in () if settings.offline else image.urls:
        remote = Remote(on_mirror(url, settings.mirror))
        get = partial(_get, annotations.client, remote, target.name)
        try:
            content = retries.run(f"{target.name} from {remote.shown}", get)
        except DownloadError as error:
            if not image.of_web:
                raise
            logger.debug("%s", error)
            continue
        if content:
            with storage.disk_full_as_error(target):
                storage.write_atomically(str(target), content)
            return True
    return False


def _get(client: httpx.Client, remote: Remote, name: str) -> bytes | None:
    """Content of an image; None where the server says that it has none."""
    response = client.get(remote.url, follow_redirects=True)
    if response.status_code in (httpx.codes.NOT_FOUND, httpx.codes.GONE):
        return None
    refuse_bad_answer(response, remote, name)
    if not response.content:
        raise TryAgainError("the answer is empty")
    return response.content
