"""Text for pretraining the small language model: scenes as text, and what can be said about them.

A document has the layout of training, with the scene's listing where the image's vectors will stand later:

    ###Human: <Img>scene : small red plain circle {<..>} ; ..</Img> [vqa] what color is the star?  ###Assistant: red###

So a language model learns here to read a scene from between the image marks, and everything the tasks ask of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinygptv.data.prompt_layout import Exchange, turn_texts
from tinygptv.data.prompts import IMAGE_PLACEHOLDER, TEMPLATES
from tinygptv.data.sample import SampleRow, Turn, chooser, render_sample
from tinygptv.miniature import captions
from tinygptv.miniature.conversations import DETAIL_QUESTIONS, conversation, multitask_conversation, reasoning
from tinygptv.miniature.instructions import text_instruction
from tinygptv.miniature.questions import questions
from tinygptv.miniature.referring import refer_to
from tinygptv.miniature.scenes import Scene, pick
from tinygptv.miniature.words import box_text, list_scene


@dataclass(frozen=True)
class Document:
    """One text, as exchanges of a template; ``sample.SampleEncoder`` encodes it like any sample without an image.

    Attributes:
        kind: key of ``KINDS``.
        template: key of ``prompts.TEMPLATES``.
        exchanges: instructions (with the scene's listing instead of the image, or with the image) and answers.
    """

    kind: str
    template: str
    exchanges: tuple[Exchange, ...]

    @property
    def num_images(self) -> int:
        """1 where an image stands for the scene, else 0."""
        return self.exchanges[0].num_images

    def turns(self) -> list[tuple[str, str]]:
        """Question and answer of every turn as they are tokenised, end symbols included."""
        texts = turn_texts(self.exchanges, TEMPLATES[self.template])
        return [(question, answer or "") for question, answer in texts]

    def text(self, bos_token: str = "") -> str:
        """The whole text; ``bos_token`` opens every turn, as in training."""
        return "".join(bos_token + question + answer for question, answer in self.turns())


def make_document(
    scene: Scene,
    rng: np.random.Generator,
    kind: str | None = None,
    *,
    as_image: bool = False,
    weights: Mapping[str, float] | None = None,
) -> Document:
    """A document about a scene.

    Args:
        scene: any scene.
        rng: source of all choices.
        kind: key of ``KINDS``; None draws one by its weight.
        as_image: keep the image placeholder where the listing would stand.
        weights: of the kinds to draw from; ``LANGUAGE_MIX`` by default.
    """
    if kind is None:
        weights = weights or LANGUAGE_MIX
        shares = np.array(list(weights.values()))
        kind = tuple(weights)[int(rng.choice(len(shares), p=shares / shares.sum()))]
    row = KINDS[kind](scene, rng)
    listing = list_scene(scene, [int(i) for i in rng.permutation(len(scene.objects))])
    rendered = render_sample(row, chooser(rng))
    if rendered[0].num_images and not as_image:
        rendered = _with_listing(rendered, listing)
    return Document(kind, "caption" if row.task == "pair" else "human", tuple(rendered))


def _with_listing(rendered: Sequence[Exchange], listing: str) -> list[Exchange]:
    """The same turns with the scene's listing where the image would stand."""
    if rendered[0].instruction is None:
        return [replace(rendered[0], instruction=listing, num_images=0)]
    template = TEMPLATES["human"]
    mark = template.image.replace(IMAGE_PLACEHOLDER, listing)
    return [
        replace(e, instruction=mark * e.num_images + (e.instruction or "") + template.after_instruction, num_images=0)
        for e in rendered
    ]


def _row(scene: Scene, task: str, *turns: tuple[str, str], item: int | None = None) -> SampleRow:
    boxes = () if item is None else (scene.pixel_box(scene.objects[item]),)
    rendered = tuple(Turn(question, (answer,)) for question, answer in turns)
    # Empty bytes stand for the drawing, which a text does not need.
    return SampleRow("", "document", task, rendered, b"", scene.width, scene.height, boxes)


def _vqa(scene: Scene, rng: np.random.Generator) -> SampleRow:
    found = questions(scene, rng, 1)[0]
    return _row(scene, "vqa", (found.question, found.answer))


def _several_questions(scene: Scene, rng: np.random.Generator) -> SampleRow:
    found = questions(scene, rng, int(rng.integers(3, 7)))
    return _row(scene, "vqa", *((q.question, q.answer) for q in found))


def _box(task: str) -> Callable[[Scene, np.random.Generator], SampleRow]:
    def build(scene: Scene, rng: np.random.Generator) -> SampleRow:
        index = int(rng.integers(len(scene.objects)))
        name = refer_to(scene.objects, index, rng)
        assert name is not None
        return _row(scene, task, ("", name), item=index)

    return build


def _detection(scene: Scene, rng: np.random.Generator) -> SampleRow:
    if rng.random() < 0.5:
        return _row(scene, "detection", captions.caption_phrases(scene, rng))
    phrase, boxes = captions.phrase_boxes(scene, rng)
    return _row(scene, "detection", (phrase, f"<p>{phrase}</p> {boxes}"))


def _conversation(scene: Scene, rng: np.random.Generator) -> SampleRow:
    if rng.random() < 0.2:
        turns = multitask_conversation(scene, rng)
    else:
        turns = conversation(scene, rng).turns
    return _row(scene, "conversation", *((turn.question, turn.answer) for turn in turns))


def _instruct(scene: Scene, rng: np.random.Generator) -> SampleRow:
    if rng.random() < 0.5:
        return _row(scene, "instruct", (pick(rng, DETAIL_QUESTIONS), captions.detailed_caption(scene, rng)))
    turn = reasoning(scene, rng)
    return _row(scene, "instruct", (turn.question, turn.answer))


def _listing(scene: Scene, rng: np.random.Generator) -> SampleRow:
    """Every object with all attributes and its box, cell by cell: the densest thing that can be said of a scene."""
    order = sorted(range(len(scene.objects)), key=lambda i: scene.cell_of(scene.objects[i]))
    return _row(scene, "instruct", ("scene", list_scene(scene, order).removeprefix("scene : ")))


def _facts(num_questions: int, num_boxes: int, num_lines: int) -> Callable[[Scene, np.random.Generator], SampleRow]:
    """Questions with their answers, names with their boxes and boxes with their names, as one text without templates.

    Every word is supervised, so a batch tells several times as much of its scenes as instructions and answers do.
    """

    def build(scene: Scene, rng: np.random.Generator) -> SampleRow:
        lines = [f"{found.question} {found.answer}" for found in questions(scene, rng, num_questions)]
        for number in range(num_boxes):
            index = int(rng.integers(len(scene.objects)))
            name, box = refer_to(scene.objects, index, rng), box_text(scene, scene.objects[index])
            if name is not None:
                lines.append(f"{name} {box}" if number % 2 else f"{box} {name}")
        shuffled = [lines[int(i)] for i in rng.permutation(len(lines))]
        return _row(scene, "pair", ("", " ; ".join(shuffled[:num_lines])))

    return build


def _text(scene: Scene, rng: np.random.Generator) -> SampleRow:
    drawn = text_instruction(rng)
    question = f"{drawn.instruction} {drawn.constraint}" if drawn.constraint else drawn.instruction
    return SampleRow("", "document", "text", (Turn(question, (drawn.output,)),))


KINDS: dict[str, Callable[[Scene, np.random.Generator], SampleRow]] = {
    "pair": lambda scene, rng: _row(scene, "pair", ("", captions.web_caption(scene, rng))),
    "caption": lambda scene, rng: _row(scene, "caption", ("", captions.short_caption(scene, rng))),
    "align": lambda scene, rng: _row(scene, "align", ("", captions.detailed_caption(scene, rng))),
    "vqa": _vqa,
    "facts": _facts(num_questions=4, num_boxes=4, num_lines=6),
    "lookups": _facts(num_questions=10, num_boxes=3, num_lines=13),
    "questions": _several_questions,
    "refer": _box("refer"),
    "identify": _box("identify"),
    "grounding": lambda scene, rng: _row(scene, "grounding", ("", captions.grounded_caption(scene, rng))),
    "detection": _detection,
    "listing": _listing,
    "conversation": _conversation,
    "instruct": _instruct,
    "text": _text,
}
"""Kind of document -> how to make it."""

LANGUAGE_MIX: dict[str, float] = {
    "pair": 8,
    "caption": 6,
    "align": 4,
    "vqa": 12,
    "facts": 60,
    "questions": 10,
    "refer": 12,
    "identify": 8,
    "grounding": 6,
    "detection": 4,
    "listing": 5,
    "conversation": 8,
    "instruct": 3,
    "text": 3,
}
"""Kind of document -> its share where the world's language is learned."""

LOOKUP_MIX: dict[str, float] = LANGUAGE_MIX | {"facts": 0, "lookups": 60, "identify": 14, "caption": 10}
"""Kind of document -> its share where looking things up by name is practised: more questions per scene."""
