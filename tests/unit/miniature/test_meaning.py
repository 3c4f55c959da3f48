"""The checker itself, on a scene that is worked out by hand:

small red plain circle      large blue striped square
large red dotted circle     small green plain star
"""

from __future__ import annotations

import pytest

from tinygptv.miniature.meaning import NotUnderstood, answer, check_caption, find
from tinygptv.miniature.scenes import SceneObject

OBJECTS = (
    SceneObject("circle", "red", "small", "plain", (0.10, 0.10, 0.25, 0.25)),
    SceneObject("square", "blue", "large", "striped", (0.60, 0.08, 0.90, 0.38)),
    SceneObject("circle", "red", "large", "dotted", (0.12, 0.60, 0.42, 0.90)),
    SceneObject("star", "green", "small", "plain", (0.70, 0.70, 0.85, 0.85)),
)


@pytest.mark.parametrize(
    ("phrase", "meant"),
    [
        ("the square", [1]),
        ("red circles", [0, 2]),
        (" A red star. ", []),
        ("Red circles.", [0, 2]),
        ("red circles?", [0, 2]),
        ("an object", [0, 1, 2, 3]),
        ("small plain object", [0, 3]),
        ("yellow heart", []),
        ("circle that is red and large", [2]),
        ("the upper one of the two red circles", [0]),
        ("lower one of the two circles", [2]),
        ("left one of the two objects", []),
        ("one of the two circles that is the lower one", [2]),
        ("leftmost object", [0]),
        ("right small object", [3]),
        ("bottommost object", [3]),
        ("object that is most to the bottom", [3]),
        ("circle at the bottom", [2]),
        ("object in the right half", [1, 3]),
        ("object at the top left", [0]),
        ("circle above the star", [0, 2]),
        ("circle to the left of the square", [0, 2]),
        ("object below the blue square", [2, 3]),
        ("circle with the square to its right", [0, 2]),
        ("object with the star below it", [0, 1, 2]),
        ("object right of the leftmost object", [1, 2, 3]),
        ("object above the circle", []),
    ],
)
def test_phrases(phrase, meant):
    assert find(OBJECTS, phrase) == meant


@pytest.mark.parametrize("phrase", ["dog", "the red", "", "circle of doom", "very small circle"])
def test_strange_phrases_are_refused(phrase):
    with pytest.raises(NotUnderstood):
        find(OBJECTS, phrase)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("what color is the square?", "blue"),
        ("what is the texture of the large circle?", "dotted"),
        ("which shape does the green object have?", "star"),
        ("is the square small or large?", "large"),
        ("is the lower one of the two circles plain, striped or dotted?", "dotted"),
        ("tell me the size of the star", "small"),
        ("the small circle is of which color?", "red"),
        ("how many red objects are there?", "2"),
        ("how many hearts are in the image?", "0"),
        (" How many hearts are in the image. ", "0"),
        ("what is the number of objects?", "4"),
        ("is there a red circle?", "yes"),
        ("are there any dotted squares?", "no"),
        ("tell me if there are stars in the picture", "yes"),
        ("is the square to the left of the star?", "yes"),
        ("is the star above the square?", "no"),
        ("what is to the right of the large circle?", None),
        ("what is below the square and above the moon?", None),
        ("what color is the object above the star?", None),
        ("is the square larger than the star?", "yes"),
        ("is the star smaller than the small circle?", "no"),
        ("do the square and the star have the same size?", "no"),
        ("is the small circle the same color as the large circle?", "yes"),
        ("are there more circles than stars?", "yes"),
        ("are there fewer red objects than blue objects?", "no"),
        ("who painted this?", None),
    ],
)
def test_questions(question, expected):
    if expected is None:
        with pytest.raises(NotUnderstood):
            answer(OBJECTS, question)
    else:
        assert answer(OBJECTS, question) == expected


@pytest.mark.parametrize(
    ("caption", "right"),
    [
        ("a small red circle to the left of a blue square", True),
        ("a small red circle to the right of a blue square", False),
        ("a small blue circle to the left of a blue square", False),
        ("two red circles and one star", True),
        ("three red circles", False),
        ("a green star at the bottom right", True),
        ("a green star at the top right", False),
        ("a green star is at the bottom right", True),
        ("a green star is at the top right", False),
        ("<p>a green star</p> {<70><70><85><85>} is below <p>a large blue square</p> {<60><8><90><38>}.", True),
        ("nothing at all", False),
    ],
)
def test_captions(caption, right):
    assert check_caption(OBJECTS, caption).all_right is right


@pytest.mark.parametrize("relation", ["to the left of", "to the right of", "above", "below"])
def test_objects_of_equal_position_stand_on_no_side(relation):
    same = [SceneObject("circle", "red", "small", "plain", (0.4, 0.4, 0.6, 0.6)),
            SceneObject("square", "blue", "small", "plain", (0.4, 0.4, 0.6, 0.6))]  # fmt: skip
    assert find(same, f"circle {relation} the square") == []
    assert answer(same, f"is the circle {relation} the square?") == "no"


def test_claims_are_counted():
    claims = check_caption(OBJECTS, "a red circle above a green star and a yellow heart")
    assert (len(claims.mentions), claims.mentions_right) == (3, 2)
    assert claims.relations == (("a red circle", "above", "a green star"),)
    assert claims.relations_right == 1
