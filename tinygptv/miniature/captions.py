"""Descriptions of a scene: web captions, detailed ones, grounded ones, and phrases with their boxes.

Every function takes a scene and a generator and says only what is so. Captions of sources whose text the release cleans
(lower case, no full stops) are written so that cleaning changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinygptv.miniature.scenes import Scene, SceneObject, pick
from tinygptv.miniature.words import (
    ATTRIBUTES,
    NUMBERS,
    RELATION_WORDS,
    alike,
    article,
    box_text,
    full_name,
    name_of,
    place_of,
    plural,
    relation_between,
)

_BEFORE = ("", "", "", "picture of ", "photo of ", "a picture of ", "the image shows ")
_AFTER = ("", "", "", "", " on a light background")


def short_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One clause as a person would write it: two objects and how they stand, or one and its position.

    Returns:
        E.g. ``a small red striped circle to the left of a large blue square``.
    """
    items = _shuffled(scene.objects, rng)
    if len(items) == 1:
        return f"{_name(items[0], rng)} {place_of(items[0])}"
    first, second = items[:2]
    return f"{_name(first, rng)} {_relation(first, second, rng)} {_name(second, rng)}"


def web_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption as the web has them: often partial, sometimes an enumeration, sometimes a count, in alt-text style."""
    items = _shuffled(scene.objects, rng)
    style = rng.random()
    if style < 0.55 or len(items) == 1:
        text = short_caption(scene, rng)
    elif style < 0.8:
        text = _enumerate([_name(item, rng) for item in items])
    else:
        text = _counted(items, pick(rng, ("shape", "colour")))
    return pick(rng, _BEFORE) + text + pick(rng, _AFTER)


def detailed_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Two to four sentences that name every object, with its position or its relation to another."""
    items = _shuffled(scene.objects, rng)
    return " ".join(sentence + "." for sentence in [_opening(items, rng), *_sentences(items, rng)])


def grounded_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption in which every object is a phrase with its box, read from left to right.

    Returns:
        ``<p>a small red circle</p> {<..>} is left of <p>a large blue square</p> {<..>}.``; objects that look alike
        share a phrase: ``<p>two small red plain circles</p> {<..>}<delim>{<..>}``.
    """
    groups = _groups_alike(_left_to_right(scene.objects))
    phrases = [_grounded_group(scene, group) for group in groups]
    parts = []
    for start in range(0, len(groups) - 1, 2):
        first, second = groups[start], groups[start + 1]
        if len(first) == len(second) == 1:
            joint = f"is {pick(rng, RELATION_WORDS[relation_between(first[0], second[0])])}"
        else:
            joint = "and"
        parts.append(f"{phrases[start]} {joint} {phrases[start + 1]}")
    if len(groups) % 2:
        parts.append(phrases[-1])
    return " , ".join(parts) + "."


def phrase_boxes(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A phrase and the boxes of everything it fits (``flickr_ObjectToPhrase``).

    Returns:
        The phrase ("red circles", "a small star"), and its boxes from left to right, joined by ``<delim>``.
    """
    item = pick(rng, scene.objects)
    attributes = [a for a in ATTRIBUTES if rng.random() < (0.35 if a != "shape" else 0.8)]
    found = _left_to_right([scene.objects[i] for i in alike(scene.objects, item, attributes)])
    name = name_of(item, attributes)
    return (article(name) if len(found) == 1 else plural(name)), _boxes(scene, found)


def caption_phrases(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A caption, and its phrases with their boxes (``flickr_CaptionToPhrase``).

    Returns:
        ``a red circle left of a blue square`` and ``<p>a red circle</p> {<..>} <p>a blue square</p> {<..>}``.
    """
    items = _shuffled(scene.objects, rng)[:2]
    names = [article(full_name(item)) for item in items]
    caption = f"{names[0]} {_relation(items[0], items[1], rng)} {names[1]}" if len(items) == 2 else names[0]
    phrases = [f"<p>{name}</p> {box_text(scene, item)}" for name, item in zip(names, items, strict=True)]
    return caption, " ".join(phrases)


def _shuffled(objects: Sequence[SceneObject], rng: np.random.Generator) -> list[SceneObject]:
    return [objects[int(i)] for i in rng.permutation(len(objects))]


def _left_to_right(objects: Sequence[SceneObject]) -> list[SceneObject]:
    return sorted(objects, key=lambda item: item.centre)


def _name(item: SceneObject, rng: np.random.Generator) -> str:
    """Indefinite name: colour and shape always, size and texture mostly."""
    dropped = {a for a in ("size", "texture") if rng.random() < 0.3}
    if item.texture == "plain":
        dropped.add("texture")
    return article(name_of(item, [a for a in ATTRIBUTES if a not in dropped]))


def _relation(a: SceneObject, b: SceneObject, rng: np.random.Generator) -> str:
    return pick(rng, RELATION_WORDS[relation_between(a, b)])


def _enumerate(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _counted(items: Sequence[SceneObject], attribute: str) -> str:
    """``two circles and one star``, ``three red objects and one blue object``."""
    names = [name_of(item, [attribute]) for item in items]
    counts = {name: names.count(name) for name in names}
    return _enumerate([_quantity(name, count) for name, count in counts.items()])


def _quantity(name: str, count: int) -> str:
    return f"{NUMBERS[count]} {name if count == 1 else plural(name)}"


def _opening(items: Sequence[SceneObject], rng: np.random.Generator) -> str:
    style = rng.integers(3)
    if style == 0:
        return f"the image shows {_quantity('object', len(items))}"
    verb = "are" if len(items) > 1 else "is"
    if style == 1:
        return f"there {verb} {_quantity('object', len(items))} on a light background"
    return f"in the picture {_verb_of_counts(items)} {_counted(items, 'shape')}"


def _verb_of_counts(items: Sequence[SceneObject]) -> str:
    """The verb that agrees with the first counted shape."""
    return "there are" if sum(item.shape == items[0].shape for item in items) > 1 else "there is"


def _sentences(items: Sequence[SceneObject], rng: np.random.Generator) -> list[str]:
    """Pairs with their relation; what is left over with its position."""
    names = [article(full_name(item)) for item in items]
    sentences = [
        f"{names[i]} is {_relation(items[i], items[i + 1], rng)} {names[i + 1]}" for i in range(0, len(items) - 1, 2)
    ]
    if len(items) % 2:
        sentences.append(f"there is {'also ' if sentences else ''}{names[-1]} {place_of(items[-1])}")
    return sentences


def _groups_alike(items: Sequence[SceneObject]) -> list[list[SceneObject]]:
    groups: dict[tuple[str, ...], list[SceneObject]] = {}
    for item in items:
        groups.setdefault(item.attributes, []).append(item)
    return list(groups.values())


def _grounded_group(scene: Scene, group: Sequence[SceneObject]) -> str:
    # A count must be exact, so "two red stars" says "plain" where they are.
    phrase = article(full_name(group[0])) if len(group) == 1 else _quantity(name_of(group[0]), len(group))
    return f"<p>{phrase}</p> {_boxes(scene, group)}"


def _boxes(scene: Scene, items: Sequence[SceneObject]) -> str:
    return "<delim>".join(box_text(scene, item) for item in items)
