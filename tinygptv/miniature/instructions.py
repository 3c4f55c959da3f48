"""Instructions without an image: arithmetic, lists of words, facts of the world's words. One right answer each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tinygptv.miniature.scenes import make_scene, pick
from tinygptv.miniature.words import (
    NUMBERS,
    RELATION_WORDS,
    VALUES,
    WORD_OF,
    article,
    is_held_out,
    name_from,
    relation_between,
)

_OPPOSITES = (("left", "right"), ("above", "below"), ("small", "large"), ("first", "last"), ("more", "fewer"))
_ORDINALS = ("first", "second", "third", "last")


@dataclass(frozen=True)
class Instruction:
    """Words in, words out.

    Attributes:
        instruction: what is to be done.
        constraint: how to answer; None where nothing is demanded.
        output: the right answer.
    """

    instruction: str
    constraint: str | None
    output: str


def text_instruction(rng: np.random.Generator) -> Instruction:
    """Draw an instruction of any kind."""
    instruction, constraint, output = pick(rng, _KINDS)(rng)
    return Instruction(instruction, constraint if rng.random() < 0.5 else None, output)


Drawn = tuple[str, str, str]


def _arithmetic(rng: np.random.Generator) -> Drawn:
    a, b = (int(n) for n in rng.integers(0, 10, size=2))
    word = pick(rng, ("plus", "minus", "times", "half"))
    if word == "half":
        return f"what is half of {2 * a}?", "answer with a number", str(a)
    if word == "minus":
        a, b = max(a, b), min(a, b)
    result = {"plus": a + b, "minus": a - b, "times": a * b}[word]
    return f"what is {a} {word} {b}?", "answer with a number", str(result)


def _larger_number(rng: np.random.Generator) -> Drawn:
    a, b = (int(n) for n in rng.permutation(20)[:2])
    word = pick(rng, ("larger", "smaller"))
    return (
        f"which number is {word}, {a} or {b}?",
        "answer with a number",
        str(max(a, b) if word == "larger" else min(a, b)),
    )


def _repeat(rng: np.random.Generator) -> Drawn:
    word, times = pick(rng, _words()), int(rng.integers(2, 5))
    return f"say the word {word} {NUMBERS[times]} times", "only write the words", " ".join([word] * times)


def _sort(rng: np.random.Generator) -> Drawn:
    words = _some_words(rng)
    return f"sort these words, {' '.join(words)}", "only write the words", " ".join(sorted(words))


def _reverse(rng: np.random.Generator) -> Drawn:
    words = _some_words(rng)
    return f"reverse the order of these words, {' '.join(words)}", "only write the words", " ".join(words[::-1])


def _nth_word(rng: np.random.Generator) -> Drawn:
    words = _some_words(rng)
    ordinal = pick(rng, _ORDINALS)
    index = {"first": 0, "second": 1, "third": 2, "last": -1}[ordinal]
    return f"say the word that is {ordinal}, {' '.join(words)}", "answer with one word", words[index]


def _count_words(rng: np.random.Generator) -> Drawn:
    words = _some_words(rng)
    return f"count these words, {' '.join(words)}", "answer with a number", str(len(words))


def _kind_of_word(rng: np.random.Generator) -> Drawn:
    kind, asked = pick(rng, tuple(VALUES)), pick(rng, tuple(VALUES))
    asked = kind if rng.random() < 0.5 else asked
    word = pick(rng, VALUES[kind])
    return f"is {word} a {WORD_OF[asked]}?", "answer with yes or no", "yes" if asked == kind else "no"


def _which_is(rng: np.random.Generator) -> Drawn:
    asked = pick(rng, tuple(VALUES))
    chosen = {kind: pick(rng, VALUES[kind]) for kind in VALUES}
    while is_held_out(chosen, "train"):
        chosen = {kind: pick(rng, VALUES[kind]) for kind in VALUES}
    words = [chosen[tuple(VALUES)[int(i)]] for i in rng.permutation(len(VALUES))]
    return f"which of these words is a {WORD_OF[asked]}, {' '.join(words)}", "answer with one word", chosen[asked]


def _opposite(rng: np.random.Generator) -> Drawn:
    pair = pick(rng, _OPPOSITES)
    first = int(rng.integers(2))
    return f"what is the opposite of {pair[first]}?", "answer with one word", pair[1 - first]


def _described(rng: np.random.Generator) -> Drawn:
    """A sentence that tells of two objects, and a question about one of them."""
    scene = None
    while scene is None or len(scene.objects) < 2 or scene.objects[0].shape == scene.objects[1].shape:
        scene = make_scene(int(rng.integers(2**31)), "train", 0)
    a, b = scene.objects[:2]
    asked = pick(rng, ("colour", "size"))
    names = [article(name_from({asked: getattr(item, asked), "shape": item.shape})) for item in (a, b)]
    relation = pick(rng, RELATION_WORDS[relation_between(a, b)])
    about = pick(rng, (a, b))
    question = f"what {WORD_OF[asked]} is the {about.shape}?"
    return f"if {names[0]} is {relation} {names[1]}, {question}", "answer with one word", getattr(about, asked)


_KINDS: tuple[Callable[[np.random.Generator], Drawn], ...] = (
    _arithmetic,
    _arithmetic,
    _larger_number,
    _repeat,
    _sort,
    _reverse,
    _nth_word,
    _count_words,
    _kind_of_word,
    _which_is,
    _opposite,
    _described,
    _described,
)


def _words() -> tuple[str, ...]:
    return tuple(word for words in VALUES.values() for word in words)


def _some_words(rng: np.random.Generator) -> list[str]:
    words = pick(rng, (VALUES["colour"], VALUES["shape"]))
    return [words[int(i)] for i in rng.permutation(len(words))[: int(rng.integers(3, 6))]]
