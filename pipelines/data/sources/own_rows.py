"""A row of one's own data -> a draft. The same fields are read from JSON and from tables.

    {"image": "a.jpg", "turns": [{"question": "what is it?", "answers": ["a dog"]}], "task": "vqa"}
    {"image": "a.jpg", "conversations": [{"from": "human", "value": ".."}, {"from": "gpt", "value": ".."}]}
    {"image": "a.jpg", "messages": [{"role": "user", "content": ".."}, {"role": "assistant", "content": ".."}]}
    {"image": "a.jpg", "question": "what is it?", "answer": "a dog"}
    {"images": ["a.jpg"], "query": "what is it?", "response": "a dog"}
    {"images": ["a.jpg"], "instruction": "name it", "input": "in one word", "output": "a dog"}
    {"image": "a.jpg", "caption": "a dog"}
    {"image": "a.jpg", "answer": "the dog", "boxes": [[10, 20, 90, 80]], "task": "refer"}

Words are kept as they are written, but for captions of the task ``pair``, which are cleaned like those of tars; the
mark of the image is taken out of questions. A row whose image is empty (none of its fields, null, "", [], an empty cell
of a table) has no image and is text. A row that names an image, or asks about one, and has none that can be read is
malformed: it is never trained on as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipelines.data.sources.base import Filtered, Malformed, SourceUnit, shorten
from pipelines.data.sources.conversations import read_conversation, refuse_marks_in_answer, take_marks
from pipelines.data.sources.drafts import Draft
from pipelines.data.sources.entries import text_of
from pipelines.data.sources.images import IMAGE_EXTENSIONS, check_image_name
from tinygptv.data.sample import Turn

CONVERSATIONS = ("conversations", "messages", "conversation", "texts")
TEXTS = ("caption", "text", "description")
_PAIRS = (("query", "response"), ("instruction", "output"))
"""Question and answer as ms-swift and Alpaca call them; both may have ``history``, a list of earlier pairs."""

ROW_FIELDS = ("turns", *CONVERSATIONS, "question", *(asked for asked, _ in _PAIRS), *TEXTS)
"""Fields that a row has one of, or else ``boxes`` with answers."""

KNOWN_BY = (*ROW_FIELDS, *(answered for _, answered in _PAIRS), "boxes")
"""Fields that tell a row from a container of rows."""

_TEXT_FIELDS = frozenset((*KNOWN_BY, "answer", "answers", "input", "system"))

_IMAGE_FIELDS = (
    "image",
    "images",
    "img",
    "image_path",
    "image_file",
    "img_path",
    "file_name",
    "image_name",
    "picture",
    "photo",
    *sorted(IMAGE_EXTENSIONS),
)
"""Fields that name or hold the image; those of img2dataset's tables are called by the format."""

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_IMAGE_WORD = re.compile(r"(?:image|img|picture|photo|video)(?:s|(?:file)?(?:id|url|path|name)s?|file)?")
_IMAGE_FILE = re.compile(rf".{{1,500}}\.(?:{'|'.join(sorted(IMAGE_EXTENSIONS))})", re.IGNORECASE)
_LETTER = re.compile(r"\(?([A-H])\)?\.?")
_CHOICE_COLUMNS = ("choice_", "option_", "choice", "option", "op")
"""Columns of choices before their letters: SEED-Bench's ``choice_a``, MedMCQA's ``opa``."""
_QUOTED = re.compile(r"""(['"])(.*?)\1""")
_HELD_OUT = re.compile(r"(?:mini)?(?:val|dev|test|eval|hold.?out|held.?out)", re.IGNORECASE)
_LINK_FIELDS = ("url", "image_url", "img_url", "link", "coco_url", "flickr_url")


def own_draft(fields: Any, default_task: str) -> Draft:
    """Read a row.

    Args:
        fields: columns or JSON members.
        default_task: task where the row names none; empty decides by the form.

    Raises:
        Malformed: it has none of the forms above, or a field is of a wrong type, or its image is lost.
        Filtered: it is a row of img2dataset without an image, because the download failed.
    """
    if not isinstance(fields, Mapping):
        raise Malformed(f"the row is no object but {type(fields).__name__}")
    draft, form, num_marks = _own_turns(fields)
    image = _own_image(fields)
    image = draft.image if image is None else image
    draft = _with_system(draft, fields.get("system"))
    if num_marks > (image is not None):
        has = "1 image" if image is not None else "no image"
        raise Malformed(f"the questions have {num_marks} marks of images (<image>), and the row has {has}")
    if image is None:
        _refuse_lost_image(fields)
    _refuse_lost_box(fields)
    _refuse_marks_of_objects(fields, draft)
    boxes = tuple(_own_box(box) for box in _list_of(fields, "boxes"))
    if not (task := fields.get("task") or default_task):
        task = form or ("text" if image is None else "conversation" if len(draft.turns) > 1 else "instruct")
    return replace(draft, image=image, boxes=boxes, task=str(task), cleans_answers=task == "pair")


def _own_turns(fields: Mapping[str, Any]) -> tuple[Draft, str, int]:
    """A draft with the turns, the task that the form stands for, and the number of marks of images."""
    if fields.get("turns") is not None:
        return _marked([(_text_of(turn, "question"), _answers(turn)) for turn in _list_of(fields, "turns")], "")
    for name in CONVERSATIONS:
        if fields.get(name) is not None:
            conversation = read_conversation(fields[name])
            image = _one_image(conversation.images, name)
            return Draft(conversation.turns, image, changes=conversation.changes), "", conversation.num_marks
    if fields.get("question") is not None:
        _refuse_bare_choice(fields)
        return _marked([(_text_of(fields, "question"), _answers(fields))], "")
    for asked, answered in _PAIRS:
        if fields.get(asked) is not None and fields.get(answered) is not None:
            earlier = [(question, (answer,)) for question, answer in _history(fields)]
            question = _text_of(fields, asked)
            if asked == "instruction" and fields.get("input"):
                question = f"{question}\n{_text_of(fields, 'input')}"
            return _marked([*earlier, (question, _texts_of(fields, answered))], "")
    for name in TEXTS:
        if fields.get(name) is not None:
            return _marked([("", _texts_of(fields, name))], "caption")
    if fields.get("boxes") and (fields.get("answer") or fields.get("answers")):  # the phrases that name a box
        return _marked([("", _answers(fields))], "refer")
    names = shorten(", ".join(map(str, fields)) or "no fields")
    raise Malformed(f"no {', '.join(ROW_FIELDS[:-1])} or {ROW_FIELDS[-1]} among {names}")


def _history(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Earlier questions and answers.

    Raises:
        Malformed: they are no pairs of texts.
    """
    for pair in _list_of(fields, "history"):
        if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
            raise Malformed(f"history holds {shorten(repr(pair), 60)}, which is no pair of question and answer")
        yield pair[0], pair[1]


def _refuse_bare_choice(fields: Mapping[str, Any]) -> None:
    """Refuse an answer that stands for a choice that the question does not show, as ``B`` of columns A to D.

    Raises:
        Malformed: it does.
    """
    if type(given := fields.get("answer")) not in (str, int):
        return
    answer, question = str(given).strip(), str(fields["question"])
    letter = _LETTER.fullmatch(answer)
    choices = _choices(fields, letter[1] if letter else "")
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str | int) for choice in choices):
        return
    words = [str(choice).strip() for choice in choices]
    is_one = isinstance(given, str) and answer.lower() in {word.lower() for word in words}
    if words and not is_one and not all(word in question for word in words):
        raise Malformed(
            f"answer {shorten(repr(given), 40)} stands for one of the row's choices: write its words, or the choices "
            "into the question"
        )


def _choices(fields: Mapping[str, Any], letter: str) -> Any:
    """What an answer may stand for: the column of its letter, or else the row's choices, if they are a list."""
    columns = (letter, *(f"{name}{letter.lower()}" for name in _CHOICE_COLUMNS)) if letter else ()
    if of_letter := [fields[name] for name in columns if fields.get(name)]:
        return of_letter
    choices = fields.get("choices") or fields.get("options")
    if not isinstance(choices, str):
        return choices
    # Python's text of a list, as in MMMU's tables; else a cell of a CSV, in which a letter can only stand for a part.
    quoted = [word for _, word in _QUOTED.findall(choices)]
    return quoted or ([choices] if letter and choices.strip("[] ") else [])


def _refuse_lost_box(fields: Mapping[str, Any]) -> None:
    """Refuse a phrase or a question with a ``bbox``: whether it is corners or COCO's x, y, width, height is not said.

    Raises:
        Malformed: it has one, and no ``boxes``.
    """
    in_turns = any(fields.get(name) is not None for name in ("turns", *CONVERSATIONS))
    if not in_turns and not _is_empty(fields.get("bbox")) and _is_empty(fields.get("boxes")):
        raise Malformed(
            "the row has 'bbox' but no 'boxes': give its corners as 'boxes', [[x1, y1, x2, y2]] in pixels (COCO's bbox "
            "is x, y, width, height)"
        )


def _refuse_marks_of_objects(fields: Mapping[str, Any], draft: Draft) -> None:
    """Refuse words with ms-swift's marks ``<bbox>`` and ``<ref-object>``, which stand for entries of ``objects``.

    Raises:
        Malformed: there are both.
    """
    if _is_empty(fields.get("objects")):
        return
    words = " ".join(text for turn in draft.turns for text in (turn.question, *turn.answers))
    if mark := next((mark for mark in ("<bbox>", "<ref-object>") if mark in words), None):
        raise Malformed(
            f"{mark} stands for an entry of 'objects': write a row for each box, its phrase as 'answer' and its "
            "corners as 'boxes', [[x1, y1, x2, y2]] in pixels"
        )


def _with_system(draft: Draft, system: Any) -> Draft:
    """ShareGPT's ``system`` beside a conversation: before the first question, as a system message in it would be.

    Raises:
        Malformed: it is no text.
    """
    if isinstance(system, Mapping):
        system = system.get("value", system.get("content"))
    if not system or not draft.turns or not draft.turns[0].question:  # a caption has no question
        return draft
    if not isinstance(system, str):
        raise Malformed(f"system is no text but {type(system).__name__}")
    first, *rest = draft.turns
    if first.question.startswith(system):  # a message of the conversation says the same
        return draft
    turns = (replace(first, question=f"{system}\n{first.question}"), *rest)
    return replace(draft, turns=turns, changes=tuple(sorted({*draft.changes, "system_message_joined"})))


def _marked(pairs: Sequence[tuple[str, tuple[str, ...]]], form: str) -> tuple[Draft, str, int]:
    turns, num_marks = [], 0
    for question, answers in pairs:
        text, marks = take_marks(question)
        num_marks += marks
        for answer in answers:
            refuse_marks_in_answer(answer)
        turns.append(Turn(text, answers))
    return Draft(tuple(turns)), form, num_marks


def _answers(fields: Mapping[str, Any]) -> tuple[str, ...]:
    return _texts_of(fields, "answer" if fields.get("answers") is None else "answers")


def _texts_of(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A text, or the list of those that would do: LAVIS has one in ``answer``, Flickr30k's copies in ``caption``."""
    texts = fields.get(name)
    if name != "answers" and not isinstance(texts, list | tuple):
        return (_text_of(fields, name),)
    # An object of lists, as `datasets` may store a list of objects, would give the names of its fields as answers.
    if isinstance(texts, list | tuple):
        words = [text.get("answer") if isinstance(text, Mapping) else text for text in texts]
        found = tuple(str(word) for word in words if type(word) in (str, int))
        if len(found) == len(words):
            return found
    raise Malformed(f"{name} is not a list of texts")


def _text_of(fields: Any, name: str) -> str:
    """A text, or a whole number in its digits, as a CSV has it. How 0.5 or true would be written is not known.

    Raises:
        Malformed: it is missing, or something else.
    """
    number = fields.get(name) if isinstance(fields, Mapping) else None
    return str(number) if type(number) is int else text_of(fields, name)


def _own_box(box: Any) -> tuple[float, float, float, float]:
    try:
        x1, y1, x2, y2 = (float(corner) for corner in box)
    except (TypeError, ValueError):
        raise Malformed(f"box {shorten(repr(box), 60)} is not x1, y1, x2, y2") from None
    return (x1, y1, x2, y2)


def _list_of(fields: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = fields.get(name)
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise Malformed(f"{name} is no list but {type(value).__name__}")
    return value


def _own_image(fields: Mapping[str, Any]) -> str | bytes | None:
    """The row's image: a name, or its bytes.

    Raises:
        Malformed: there are several, or it is neither.
    """
    for name in _IMAGE_FIELDS:
        if (given := fields.get(name)) is not None and (image := _one_image(_flat(given), name)) is not None:
            return image
    return None


def _one_image(images: Iterable[Any], field: str) -> str | bytes | None:
    found = [image for image in images if not _is_empty(image)]
    if len(found) > 1:
        raise Malformed(f"{field} holds {len(found)} images; a sample has one")
    return _image_of(found[0], field) if found else None


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        yield from value
    else:
        yield value


def _image_of(value: Any, field: str) -> str | bytes | None:
    """A name, bytes, or the struct of both that ``datasets`` writes."""
    name = ""
    if isinstance(value, Mapping):
        name, value = str(value.get("path") or value.get("url") or ""), value.get("bytes")
        value = value if value is not None else name or None
    if isinstance(value, bytes):
        check_image_name(name or f"in {field}", value)
        return value
    if value is None or isinstance(value, str):
        return value
    raise Malformed(f"{field} is no path but {type(value).__name__}")


def _refuse_lost_image(fields: Mapping[str, Any]) -> None:
    """Refuse a row that names an image which is not there to be read.

    Raises:
        Malformed: it does.
        Filtered: img2dataset could not download it.
    """
    if isinstance(fields.get("status"), str) and "url" in fields:
        if fields["status"] != "success":
            raise Filtered("not_downloaded", f"img2dataset: {fields.get('error_message') or fields['status']}")
        raise Malformed(
            "this table holds img2dataset's notes on its downloads, not the images: use source=webdataset with the "
            "tars or folders beside it"
        )
    for name, value in fields.items():
        if _is_empty(value) or not isinstance(name, str):
            continue
        if name in _LINK_FIELDS:
            raise Malformed(f"the row has a link in {name!r} but no image: download it, and name the file in 'image'")
        if _names_image(name) or (name not in _TEXT_FIELDS and isinstance(value, str) and _IMAGE_FILE.fullmatch(value)):
            raise Malformed(f"the row has {shorten(repr(name))} but no 'image': name the image's file in 'image'")


def _names_image(name: str) -> bool:
    """Whether a word of a field's name says so: ``image_id``, ``imageId``, ``IMAGE-URL``, ``imgname``."""
    return any(_IMAGE_WORD.fullmatch(word.lower()) for word in _WORD.findall(name))


def _is_empty(value: Any) -> bool:
    """Whether a field says nothing: also ``{"bytes": null, "path": ""}``, which tables have for no image. An image of
    no bytes is a damaged one."""
    if isinstance(value, bytes):
        return False
    if isinstance(value, str):
        return not value.strip()
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else None
    return not value if parts is None else all(_is_empty(part) for part in parts)


def read_own_row(unit: SourceUnit, fields: Any) -> Iterator[Draft]:
    """The drafts of a row, as ``read_drafts`` asks for them.

    Raises:
        Malformed: see ``own_draft``.
        Filtered: the same, or the row's field ``split`` says that it is of another split than the wanted one.
    """
    split, wanted = fields.get("split") if isinstance(fields, Mapping) else None, unit.source.split
    if isinstance(split, str) and not _is_wanted(split.strip(), wanted):
        raise Filtered("split", f"the row's split {shorten(split, 40)!r} is not split={wanted}")
    yield own_draft(fields, unit.source.task)


def _is_wanted(split: str, wanted: str) -> bool:
    if not split or not wanted:
        return True
    return not _HELD_OUT.match(split) if wanted == "train" else split.lower() == wanted.lower()
