"""Questions about a scene with their one true short answer.

Each kind balances its answers: which answer to ask for is decided first, then a question with that answer is looked
for; and where a scene has only one of two opposite answers, nothing is asked. So the words of a question say little
about its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinygptv.miniature.referring import refer_to
from tinygptv.miniature.scenes import Scene, SceneObject, pick
from tinygptv.miniature.words import (
    ATTRIBUTES,
    DIRECTIONS,
    RELATION_WORDS,
    VALUES,
    WORD_OF,
    Direction,
    Style,
    article,
    count_of,
    holds,
    is_held_out,
    name_from,
    only_one,
    plural,
    value_counts,
)

KINDS = ("colour", "shape", "size", "texture", "count", "existence", "relation", "comparison")

ATTRIBUTE_WORDINGS: dict[Style, dict[str, tuple[str, ...]]] = {
    "usual": {
        "colour": ("what color is the {x}?", "what is the color of the {x}?", "which color does the {x} have?"),
        "shape": ("what shape is the {x}?", "what is the shape of the {x}?", "which shape does the {x} have?"),
        "size": ("what size is the {x}?", "what is the size of the {x}?", "is the {x} small or large?"),
        "texture": (
            "what texture does the {x} have?",
            "what is the texture of the {x}?",
            "is the {x} plain, striped or dotted?",
        ),
    },
    "unseen": {
        kind: (f"tell me the {WORD_OF[kind]} of the {{x}}", f"the {{x}} is of which {WORD_OF[kind]}?")
        for kind in VALUES
    },
}
COUNT_WORDINGS: dict[Style, tuple[str, ...]] = {
    "usual": ("how many {xs} are there?", "how many {xs} are in the image?", "what is the number of {xs}?"),
    "unseen": ("count the {xs}", "how many {xs} do you see?"),
}
EXISTENCE_WORDINGS: dict[Style, tuple[str, ...]] = {
    "usual": ("is there {a_x}?", "are there any {xs}?", "does the image show {a_x}?"),
    "unseen": ("do you see {a_x}?", "tell me if there are {xs} in the picture"),
}
RELATION_WORDINGS: dict[Style, tuple[str, ...]] = {
    "usual": ("is the {x} {relation} the {y}?",),
    "unseen": ("do you see the {x} {relation} the {y}?", "tell me if the {x} is {relation} the {y}"),
}
WHAT_IS_WORDINGS: dict[Style, dict[str, tuple[str, ...]]] = {
    "usual": {
        "shape": ("what is {relation} the {y}?", "what shape is the object {relation} the {y}?"),
        "colour": ("what color is the object {relation} the {y}?",),
    },
    "unseen": {
        "shape": ("{relation} the {y} you see an object of which shape?",),
        "colour": ("{relation} the {y} you see an object of which color?",),
    },
}
SIZE_WORDINGS: dict[Style, tuple[str, ...]] = {
    "usual": ("is the {x} {comparative} than the {y}?",),
    "unseen": ("do you see that the {x} is {comparative} than the {y}?",),
}
SAME_WORDINGS: dict[Style, tuple[str, ...]] = {
    "usual": ("is the {x} the same {word} as the {y}?", "do the {x} and the {y} have the same {word}?"),
    "unseen": ("are the {x} and the {y} of the same {word}?",),
}
MORE_WORDINGS: dict[Style, tuple[str, ...]] = {
    "usual": ("are there {comparative} {xs} than {ys}?",),
    "unseen": ("do you see {comparative} {xs} than {ys}?",),
}

_TRIES = 4
_COUNT_TARGETS = np.array([0.09, 0.09, 0.14, 0.26, 0.42])
"""Chance of asking for 0, 1, ... objects; high counts are rarer in the scenes, so they are asked for more often."""


@dataclass(frozen=True)
class Question:
    """A question, its answer and which of ``KINDS`` it is."""

    kind: str
    question: str
    answer: str


def ask(scene: Scene, rng: np.random.Generator, kind: str, style: Style = "usual") -> Question | None:
    """One question of a kind; None where a few draws find none in this scene."""
    for _ in range(_TRIES):
        found = _ask_attribute(scene, rng, kind, style) if kind in VALUES else _ASKERS[kind](scene, rng, style)
        if found:
            return found
    return None


def questions(
    scene: Scene, rng: np.random.Generator, count: int, kinds: Sequence[str] = KINDS, style: Style = "usual"
) -> list[Question]:
    """Up to ``count`` different questions, of as many kinds as possible.

    Args:
        scene: any scene.
        rng: source of all choices.
        count: most questions.
        kinds: which of ``KINDS`` to ask.
        style: phrasings to use.

    Returns:
        Questions of different kinds first; fewer than ``count`` where the scene has no more.
    """
    found: list[Question] = []
    seen: set[str] = set()
    for _ in range(2 + count // len(kinds)):
        for position in rng.permutation(len(kinds)):
            question = ask(scene, rng, kinds[position], style) if len(found) < count else None
            if question and question.question not in seen:
                seen.add(question.question)
                found.append(question)
    return found


def _ask_attribute(scene: Scene, rng: np.random.Generator, kind: str, style: Style) -> Question | None:
    index = int(rng.integers(len(scene.objects)))
    name = refer_to(scene.objects, index, rng, hide=(kind,), style=style if rng.random() < 0.5 else "usual")
    if name is None:
        return None
    wording = pick(rng, ATTRIBUTE_WORDINGS[style][kind])
    return Question(kind, wording.format(x=name), getattr(scene.objects[index], kind))


def _ask_count(scene: Scene, rng: np.random.Generator, style: Style) -> Question | None:
    targets = (
        np.append(_COUNT_TARGETS, [0.4, 0.5])[: len(scene.objects) + 1] if len(scene.objects) > 4 else _COUNT_TARGETS
    )
    target = int(rng.choice(len(targets), p=targets / targets.sum()))
    nouns = [values for values in _nouns(scene, rng) if count_of(scene.objects, values) == target]
    if not nouns:
        return None
    return Question(
        "count", pick(rng, COUNT_WORDINGS[style]).format(xs=plural(name_from(pick(rng, nouns)))), str(target)
    )


def _nouns(scene: Scene, rng: np.random.Generator) -> list[dict[str, str]]:
    """Groups that may be counted or looked for: all objects, those with one value, some with two; present or not."""
    nouns: list[dict[str, str]] = [{}]
    nouns += [{attribute: value} for attribute in ATTRIBUTES for value in VALUES[attribute]]
    for other in ("colour", "size", "texture"):
        nouns += [{other: pick(rng, VALUES[other]), "shape": pick(rng, scene.objects).shape} for _ in range(2)]
    return [values for values in nouns if not is_held_out(values, scene.split)]


_LOOKED_FOR = (
    ("colour", "shape"),
    ("colour", "shape"),
    ("shape",),
    ("colour",),
    ("texture", "shape"),
    ("size", "shape"),
)


def _ask_existence(scene: Scene, rng: np.random.Generator, style: Style) -> Question | None:
    attributes = pick(rng, _LOOKED_FOR)
    values = _present(scene, rng, attributes) if rng.random() < 0.5 else _absent(scene, rng, attributes)
    if values is None:
        return None
    name = name_from(values)
    wording = pick(rng, EXISTENCE_WORDINGS[style]).format(a_x=article(name), xs=plural(name))
    return Question("existence", wording, "yes" if count_of(scene.objects, values) else "no")


def _present(scene: Scene, rng: np.random.Generator, attributes: Sequence[str]) -> dict[str, str]:
    item = pick(rng, scene.objects)
    return {attribute: getattr(item, attribute) for attribute in attributes}


def _absent(scene: Scene, rng: np.random.Generator, attributes: Sequence[str]) -> dict[str, str] | None:
    """Values that no object has together; half of them mix two objects, so that single values do not give it away."""
    for attempt in range(12):
        mixed = attempt < 3 and len(attributes) == 2
        values = {a: getattr(pick(rng, scene.objects), a) if mixed else pick(rng, VALUES[a]) for a in attributes}
        if not count_of(scene.objects, values) and not is_held_out(values, scene.split):
            return values
    return None


def _ask_relation(scene: Scene, rng: np.random.Generator, style: Style) -> Question | None:
    if len(scene.objects) < 2:
        return None
    if rng.random() < 0.5:
        return _ask_what_is(scene, rng, style)
    a, b = (int(i) for i in rng.permutation(len(scene.objects))[:2])
    direction = pick(rng, DIRECTIONS)
    state = holds(scene.objects[a], scene.objects[b], direction)
    x, y = (refer_to(scene.objects, i, rng, kinds=("attribute",)) for i in (a, b))
    if state is None or x is None or y is None:
        return None
    wording = pick(rng, RELATION_WORDINGS[style])
    return Question("relation", wording.format(x=x, y=y, relation=_relation(direction, rng)), "yes" if state else "no")


def _ask_what_is(scene: Scene, rng: np.random.Generator, style: Style) -> Question | None:
    found = [(i, d, only_one(scene.objects, i, d)) for i in range(len(scene.objects)) for d in DIRECTIONS]
    askable = [(landmark, direction, index) for landmark, direction, index in found if index is not None]
    if not askable:
        return None
    landmark, direction, index = pick(rng, askable)
    y = refer_to(scene.objects, landmark, rng, kinds=("attribute",))
    if y is None:
        return None
    asked = pick(rng, ("shape", "colour"))
    wording = pick(rng, WHAT_IS_WORDINGS[style][asked]).format(y=y, relation=_relation(direction, rng))
    return Question("relation", wording, getattr(scene.objects[index], asked))


def _relation(direction: Direction, rng: np.random.Generator) -> str:
    return pick(rng, RELATION_WORDS[direction])


def _ask_comparison(scene: Scene, rng: np.random.Generator, style: Style) -> Question | None:
    if len(scene.objects) < 2:
        return None
    return pick(rng, (_ask_larger, _ask_same, _ask_more))(scene, rng, style)


def _ask_larger(scene: Scene, rng: np.random.Generator, style: Style) -> Question | None:
    pairs = _ordered_pairs(scene.objects)
    different = [(a, b) for a, b in pairs if scene.objects[a].size != scene.objects[b].size]
    if not different:
        return None
    a, b = pick(rng, different)
    x, y = (refer_to(scene.objects, i, rng, hide=("size",)) for i in (a, b))
    if x is None or y is None:
        return None
    comparative = pick(rng, ("larger", "smaller"))
    answer = (scene.objects[a].size == "large") == (comparative == "larger")
    wording = pick(rng, SIZE_WORDINGS[style]).format(x=x, y=y, comparative=comparative)
    return Question("comparison", wording, "yes" if answer else "no")


def _ask_same(scene: Scene, rng: np.random.Generator, style: Style) -> Question | None:
    """Asked only where the scene holds a pair that agrees and one that does not."""
    attribute = pick(rng, ATTRIBUTES)
    pairs = _ordered_pairs(scene.objects)
    same = [(a, b) for a, b in pairs if getattr(scene.objects[a], attribute) == getattr(scene.objects[b], attribute)]
    if not same or len(same) == len(pairs):
        return None
    agree = bool(rng.random() < 0.5)
    a, b = pick(rng, same if agree else sorted(set(pairs) - set(same)))
    x, y = (refer_to(scene.objects, i, rng, hide=(attribute,)) for i in (a, b))
    if x is None or y is None:
        return None
    wording = pick(rng, SAME_WORDINGS[style]).format(x=x, y=y, word=WORD_OF[attribute])
    return Question("comparison", wording, "yes" if agree else "no")


def _ask_more(scene: Scene, rng: np.random.Generator, style: Style) -> Question | None:
    attribute = pick(rng, ("shape", "colour"))
    counts = value_counts(scene.objects, attribute)
    pairs = [(v, w) for v in counts for w in counts if counts[v] != counts[w]]
    if not pairs:
        return None
    v, w = pick(rng, pairs)
    comparative = pick(rng, ("more", "fewer"))
    answer = (counts[v] > counts[w]) == (comparative == "more")
    xs, ys = (plural(name_from({attribute: value})) for value in (v, w))
    wording = pick(rng, MORE_WORDINGS[style]).format(xs=xs, ys=ys, comparative=comparative)
    return Question("comparison", wording, "yes" if answer else "no")


def _ordered_pairs(objects: Sequence[SceneObject]) -> list[tuple[int, int]]:
    return [(a, b) for a in range(len(objects)) for b in range(len(objects)) if a != b]


_ASKERS = {
    "count": _ask_count,
    "existence": _ask_existence,
    "relation": _ask_relation,
    "comparison": _ask_comparison,
}
