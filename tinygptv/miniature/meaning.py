"""Reads the miniature's sentences back: what a phrase means, what a question's answer is, what a caption claims.

This is the checker of everything the other modules say, and the scorer of what a model says. It shares no template and
no geometry with them: patterns are written independently, and relations compare centres without the speakers' margins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinygptv.data.boxes import strip_boxes
from tinygptv.miniature.scenes import COLOURS, SIZES, TEXTURES, SceneObject
from tinygptv.miniature.shapes import SHAPES

Objects = Sequence[SceneObject]

_PROPERTY = {"color": "colour", "colour": "colour", "shape": "shape", "size": "size", "texture": "texture"}
_ADJECTIVES = (
    {word: "size" for word in SIZES} | {word: "colour" for word in COLOURS} | {word: "texture" for word in TEXTURES}
)
_NOUNS: dict[str, str | None] = {"object": None, "objects": None}
for _shape in SHAPES:
    _NOUNS |= {_shape: _shape, _shape + "s": _shape, _shape + "es": _shape}

_COUNTS = {word: n for n, word in enumerate(("zero", "one", "two", "three", "four", "five", "six"))}
_RELATION = r"(?:to the )?left of|(?:to the )?right of|above|below"
_SIDE = (
    r"on the (?:left|right)|at the (?:top|bottom)(?: left| right)?|in the (?:(?:left|right|upper|lower) half|middle)"
)
_EXTREME = r"leftmost|rightmost|topmost|bottommost|left|right|top|bottom|upper|lower"


class NotUnderstood(ValueError):
    """The text is no sentence of the miniature's language."""


def find(objects: Objects, phrase: str) -> list[int]:
    """The objects that a phrase means.

    Args:
        objects: what is in the scene.
        phrase: e.g. ``the left one of the two red circles``, with or without an article, singular or plural.

    Returns:
        Indices, in the scene's order. An expression is unambiguous where there is exactly one.

    Raises:
        NotUnderstood: the phrase is not of the miniature's language.
    """
    text = re.sub(r"^(?:the|an|a) ", "", phrase.strip().lower().rstrip(".?"))
    for pattern, read in _PHRASES:
        if match := re.fullmatch(pattern, text):
            return read(objects, *match.groups())
    return [i for i, item in enumerate(objects) if _fits(item, _description(text))]


def answer(objects: Objects, question: str) -> str:
    """The true answer to a question.

    Args:
        objects: what is in the scene.
        question: of any kind that the miniature asks, in any of its wordings.

    Returns:
        One word or number.

    Raises:
        NotUnderstood: the question is not of the miniature's language, or has no single answer in this scene.
    """
    text = question.strip().lower().rstrip("?. ")
    for pattern, read in _QUESTIONS:
        if match := re.fullmatch(pattern, text):
            return read(objects, *match.groups())
    raise NotUnderstood(f"no question of the miniature: {question!r}")


@dataclass(frozen=True)
class Claims:
    """Claims of a caption.

    Attributes:
        mentions: phrases for objects ("a red circle", "two stars").
        mentions_right: how many of them fit as many objects as they say.
        relations: (phrase, relation, phrase).
        relations_right: how many hold between two objects that the phrases fit.
    """

    mentions: tuple[str, ...]
    mentions_right: int
    relations: tuple[tuple[str, str, str], ...]
    relations_right: int

    @property
    def all_right(self) -> bool:
        """Something is said and nothing of it is wrong."""
        return 0 < len(self.mentions) == self.mentions_right and len(self.relations) == self.relations_right


def check_caption(objects: Objects, caption: str) -> Claims:
    """Look every claim of a caption up in the scene; boxes and phrase marks are ignored."""
    text = strip_boxes(caption.lower())
    phrase = (
        rf"(?:an?|{'|'.join(_COUNTS)}) (?:(?:{'|'.join(_ADJECTIVES)}) )*(?:{'|'.join(sorted(_NOUNS, reverse=True))})\b"
    )
    mentions = tuple(match[0] for match in re.finditer(rf"\b{phrase}", text))
    related = re.finditer(rf"\b(?=({phrase})(?: is)? ({_RELATION}) ({phrase}))", text)
    placed = re.finditer(rf"\b({phrase})(?: is)? ({_SIDE})\b", text)
    relations = tuple((m[1], m[2], m[3]) for m in related) + tuple((m[1], m[2], "") for m in placed)
    right = sum(_relation_holds(objects, *relation) for relation in relations)
    return Claims(mentions, sum(_mention_fits(objects, m) for m in mentions), relations, right)


def _description(text: str) -> dict[str, str]:
    """``small red circle`` or ``circle that is small and red`` as attribute values."""
    if match := re.fullmatch(r"(\w+) that is (.+)", text):
        text = f"{match[2].replace(' and ', ' ')} {match[1]}"
    *adjectives, noun = text.split() or [""]
    unknown = [word for word in adjectives if word not in _ADJECTIVES] + ([] if noun in _NOUNS else [noun])
    if unknown:
        raise NotUnderstood(f"{text!r} holds {unknown[0]!r}, which names nothing in the miniature")
    values = {_ADJECTIVES[word]: word for word in adjectives}
    shape = _NOUNS[noun]
    return {**values, "shape": shape} if shape else values


def _fits(item: SceneObject, values: dict[str, str]) -> bool:
    return all(getattr(item, name) == value for name, value in values.items())


def _middle(item: SceneObject) -> tuple[float, float]:
    x1, y1, x2, y2 = item.box
    return (x1 + x2) / 2, (y1 + y2) / 2


def _two(objects: Objects, phrase: str) -> list[int]:
    found = find(objects, phrase)
    return found if len(found) == 2 else []


def _outermost(objects: Objects, among: list[int], word: str) -> list[int]:
    horizontal = word.startswith(("left", "right"))
    sign = 1 if word in ("left", "leftmost", "top", "topmost", "upper") else -1
    return sorted(among, key=lambda i: sign * _middle(objects[i])[0 if horizontal else 1])[:1]


def _opposite(words: str) -> str:
    return {"to its left": "right of", "to its right": "left of", "above it": "below", "below it": "above"}[words]


def _stands(a: SceneObject, b: SceneObject, relation: str) -> bool:
    (ax, ay), (bx, by) = _middle(a), _middle(b)
    if "left" in relation:
        return ax < bx
    if "right" in relation:
        return ax > bx
    return ay < by if relation == "above" else ay > by


def _beyond(objects: Objects, name: str, relation: str, landmark: str) -> list[int]:
    marks = find(objects, landmark)
    if len(marks) != 1:
        return []
    return [i for i in find(objects, name) if i != marks[0] and _stands(objects[i], objects[marks[0]], relation)]


def _is_at(item: SceneObject, words: str) -> bool:
    x, y = _middle(item)
    if "middle" in words:
        return 0.25 < x < 0.75 and 0.25 < y < 0.75
    sides = {"left": x < 0.5, "right": x > 0.5, "top": y < 0.5, "upper": y < 0.5, "bottom": y > 0.5, "lower": y > 0.5}
    return all(sides[word] for word in words.split() if word in sides)


def _mention_fits(objects: Objects, mention: str) -> bool:
    number, rest = mention.split(" ", 1)
    found = sum(_fits(item, _description(rest)) for item in objects)
    return found >= 1 if number in ("a", "an") else found == _COUNTS[number]


def _relation_holds(objects: Objects, first: str, relation: str, second: str) -> bool:
    a, b = find(objects, first), find(objects, second) if second else []
    if not second:
        return any(_is_at(objects[i], relation) for i in a)
    return any(_stands(objects[i], objects[j], relation) for i in a for j in b if i != j)


_PHRASES: tuple[tuple[str, Callable[..., list[int]]], ...] = (
    (r"(\w+) one of the two (.+)", lambda objects, word, name: _outermost(objects, _two(objects, name), word)),
    (
        r"one of the two (.+) that is the (\w+) one",
        lambda objects, name, word: _outermost(objects, _two(objects, name), word),
    ),
    (r"(.+) that is most to the (\w+)", lambda objects, name, word: _outermost(objects, find(objects, name), word)),
    (
        r"(.+?) with the (.+) (to its left|to its right|above it|below it)",
        lambda objects, name, mark, words: _beyond(objects, name, _opposite(words), mark),
    ),
    (rf"(.+?) ({_RELATION}) ((?:the|a|an) .+)", _beyond),
    (rf"(.+) ({_SIDE})", lambda objects, name, words: [i for i in find(objects, name) if _is_at(objects[i], words)]),
    (rf"({_EXTREME}) (.+)", lambda objects, word, name: _outermost(objects, find(objects, name), word)),
)


def _single(objects: Objects, phrase: str) -> SceneObject:
    found = find(objects, phrase)
    if len(found) != 1:
        raise NotUnderstood(f"{phrase!r} means {len(found)} objects of this scene, not one")
    return objects[found[0]]


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _attribute(objects: Objects, word: str, phrase: str) -> str:
    return str(getattr(_single(objects, phrase), _PROPERTY[word]))


def _shape_beyond(objects: Objects, relation: str, landmark: str) -> str:
    return _single(objects, f"object {relation} {landmark}").shape


def _attribute_beyond(objects: Objects, relation: str, landmark: str, word: str) -> str:
    return _attribute(objects, word, f"object {relation} {landmark}")


def _compare_size(objects: Objects, first: str, word: str, second: str) -> str:
    order = ("small", "large")
    a, b = (order.index(_single(objects, phrase).size) for phrase in (first, second))
    return _yes(a > b if word == "larger" else a < b)


def _same(objects: Objects, first: str, second: str, word: str) -> str:
    a, b = (getattr(_single(objects, phrase), _PROPERTY[word]) for phrase in (first, second))
    return _yes(a == b)


def _compare_counts(objects: Objects, word: str, first: str, second: str) -> str:
    a, b = len(find(objects, first)), len(find(objects, second))
    return _yes(a > b if word == "more" else a < b)


_W = r"(color|colour|shape|size|texture)"
_QUESTIONS: tuple[tuple[str, Callable[..., str]], ...] = (
    (rf"(?:what|which) {_W} (?:is|does) (.+?)(?: have)?", _attribute),
    (rf"what is the {_W} of (.+)", _attribute),
    (rf"tell me the {_W} of (.+)", _attribute),
    (rf"({_RELATION}) (the .+) you see an object of which {_W}", _attribute_beyond),
    (rf"(the .+) is of which {_W}", lambda objects, phrase, word: _attribute(objects, word, phrase)),
    (r"is (the .+) small or large", lambda objects, phrase: _attribute(objects, "size", phrase)),
    (r"is (the .+) plain, striped or dotted", lambda objects, phrase: _attribute(objects, "texture", phrase)),
    (r"how many (.+?) (?:are there|are in the image|do you see)", lambda objects, p: str(len(find(objects, p)))),
    (r"(?:what is the number of|count the) (.+)", lambda objects, phrase: str(len(find(objects, phrase)))),
    (rf"what is ({_RELATION}) (the .+)", _shape_beyond),
    (r"(?:are there|do you see) (more|fewer) (.+) than (.+)", _compare_counts),
    (r"(?:is|do you see that) (the .+?)(?: is)? (larger|smaller) than (the .+)", _compare_size),
    (rf"(?:is|do) (the .+) the same {_W} as (the .+)", lambda objects, a, word, b: _same(objects, a, b, word)),
    (rf"(?:do|are) (the .+) and (the .+) (?:have|of) the same {_W}", _same),
    (
        rf"(?:is|do you see|tell me if) (the .+?)(?: is)? ({_RELATION}) (the .+)",
        lambda objects, a, relation, b: _yes(_stands(_single(objects, a), _single(objects, b), relation)),
    ),
    (
        r"(?:(?:is|are|tell me if) there(?: are)?|does the image show|do you see) (?:any )?(.+?)(?: in the picture)?",
        lambda objects, phrase: _yes(bool(find(objects, phrase))),
    ),
)
