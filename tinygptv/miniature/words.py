"""The words of the drawn world: a closed, lower-case vocabulary, names of objects, and where they stand to each other.

A *name* is an object's noun with some of its attributes ("small red striped circle", "red object"). Relations have a
margin: what is neither clearly true nor clearly false is ``None``, and nobody speaks of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from tinygptv.data.boxes import format_box
from tinygptv.miniature.scenes import COLOURS, HELD_OUT, SIZES, TEXTURES, Scene, SceneObject
from tinygptv.miniature.shapes import SHAPES

Style = Literal["usual", "unseen"]
"""``unseen`` phrasings are used in the split ``wording`` and nowhere else."""
Direction = Literal["left", "right", "above", "below"]

ATTRIBUTES = ("size", "colour", "texture", "shape")
"""In the order in which a name says them."""
VALUES: dict[str, tuple[str, ...]] = {
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "shape": SHAPES,
}
WORD_OF = {"size": "size", "colour": "color", "texture": "texture", "shape": "shape"}
"""Names of attributes in questions: the real data sets spell American English."""

DIRECTIONS: tuple[Direction, ...] = ("left", "right", "above", "below")
RELATION_WORDS: dict[Direction, tuple[str, ...]] = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below",),
}
ONE_OF_TWO: dict[Direction, str] = {"left": "left", "right": "right", "above": "upper", "below": "lower"}
"""The one of two objects that lies there, and the half of the image."""
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")

MARGIN = 0.1
"""Smallest distance of two centres along an axis, as a share of the image's side, that a relation speaks of."""
_LOW, _HIGH = 0.42, 0.58
"""Centres below / above these are clearly on one side of the image."""

_FUNCTION_WORDS = (
    "a above also an and answer any are as at background below bottom bottommost color count describe detail do "
    "does fewer first five four half have how if image in is it its larger last left leftmost light lower many me "
    "middle minus more most no number object objects of on one only opposite or order photo picture please plus "
    "reverse right rightmost same say scene second see shape show shows six size smaller so sort tell texture "
    "than that the there these third this three times to top topmost two upper what where which with without word "
    "words write yes you"
)


def article(name: str) -> str:
    """``name`` with its indefinite article."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def plural(name: str) -> str:
    """The plural of a name: its last word, the noun, changes."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


VOCABULARY = frozenset(
    [
        *_FUNCTION_WORDS.split(),
        *(word for words in VALUES.values() for word in words),
        *(plural(shape) for shape in SHAPES),
    ]
)
"""Every word that the miniature says; numbers, box text and the wordings of ``prompts.INSTRUCTIONS`` come on top."""


def name_of(item: SceneObject, attributes: Collection[str] = ATTRIBUTES) -> str:
    """Noun with the given attributes; without ``shape`` it is an ``object``."""
    return name_from({attribute: getattr(item, attribute) for attribute in attributes})


def name_from(values: dict[str, str]) -> str:
    """Noun with the given attribute values, e.g. {"colour": "red", "shape": "circle"} -> ``red circle``."""
    adjectives = [values[attribute] for attribute in ATTRIBUTES if attribute in values and attribute != "shape"]
    return " ".join([*adjectives, values.get("shape", "object")])


def full_name(item: SceneObject) -> str:
    """All that a person would mention: every attribute but a plain texture."""
    return name_of(item, [a for a in ATTRIBUTES if a != "texture" or item.texture != "plain"])


def alike(objects: Sequence[SceneObject], item: SceneObject, attributes: Collection[str]) -> list[int]:
    """Indices of the objects that agree with ``item`` in the given attributes; ``item`` itself is among them."""
    wanted = [(attribute, getattr(item, attribute)) for attribute in attributes]
    return [i for i, other in enumerate(objects) if all(getattr(other, a) == value for a, value in wanted)]


def count_of(objects: Sequence[SceneObject], values: dict[str, str]) -> int:
    """Number of objects with the given attribute values."""
    return sum(all(getattr(item, a) == value for a, value in values.items()) for item in objects)


def value_counts(objects: Sequence[SceneObject], attribute: str) -> dict[str, int]:
    """Number of objects with each value of an attribute that occurs, by value."""
    present = sorted({getattr(item, attribute) for item in objects})
    return {value: count_of(objects, {attribute: value}) for value in present}


def is_held_out(values: dict[str, str], split: str) -> bool:
    """Whether these values name a colour and shape that ``split`` must not speak of."""
    return split != "combination" and (values.get("colour"), values.get("shape")) in HELD_OUT


def holds(a: SceneObject, b: SceneObject, direction: Direction) -> bool | None:
    """Whether ``a`` is on that side of ``b``: True, False, or None where it is too close to call."""
    (ax, ay), (bx, by) = a.centre, b.centre
    lead = {"left": bx - ax, "right": ax - bx, "above": by - ay, "below": ay - by}[direction]
    return None if abs(lead) < MARGIN else lead > 0


def relation_between(a: SceneObject, b: SceneObject) -> Direction:
    """The direction in which ``a`` stands to ``b`` along the axis that separates them most; always a clear one.

    Boxes of one scene never touch, so at least one axis separates any two centres by more than the margin.
    """
    (ax, ay), (bx, by) = a.centre, b.centre
    if abs(bx - ax) >= abs(by - ay):
        return "left" if ax < bx else "right"
    return "above" if ay < by else "below"


def only_one(objects: Sequence[SceneObject], landmark: int, direction: Direction) -> int | None:
    """The one object that is clearly on that side of the landmark; None where there is none, a second or a doubt."""
    states = [(i, holds(item, objects[landmark], direction)) for i, item in enumerate(objects) if i != landmark]
    found = [i for i, state in states if state]
    return found[0] if len(found) == 1 and all(state is not None for _, state in states) else None


def on_side(item: SceneObject, direction: Direction) -> bool | None:
    """Whether the object is in that half of the image; None near the middle."""
    x, y = item.centre
    along = x if direction in ("left", "right") else y
    if _LOW <= along <= _HIGH:
        return None
    return (along < _LOW) == (direction in ("left", "above"))


def place_of(item: SceneObject) -> str:
    """Where in the image an object is, e.g. ``at the top left``; every object has one."""
    horizontal = "left" if on_side(item, "left") else "right" if on_side(item, "right") else ""
    vertical = "top" if on_side(item, "above") else "bottom" if on_side(item, "below") else ""
    if vertical:
        return f"at the {vertical} {horizontal}".rstrip()
    return f"on the {horizontal}" if horizontal else "in the middle"


def box_text(scene: Scene, item: SceneObject) -> str:
    """The object's box as the model reads and writes it."""
    return format_box(scene.pixel_box(item), scene.width, scene.height)


def list_scene(scene: Scene, order: Sequence[int] | None = None) -> str:
    """The whole scene as text, exactly: every object with all attributes and its box.

    Args:
        scene: any scene.
        order: indices of the objects; None keeps the scene's order.

    Returns:
        ``scene : small red striped circle {<..>} ; large blue plain square {<..>}``.
    """
    items = [scene.objects[i] for i in (order if order is not None else range(len(scene.objects)))]
    return "scene : " + " ; ".join(f"{name_of(item)} {box_text(scene, item)}" for item in items)
