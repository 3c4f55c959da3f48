"""What is said about scenes: true, unambiguous, balanced, in a closed vocabulary, and silent about held-out pairs."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import islice

import numpy as np
import pytest

from tinygptv.data.boxes import iou, parse_answer_box, parse_boxes
from tinygptv.data.prompts import clean_caption
from tinygptv.miniature import captions, meaning, questions, referring
from tinygptv.miniature.conversations import (
    DETAIL_QUESTIONS,
    conversation,
    multitask_conversation,
    reasoning,
    two_turns,
)
from tinygptv.miniature.conversations import KINDS as CONVERSATION_KINDS
from tinygptv.miniature.documents import KINDS as DOCUMENT_KINDS
from tinygptv.miniature.documents import LANGUAGE_MIX, LOOKUP_MIX, make_document
from tinygptv.miniature.instructions import text_instruction
from tinygptv.miniature.scenes import HELD_OUT, Scene, SceneObject, generator, make_scene, make_scenes
from tinygptv.miniature.words import VALUES, VOCABULARY, box_text, list_scene, plural

WORLDS = (("train", "usual"), ("crowded", "usual"), ("combination", "usual"), ("wording", "unseen"))


@pytest.fixture(scope="module")
def train() -> list[Scene]:
    return make_scenes(11, "train", 300)


@cache
def _cleaned_texts(scene: Scene, style: str = "usual") -> tuple[str, ...]:
    """Texts of the sources that the release cleans."""
    return tuple(_say_cleaned(scene, style))


@cache
def _other_texts(scene: Scene) -> tuple[str, ...]:
    return tuple(_say_others(scene))


def _say_cleaned(scene: Scene, style: str) -> Iterator[str]:
    rng = generator(scene.key, "test")
    for index in range(len(scene.objects)):
        yield from (found.text for found in islice(referring.expressions(scene.objects, index, rng, style=style), 6))
    for found in questions.questions(scene, rng, 8, style=style):
        yield from (found.question, found.answer)
    if style == "usual":
        yield from (captions.short_caption(scene, rng), captions.web_caption(scene, rng))
        drawn = text_instruction(rng)
        yield from (drawn.instruction, drawn.constraint or "", drawn.output)
        yield from (reasoning(scene, rng).question, *DETAIL_QUESTIONS)


def _say_others(scene: Scene) -> Iterator[str]:
    rng = generator(scene.key, "test more")
    yield from (captions.detailed_caption(scene, rng), captions.grounded_caption(scene, rng), list_scene(scene))
    yield from (*captions.phrase_boxes(scene, rng), *captions.caption_phrases(scene, rng), reasoning(scene, rng).answer)
    for turn in (*conversation(scene, rng).turns, *multitask_conversation(scene, rng)):
        yield from (turn.question, turn.answer)


def _words(text: str) -> list[str]:
    text = re.sub(r"</?p>|<delim>|\{(?:<\d{1,3}>){4}\}|\[(?:vqa|refer|identify|caption)\]|[.,:;?]", " ", text)
    return [word for word in text.split() if not word.isdigit()]


def test_the_vocabulary_is_closed_and_has_no_idle_words(train):
    said = set()
    for scene in [*train, *make_scenes(11, "crowded", 60)]:
        for text in (*_cleaned_texts(scene), *_other_texts(scene)):
            said.update(_words(text))
    assert said <= VOCABULARY
    assert said == VOCABULARY, VOCABULARY - said


def test_unseen_phrasings_use_known_words_in_new_ways(train):
    unseen = [text for scene in make_scenes(11, "wording", 100) for text in _cleaned_texts(scene, "unseen")]
    assert {word for text in unseen for word in _words(text)} <= VOCABULARY
    for name in ("COUNT", "EXISTENCE", "RELATION", "SIZE", "SAME", "MORE"):
        wordings = getattr(questions, f"{name}_WORDINGS")
        assert not set(wordings["usual"]) & set(wordings["unseen"])
    usual = {found.question for scene in train for found in _asked(scene)}
    assert not usual & {found.question for scene in train for found in _asked(scene, "unseen")}


def _asked(scene: Scene, style: str = "usual") -> list[questions.Question]:
    return questions.questions(scene, generator(scene.key, "asked"), 8, style=style)


def test_cleaning_changes_nothing(train):
    for scene in train[:150]:
        for text in _cleaned_texts(scene):
            assert clean_caption(text) == text


def test_held_out_pairs_are_never_spoken_of(train):
    pairs = re.compile("|".join(rf"\b{colour} (?:\w+ )?{shape}" for colour, shape in sorted(HELD_OUT)))
    for scene in train:
        for text in (*_cleaned_texts(scene), *_other_texts(scene)):
            found = pairs.search(text)
            # "red striped heart" is a pair, "red triangle heart" in a list of words is not.
            assert not found or len(set(found[0].split()) & set(VALUES["shape"])) > 1, text
    assert any(pairs.search(text) for scene in make_scenes(0, "combination", 20) for text in _cleaned_texts(scene))


def test_held_out_pairs_are_counted_in_their_split_alone():
    def counted(split):
        scenes = make_scenes(5, split, 40)
        return [values for scene in scenes for values in questions._nouns(scene, generator(scene.key, "nouns"))]

    def held_out(values):
        return (values.get("colour"), values.get("shape")) in HELD_OUT

    assert any(map(held_out, counted("combination"))) and not any(map(held_out, counted("train")))


@pytest.mark.parametrize(("split", "style"), WORLDS)
def test_expressions_mean_one_object(split, style):
    kinds = Counter()
    for scene in make_scenes(5, split, 40):
        for index in range(len(scene.objects)):
            found = list(referring.expressions(scene.objects, index, generator(scene.key, "refer"), style=style))
            assert found, "every object can be told apart"
            assert len({expression.text for expression in found}) == len(found)
            for expression in found:
                assert meaning.find(scene.objects, expression.text) == [index], expression
                kinds[expression.kind] += 1
    assert set(kinds) == set(referring.KINDS)


def test_hidden_attributes_are_not_mentioned(train):
    for scene in train[:100]:
        for index, item in enumerate(scene.objects):
            kinds = ("attribute", "side", "pair", "extreme")
            hidden = referring.expressions(
                scene.objects, index, generator(scene.key), hide=("colour", "size"), kinds=kinds
            )
            assert all(not {item.colour, item.size} & set(found.text.split()) for found in hidden)


@pytest.mark.parametrize(("split", "style"), WORLDS)
def test_answers_are_true(split, style):
    kinds = Counter()
    for scene in make_scenes(6, split, 60):
        for found in questions.questions(scene, generator(scene.key, "ask"), 10, style=style):
            assert meaning.answer(scene.objects, found.question) == found.answer, (found, list_scene(scene))
            kinds[found.kind] += 1
    assert set(kinds) == set(questions.KINDS)


def test_answers_are_balanced():
    asked = [found for few in _many_asked() for found in few]
    answers = defaultdict(Counter)
    for found in asked:
        answers[found.kind][found.answer] += 1
    for kind in ("existence", "comparison"):
        assert abs(answers[kind]["yes"] / answers[kind].total() - 0.5) < 0.06
    yes, no = answers["relation"]["yes"], answers["relation"]["no"]
    assert abs(yes / (yes + no) - 0.5) < 0.1
    shares = [answers["count"][str(n)] / answers["count"].total() for n in range(5)]
    assert min(shares) > 0.1
    assert max(shares) < 0.3
    assert min(Counter(found.kind for found in asked).values()) > len(asked) / len(questions.KINDS) / 2


@cache
def _many_asked() -> list[list[questions.Question]]:
    """A few questions about each of 1,200 scenes."""
    return [_few(scene) for scene in make_scenes(8, "train", 1200)]


def _few(scene: Scene) -> list[questions.Question]:
    return questions.questions(scene, generator(scene.key, "few"), 3)


def _wording(question: str) -> str:
    """The question with its names blanked."""
    names = {word for word in re.findall(r"\w+", question) if word in _VALUES}
    return re.sub(r"(?:_ ?)+", "_ ", " ".join("_" if word in names else word for word in re.findall(r"\w+", question)))


_VALUES = {"object", "objects"} | {w for words in VALUES.values() for w in (*words, *map(plural, words))}


def test_the_words_of_a_question_do_not_give_its_answer_away():
    known = defaultdict(Counter)
    for few in _many_asked():
        for found in few:
            known[_wording(found.question)][found.answer] += 1
    right = []
    for scene in make_scenes(8, "test", 500):
        for found in _few(scene):
            guess = known[_wording(found.question)].most_common(1)
            right.append(bool(guess) and guess[0][0] == found.answer)
    assert len(right) > 1000
    assert sum(right) / len(right) < 0.42


def test_captions_claim_what_is_so(train):
    for scene in [*train[:200], *make_scenes(5, "crowded", 50)]:
        rng = generator(scene.key, "captions")
        for write in (captions.short_caption, captions.web_caption, captions.detailed_caption):
            caption = write(scene, rng)
            assert meaning.check_caption(scene.objects, caption).all_right, (caption, list_scene(scene))
        detailed = meaning.check_caption(scene.objects, captions.detailed_caption(scene, rng))
        assert len(detailed.mentions) >= len(scene.objects)


def test_grounded_captions_hold_every_box_once(train):
    for scene in train[:150]:
        text = captions.grounded_caption(scene, generator(scene.key, "grounded"))
        found = parse_boxes(text)
        assert len(found) == len(scene.objects)
        for item in scene.objects:
            best = max(found, key=lambda f: iou([c * 100 for c in item.box], f.box))
            assert iou([c * 100 for c in item.box], best.box) > 0.8
            assert item.shape in best.phrase
            assert item.colour in best.phrase
        assert meaning.check_caption(scene.objects, text).all_right


def test_groups_of_a_grounded_caption_stand_side_by_side(train):
    pairs = [("circle", "red", 0.1, 0.3), ("star", "blue", 0.6, 0.8)]
    items = [
        SceneObject(shape, colour, "small", "plain", (x, y, x + 0.1, y + 0.1))
        for shape, colour, *places in pairs
        for x, y in zip(places, (0.2, 0.7), strict=True)
    ]
    text = captions.grounded_caption(replace(train[0], objects=tuple(items)), np.random.default_rng(0))
    assert "} and <p>" in text and " is " not in text, "how two of each lie to each other is not said"


def test_phrases_have_all_their_boxes(train):
    plural = 0
    for scene in train[:150]:
        phrase, boxes = captions.phrase_boxes(scene, generator(scene.key, "phrase"))
        meant = meaning.find(scene.objects, phrase)
        assert sorted(boxes.split("<delim>")) == sorted(box_text(scene, scene.objects[i]) for i in meant)
        plural += len(meant) > 1
        caption, output = captions.caption_phrases(scene, generator(scene.key, "phrases"))
        for box in parse_boxes(output):
            assert box.phrase in caption
            (index,) = {i for i, item in enumerate(scene.objects) if box_text(scene, item) == _text(box.box)}
            assert index in meaning.find(scene.objects, box.phrase)
    assert plural > 20


def _text(box: tuple[float, ...]) -> str:
    return "{" + "".join(f"<{int(side)}>" for side in box) + "}"


_NAMED = "|".join(
    (
        r"(?:what|which) \w+ (?:is|does) the (.+?)(?: have)?\?",
        r"what is the \w+ of the (.+)\?",
        r"is the (.+) (?:small or large|plain, striped or dotted)\?",
        r"(?:is there|does the image show) an? (.+)\?",
        r"are there any (.+)s\?",
        r"how many (.+) are there\?",
    )
)


@pytest.mark.parametrize("kind", CONVERSATION_KINDS)
def test_second_turns_are_true_once_the_first_is_known(kind, train):
    answers = Counter()
    for scene in train:
        found = two_turns(scene, generator(scene.key, "turns"), kind)
        if found is None:
            continue
        first, second = found.turns
        assert meaning.answer(scene.objects, first.question) == first.answer
        name = next(group for group in re.fullmatch(_NAMED, first.question).groups() if group)
        name = name.removesuffix("e") if name.endswith("crosse") else name
        asked = second.question.removeprefix("and ")
        with pytest.raises(meaning.NotUnderstood):
            meaning.answer(scene.objects, asked)
        asked = re.sub(r"its (\w+)\?", rf"the \1 of the {name}?", asked)
        asked = re.sub(r"\bit\?", f"the {name}?", asked)
        asked = re.sub(r"the (\w+) one\?", rf"the \1 one of the two {name}?", asked)
        assert meaning.answer(scene.objects, asked) == second.answer, (first, second, asked)
        answers[second.answer] += 1
    assert answers.total() > 80
    assert max(answers.values()) / answers.total() < 0.4


def test_every_scene_has_a_conversation_of_two_to_four_turns(train):
    lengths = Counter(len(conversation(scene, generator(scene.key, "chat")).turns) for scene in train)
    assert set(lengths) == {2, 3, 4}


def test_multitask_turns_are_true(train):
    for scene in train[:200]:
        turns = multitask_conversation(scene, generator(scene.key, "multitask"))
        assert 2 <= len(turns) <= 4
        tag, question = turns[0].question.split(" ", 1)
        if tag == "[refer]":
            (index,) = meaning.find(scene.objects, question.removeprefix("where is the ").rstrip("?"))
            assert turns[0].answer == box_text(scene, scene.objects[index])
            assert parse_answer_box(turns[0].answer)
        elif tag == "[identify]":
            (index,) = meaning.find(scene.objects, turns[0].answer)
            assert box_text(scene, scene.objects[index]) in question
        else:
            assert meaning.check_caption(scene.objects, turns[0].answer).all_right


def test_reasons_are_true(train):
    for scene in train[:200]:
        turn = reasoning(scene, generator(scene.key, "reason"))
        for number, name in re.findall(r"(\d) ((?:\w+ )?\w+?)(?: and|,|\.)", turn.answer):
            if name.split()[-1] in _VALUES:
                assert len(meaning.find(scene.objects, name)) == int(number), turn
        if found := re.search(r"so there are more (.+)\.", turn.answer):
            asked = re.fullmatch(r"are there more (.+) or (.+)\?", turn.question)
            (other,) = set(asked.groups()) - {found[1]}
            more, fewer = (len(meaning.find(scene.objects, name)) for name in (found[1], other))
            assert more > fewer, turn


def test_text_instructions_are_right():
    rng = generator(make_scene(0, "train", 0).key, "instructions")
    asked = set()
    for _ in range(600):
        drawn = text_instruction(rng)
        expected = _carry_out(drawn.instruction)
        assert expected == drawn.output or drawn.instruction.startswith("what is the opposite of "), drawn
        asked.add(drawn.instruction.partition(",")[0])
    assert {f"which of these words is a {kind}" for kind in _KIND_OF} <= asked


_KIND_OF = {"shape": "shape", "color": "colour", "size": "size", "texture": "texture"}


def _carry_out(instruction: str) -> str | None:
    if found := re.fullmatch(r"what is (\d+) (plus|minus|times) (\d+)\?", instruction):
        a, b = int(found[1]), int(found[3])
        return str({"plus": a + b, "minus": a - b, "times": a * b}[found[2]])
    if found := re.fullmatch(r"which number is (larger|smaller), (\d+) or (\d+)\?", instruction):
        return str((max if found[1] == "larger" else min)(int(found[2]), int(found[3])))
    order, _, words = instruction.partition(", ")
    listed = words.split()
    if found := re.fullmatch(r"which of these words is a (\w+)", order):
        (right,) = set(listed) & set(VALUES[_KIND_OF[found[1]]])
        return right
    if found := re.fullmatch(r"is (\w+) a (\w+)\?", instruction):
        return "yes" if found[1] in VALUES[_KIND_OF[found[2]]] else "no"
    if found := re.fullmatch(r"what is half of (\d+)\?", instruction):
        return str(int(found[1]) // 2)
    if found := re.fullmatch(r"say the word (\w+) (two|three|four) times", instruction):
        return " ".join([found[1]] * {"two": 2, "three": 3, "four": 4}[found[2]])
    if order == "reverse the order of these words":
        return " ".join(reversed(listed))
    if found := re.fullmatch(r"say the word that is (\w+)", order):
        return listed[("first", "second", "third").index(found[1])] if found[1] != "last" else listed[-1]
    if order == "sort these words":
        return " ".join(sorted(words.split()))
    if order == "count these words":
        return str(len(words.split()))
    if found := re.fullmatch(r"if .*\ban? (\w+) (\w+) is .+ an? (\w+) (\w+), what \w+ is the (\w+)\?", instruction):
        return found[1] if found[5] == found[2] else found[3]
    return None


def test_each_turn_of_a_document_begins_with_the_token():
    scene = make_scene(4, "test", 7)
    document = make_document(scene, generator(scene.key, "document"))
    assert document.text("<b>").count("<b>") == len(document.exchanges) and "<b>" not in document.text()


def test_kinds_of_documents_are_drawn_by_their_weights():
    rng, scene = np.random.default_rng(0), make_scene(4, "train", 0)
    drawn = [make_document(scene, rng, weights={"vqa": 1, "text": 0, "caption": 3}).kind for _ in range(200)]
    assert set(drawn) == {"vqa", "caption"} and 0.65 < drawn.count("caption") / 200 < 0.85
    usual = Counter(make_document(scene, rng).kind for _ in range(300))
    assert 90 < usual["facts"] < 160 and set(usual) <= set(LANGUAGE_MIX) and "lookups" not in usual
    assert LANGUAGE_MIX == {
        "pair": 8, "caption": 6, "align": 4, "vqa": 12, "facts": 60, "questions": 10, "refer": 12, "identify": 8,
        "grounding": 6, "detection": 4, "listing": 5, "conversation": 8, "instruct": 3, "text": 3,
    }  # fmt: skip
    changed = {kind: share for kind, share in LOOKUP_MIX.items() if share != LANGUAGE_MIX.get(kind)}
    assert changed == {"facts": 0, "lookups": 60, "identify": 14, "caption": 10}
    listed, shown = (make_document(scene, np.random.default_rng(1), "vqa", as_image=shown) for shown in (False, True))
    assert (listed.num_images, shown.num_images) == (0, 1) and listed.exchanges[0].answer == shown.exchanges[0].answer
    assert "scene : " in listed.text() and "scene : " not in shown.text()


@pytest.mark.parametrize("kind", DOCUMENT_KINDS)
def test_documents_have_the_layout_of_training(kind, train):
    scene = train[0]
    document = make_document(scene, generator(scene.key, kind), kind)
    text = document.text("<bos>")
    assert text.startswith("<bos>")
    assert text.count("<bos>") == len(document.exchanges)
    assert "<ImageHere>" not in text
    if document.template == "human":
        assert re.fullmatch(r"(?:<bos>###Human: [^#]* ###Assistant: [^#]*###)+", text)
    else:
        assert text.endswith("\n")
    if kind != "text":
        listing = text[text.index("scene : ") : text.rindex("}") + 1]
        assert all(box_text(scene, item) in listing for item in scene.objects)


def test_listings_say_everything(train):
    for scene in train[:50]:
        parts = list_scene(scene).removeprefix("scene : ").split(" ; ")
        assert [tuple(part.split()[:4]) for part in parts] == [item.attributes for item in scene.objects]
        assert [part.split()[4] for part in parts] == [box_text(scene, item) for item in scene.objects]
        assert list_scene(scene, [0]) == f"scene : {parts[0]}"
