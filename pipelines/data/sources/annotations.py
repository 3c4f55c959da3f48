"""Data sets of annotation files and an image folder: captions, questions, conversations, grounded phrases, text.

A file is cut into slices of entries; ``pipelines.data.sources.entries`` says what an entry of each data set means.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipelines.data.sources.base import Changes, ReadResult, Rejected, SourceInput, SourceUnit, find_input
from pipelines.data.sources.drafts import Describe, Draft, read_drafts
from pipelines.data.sources.images import ImageFolder, ImageLayout, find_image_folder
from pipelines.data.sources.json_entries import detect_form, plan_entries, read_entries
from pipelines.data.sources.questions import ImagesAndAnswers, has_questions_alone, plan_questions, with_answers

_ENTRY_FIELDS = ("image", "image_id", "imageId", "question", "caption", "conversations", "instances")
"""An object on one line that has one of these fields is an entry, not a container of entries."""


@dataclass(frozen=True)
class AnnotationReader:
    """A family of JSON files.

    Attributes:
        describe: what an entry says.
        files: official names of the files, looked for where the input is a folder, in order; ``{a,b}`` for several.
        member: list that holds the entries where the files are objects; empty: whatever holds entries.
        images: where the images may be; None for text only.
    """

    describe: Describe
    files: tuple[str, ...]
    member: str = ""
    images: ImageLayout | None = None

    def plan(self, source: SourceInput) -> Iterator[SourceUnit]:
        """One unit per ``ENTRIES_PER_UNIT`` entries of each file."""
        for file in find_input(source, *self.files):
            folder = find_image_folder(source, file.location, self.images) if self.images else None
            form = detect_form(file, self.member, _ENTRY_FIELDS)
            if has_questions_alone(file, form):
                yield from plan_questions(source, file, form, folder)
            else:
                yield from plan_entries(source, file, form, ImagesAndAnswers(folder))

    def read(self, unit: SourceUnit, changes: Changes | None = None) -> Iterator[ReadResult]:
        """Samples of one slice."""
        extra: ImagesAndAnswers = unit.details.extra
        images = ImageFolder(extra.folder, self.images.alternatives) if self.images else None
        for key, entry in read_entries(unit):
            if isinstance(entry, Rejected):
                yield entry
            else:
                yield from read_drafts(unit, key, partial(self._describe, entry, key, extra), images, changes)

    def _describe(self, entry: Any, key: str, extra: ImagesAndAnswers) -> Iterator[Draft]:
        return self.describe(with_answers(entry, extra), key)
