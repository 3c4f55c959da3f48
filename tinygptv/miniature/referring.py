"""Referring expressions: names that fit exactly one object of a scene.

Attributes where they are enough; otherwise the side of the image, the order of two, the outermost one, or the relation
to a landmark. Expressions come without an article ("left one of the two red circles"). ``meaning.find`` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from tinygptv.miniature.scenes import SceneObject, pick
from tinygptv.miniature.words import (
    ATTRIBUTES,
    DIRECTIONS,
    ONE_OF_TWO,
    RELATION_WORDS,
    Direction,
    Style,
    alike,
    holds,
    name_of,
    on_side,
    plural,
)

KINDS = ("attribute", "side", "pair", "extreme", "relation")
_KIND_WEIGHTS = {"attribute": 8.0, "side": 1.5, "pair": 3.0, "extreme": 1.5, "relation": 2.5}
_LENGTH_WEIGHTS = (0.3, 1.5, 3.0, 1.0, 0.25)
"""Weight of a name by its number of attributes: two are what people say most."""
_RARELY = {"shape": 0.35, "colour": 0.6}
"""Factor by which a name without this attribute is less likely."""
_SUBSETS = tuple(subset for size in range(5) for subset in combinations(ATTRIBUTES, size))

_NAME_WEIGHTS = {
    subset: _LENGTH_WEIGHTS[len(subset)] * math.prod(w for a, w in _RARELY.items() if a not in subset)
    for subset in _SUBSETS
}

_SIDE = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}
_SIDE_UNSEEN = {direction: f"in the {word} half" for direction, word in ONE_OF_TWO.items()}
_EXTREME = {
    "left": ("leftmost", "left"),
    "right": ("rightmost", "right"),
    "above": ("topmost", "top"),
    "below": ("bottommost", "bottom"),
}
_WITH = {"left": "to its right", "right": "to its left", "above": "below it", "below": "above it"}


@dataclass(frozen=True)
class Expression:
    """Words that fit one object, and which of ``KINDS`` they are."""

    text: str
    kind: str


def expressions(
    objects: Sequence[SceneObject],
    index: int,
    rng: np.random.Generator,
    *,
    hide: Collection[str] = (),
    kinds: Collection[str] = KINDS,
    style: Style = "usual",
) -> Iterator[Expression]:
    """Different expressions for one object, in random order, likelier ones first.

    Args:
        objects: the scene's objects.
        index: which of them is meant.
        rng: source of all choices.
        hide: attributes that must not be mentioned, because a question asks for them.
        kinds: which of ``KINDS`` may be used.
        style: phrasings to use.

    Yields:
        Expressions that fit object ``index`` and no other.
    """
    subsets = [subset for subset in _SUBSETS if not set(subset) & set(hide)]
    plan = [(kind, subset) for kind in KINDS if kind in kinds for subset in subsets]
    weights = [_KIND_WEIGHTS[kind] * _NAME_WEIGHTS[subset] for kind, subset in plan]
    seen: set[str] = set()
    for position in np.argsort(rng.exponential(size=len(plan)) / weights):
        kind, subset = plan[position]
        text = _BUILDERS[kind](_Meant(objects, index, subset), rng, style)
        if text and text not in seen:
            seen.add(text)
            yield Expression(text, kind)


def refer_to(
    objects: Sequence[SceneObject],
    index: int,
    rng: np.random.Generator,
    *,
    hide: Collection[str] = (),
    kinds: Collection[str] = KINDS,
    style: Style = "usual",
) -> str | None:
    """One expression for an object; None where nothing of the allowed kinds tells it apart."""
    found = next(expressions(objects, index, rng, hide=hide, kinds=kinds, style=style), None)
    return found.text if found else None


class _Meant:
    """Subject of an expression: an object, the attributes that its name says, and who else the name fits."""

    def __init__(self, objects: Sequence[SceneObject], index: int, subset: tuple[str, ...]) -> None:
        self.objects = objects
        self.index = index
        self.item = objects[index]
        self.subset = subset
        self.name = name_of(self.item, subset)
        self.rivals = [i for i in alike(objects, self.item, subset) if i != index]

    def clear_directions(self, landmark: int | None = None) -> list[Direction]:
        """Where the object lies clearly beyond every rival; with a landmark: beyond it, and no rival does."""
        if landmark is None:
            return [d for d in DIRECTIONS if all(holds(self.item, self.objects[rival], d) for rival in self.rivals)]
        mark = self.objects[landmark]
        others = [self.objects[rival] for rival in self.rivals if rival != landmark]
        beyond = [d for d in DIRECTIONS if holds(self.item, mark, d)]
        return [d for d in beyond if all(holds(other, mark, d) is False for other in others)]


def _attribute(meant: _Meant, rng: np.random.Generator, style: Style) -> str | None:
    if meant.rivals:
        return None
    adjectives = [getattr(meant.item, attribute) for attribute in meant.subset if attribute != "shape"]
    if style == "usual" or not adjectives:
        return meant.name
    noun = meant.item.shape if "shape" in meant.subset else "object"
    return f"{noun} that is {' and '.join(adjectives)}"


def _side(meant: _Meant, rng: np.random.Generator, style: Style) -> str | None:
    rivals = [meant.objects[rival] for rival in meant.rivals]
    found = [d for d in DIRECTIONS if on_side(meant.item, d) and all(on_side(rival, d) is False for rival in rivals)]
    if not rivals or not found:
        return None
    return f"{meant.name} {(_SIDE if style == 'usual' else _SIDE_UNSEEN)[pick(rng, found)]}"


def _pair(meant: _Meant, rng: np.random.Generator, style: Style) -> str | None:
    if len(meant.rivals) != 1:
        return None
    one = ONE_OF_TWO[pick(rng, meant.clear_directions())]
    if style == "usual":
        return f"{one} one of the two {plural(meant.name)}"
    return f"one of the two {plural(meant.name)} that is the {one} one"


def _extreme(meant: _Meant, rng: np.random.Generator, style: Style) -> str | None:
    found = meant.clear_directions()
    if not meant.rivals or not found:
        return None
    words = _EXTREME[pick(rng, found)]
    return f"{pick(rng, words)} {meant.name}" if style == "usual" else f"{meant.name} that is most to the {words[1]}"


def _relation(meant: _Meant, rng: np.random.Generator, style: Style) -> str | None:
    """On one side of a landmark that has a name of its own, where no rival is on that side too."""
    if not meant.rivals or len(meant.subset) > 2:
        return None
    landmarks = [i for i in range(len(meant.objects)) if i != meant.index]
    found = [(i, d) for i in landmarks for d in meant.clear_directions(i)]
    if not found:
        return None
    landmark, direction = pick(rng, found)
    text = refer_to(meant.objects, landmark, rng, kinds=("attribute",))
    if text is None:
        return None
    if style == "usual":
        return f"{meant.name} {pick(rng, RELATION_WORDS[direction])} the {text}"
    return f"{meant.name} with the {text} {_WITH[direction]}"


_BUILDERS = {"attribute": _attribute, "side": _side, "pair": _pair, "extreme": _extreme, "relation": _relation}
