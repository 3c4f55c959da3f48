"""Conversations about a scene: later questions say "it" and can only be answered by who knows the first turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinygptv.miniature.captions import short_caption
from tinygptv.miniature.questions import ATTRIBUTE_WORDINGS, EXISTENCE_WORDINGS, questions
from tinygptv.miniature.referring import refer_to
from tinygptv.miniature.scenes import Scene, pick
from tinygptv.miniature.words import (
    ATTRIBUTES,
    DIRECTIONS,
    ONE_OF_TWO,
    RELATION_WORDS,
    VALUES,
    WORD_OF,
    alike,
    article,
    box_text,
    count_of,
    holds,
    name_from,
    name_of,
    only_one,
    plural,
    value_counts,
)

KINDS = ("attribute", "relation", "existence", "count")
DETAIL_QUESTIONS = (
    "describe the image in detail",
    "please describe this scene",
    "what do you see in this picture?",
    "tell me what the image shows",
)
_ITS = ("and what is its {word}?", "what {word} is it?", "what is its {word}?")
_LATER = ("and {question}", "{question}")


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Conversation:
    """Turns about one scene; the second needs the first. ``kind`` is one of ``KINDS``."""

    kind: str
    turns: tuple[Turn, ...]


def two_turns(scene: Scene, rng: np.random.Generator, kind: str) -> Conversation | None:
    """A first question, and one that depends on it; None where a few draws find none in this scene."""
    for _ in range(6):
        index = int(rng.integers(len(scene.objects)))
        turns, _ = _OPENERS[kind](scene, rng, index)
        if turns:
            return Conversation(kind, turns)
    return None


def conversation(scene: Scene, rng: np.random.Generator) -> Conversation:
    """Two to four turns; every scene has one."""
    for position in [*rng.permutation(len(KINDS)), *([0] * 50)]:
        kind = KINDS[position]
        index = int(rng.integers(len(scene.objects)))
        turns, it = _OPENERS[kind](scene, rng, index)
        if turns:
            return Conversation(kind, (*turns, *_more_turns(scene, rng, turns, it, int(rng.integers(3)))))
    raise AssertionError(f"no conversation about scene {scene.key}")


def multitask_conversation(scene: Scene, rng: np.random.Generator) -> tuple[Turn, ...]:
    """Two to four turns of different tasks, each with its task tag in the text."""
    index = int(rng.integers(len(scene.objects)))
    item = scene.objects[index]
    attribute = pick(rng, ATTRIBUTES)
    name = refer_to(scene.objects, index, rng, hide=(attribute,)) or refer_to(scene.objects, index, rng)
    assert name is not None
    box = box_text(scene, item)
    about_it = Turn(f"[vqa] {pick(rng, _ITS).format(word=WORD_OF[attribute])}", getattr(item, attribute))
    opening = pick(
        rng, (Turn(f"[refer] where is the {name}?", box), Turn(f"[identify] what is it in {box}", name), None)
    )
    if opening is None:
        later = [
            Turn(f"[vqa] {found.question}", found.answer) for found in questions(scene, rng, int(rng.integers(1, 4)))
        ]
        return (Turn("[caption] describe the picture", short_caption(scene, rng)), *later)
    later = [Turn(f"[vqa] {found.question}", found.answer) for found in questions(scene, rng, int(rng.integers(3)))]
    return (opening, about_it, *later)


def reasoning(scene: Scene, rng: np.random.Generator) -> Turn:
    """A question whose answer is a sentence that gives its reason."""
    found = [turn for make in (_more_of, _most_are, _left_without) if (turn := make(scene, rng))]
    return pick(rng, found)


def _more_of(scene: Scene, rng: np.random.Generator) -> Turn | None:
    attribute = pick(rng, ("shape", "colour"))
    counts = value_counts(scene.objects, attribute)
    pairs = [(v, w) for v in counts for w in counts if counts[v] > counts[w]]
    if not pairs:
        return None
    v, w = pick(rng, pairs)
    xs, ys = (plural(name_from({attribute: value})) for value in (v, w))
    reason = f"{_there_are(counts[v], {attribute: v})} and {_quantity(counts[w], {attribute: w})}"
    asked = f"{xs} or {ys}" if rng.random() < 0.5 else f"{ys} or {xs}"
    return Turn(f"are there more {asked}?", f"{reason}, so there are more {xs}.")


def _most_are(scene: Scene, rng: np.random.Generator) -> Turn | None:
    kind, total = pick(rng, ("colour", "size", "texture")), len(scene.objects)
    counts = {value: count_of(scene.objects, {kind: value}) for value in VALUES[kind]}
    value = max(counts, key=lambda v: counts[v])
    if 2 * counts[value] <= total or total < 3:
        return None
    return Turn(
        f"of which {WORD_OF[kind]} are most objects?", f"{counts[value]} of {total} objects are {value}, so most are."
    )


def _left_without(scene: Scene, rng: np.random.Generator) -> Turn:
    index, left = int(rng.integers(len(scene.objects))), len(scene.objects) - 1
    name = refer_to(scene.objects, index, rng)
    verb = "is" if left == 1 else "are"
    answer = f"{_there_are(left + 1, {})}, so {left} {verb} left without it."
    return Turn(f"how many objects are left without the {name}?", answer)


def _there_are(count: int, values: dict[str, str]) -> str:
    return f"there {'is' if count == 1 else 'are'} {_quantity(count, values)}"


def _quantity(count: int, values: dict[str, str]) -> str:
    name = name_from(values)
    return f"{count} {name if count == 1 else plural(name)}"


Opening = tuple[tuple[Turn, ...], int | None]
"""The first two turns (none where the draw failed), and the object that "it" then stands for, if that is clear."""


def _open_attribute(scene: Scene, rng: np.random.Generator, index: int) -> Opening:
    first, second = (ATTRIBUTES[int(i)] for i in rng.permutation(len(ATTRIBUTES))[:2])
    name = refer_to(scene.objects, index, rng, hide=(first, second))
    if name is None:
        return (), index
    opening = Turn(_attribute_question(rng, first, name), getattr(scene.objects[index], first))
    return (opening, _about_it(scene, rng, index, second)), index


def _open_relation(scene: Scene, rng: np.random.Generator, index: int) -> Opening:
    first = pick(rng, ATTRIBUTES)
    name = refer_to(scene.objects, index, rng, hide=(first,))
    sides = [(d, found) for d in DIRECTIONS if (found := only_one(scene.objects, index, d)) is not None]
    if name is None or not sides:
        return (), index
    direction, other = pick(rng, sides)
    relation = pick(rng, RELATION_WORDS[direction])
    asked = pick(rng, ("shape", "colour"))
    question = f"what is {relation} it?" if asked == "shape" else f"what color is the object {relation} it?"
    opening = Turn(_attribute_question(rng, first, name), getattr(scene.objects[index], first))
    return (opening, Turn(_later(rng, question), getattr(scene.objects[other], asked))), None


def _open_existence(scene: Scene, rng: np.random.Generator, index: int) -> Opening:
    item = scene.objects[index]
    named = pick(rng, (("shape",), ("colour",), ("colour", "shape"), ("size", "shape"), ("texture", "shape")))
    asked = pick(rng, [attribute for attribute in ATTRIBUTES if attribute not in named])
    if len(alike(scene.objects, item, named)) != 1:
        return (), index
    name = name_of(item, named)
    wording = pick(rng, EXISTENCE_WORDINGS["usual"]).format(a_x=article(name), xs=plural(name))
    return (Turn(wording, "yes"), _about_it(scene, rng, index, asked)), index


def _open_count(scene: Scene, rng: np.random.Generator, index: int) -> Opening:
    named = pick(rng, ("shape", "colour", "texture"))
    two = alike(scene.objects, scene.objects[index], (named,))
    if len(two) != 2:
        return (), index
    other = two[1] if two[0] == index else two[0]
    sides = [d for d in DIRECTIONS if holds(scene.objects[index], scene.objects[other], d)]
    direction = pick(rng, sides)
    asked = pick(rng, [attribute for attribute in ATTRIBUTES if attribute != named])
    xs = plural(name_of(scene.objects[index], (named,)))
    question = f"what {WORD_OF[asked]} is the {ONE_OF_TWO[direction]} one?"
    answer = getattr(scene.objects[index], asked)
    return (Turn(f"how many {xs} are there?", "2"), Turn(_later(rng, question), answer)), index


_OPENERS = {
    "attribute": _open_attribute,
    "relation": _open_relation,
    "existence": _open_existence,
    "count": _open_count,
}


def _more_turns(
    scene: Scene, rng: np.random.Generator, turns: Sequence[Turn], index: int | None, extra: int
) -> list[Turn]:
    """Further questions: about "it" as long as there is something untold, or about something else."""
    said = set(" ".join(f"{turn.question} {turn.answer}" for turn in turns).replace("?", "").split())
    untold = [a for a in ATTRIBUTES if index is not None and getattr(scene.objects[index], a) not in said]
    found: list[Turn] = []
    for _ in range(extra):
        if index is not None and untold and rng.random() < 0.6:
            attribute = untold.pop(int(rng.integers(len(untold))))
            found.append(_about_it(scene, rng, index, attribute))
        else:
            found += [Turn(asked.question, asked.answer) for asked in questions(scene, rng, 1)]
            untold = []  # from here on, "it" would be something else
    return found


def _attribute_question(rng: np.random.Generator, attribute: str, name: str) -> str:
    return pick(rng, ATTRIBUTE_WORDINGS["usual"][attribute]).format(x=name)


def _about_it(scene: Scene, rng: np.random.Generator, index: int, attribute: str) -> Turn:
    question = pick(rng, _ITS).format(word=WORD_OF[attribute])
    return Turn(question, getattr(scene.objects[index], attribute))


def _later(rng: np.random.Generator, question: str) -> str:
    return pick(rng, _LATER).format(question=question)
