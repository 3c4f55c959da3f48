"""Answers units of questions with one model; runs in a Ray Data actor of the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines import storage
from pipelines.evaluation.answers import Answers, View, ViewAnswer, write_answers
from pipelines.evaluation.benchmarks.base import Question
from pipelines.node_cache import local_checkpoint, local_data
from tinygptv.data.images import open_image
from tinygptv.inference.batch import Answerer, Prompt
from tinygptv.inference.loading import load_for_inference


@dataclass(frozen=True)
class AnswerOptions:
    """Inputs that decide the answers to a question, and their output path.

    Attributes:
        checkpoint: folder, absolute, or its URI.
        fingerprint: changes with the checkpoint's content.
        batch_size: answers generated together.
        baselines: also answer with a blank image and with another question's.
        released: prompt and stop as the release does.
        answers_dir: folder or URI of the units' answers.
        copies: URIs of data folders, each with the driver's copy of it, in which the questions' images lie.
    """

    checkpoint: str
    fingerprint: str
    batch_size: int
    baselines: bool
    released: bool
    answers_dir: str
    copies: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class QuestionUnit:
    """Questions that are answered together.

    Attributes:
        benchmark: its name.
        number: of the unit within the benchmark.
        questions: in the benchmark's order.
        max_new_tokens: of an answer.
        generates: answers are generated, not only ranked.
        file: name of its file of answers; changes with everything that the answers depend on.
    """

    benchmark: str
    number: int
    questions: tuple[Question, ...]
    max_new_tokens: int
    generates: bool
    file: str


class UnitAnswerer:
    """Answers units; one of these per Ray Data actor."""

    def __init__(self, options: AnswerOptions, threads: int = 0, device: str = "cpu") -> None:
        if threads:
            torch.set_num_threads(threads)
        model, processor = load_for_inference(local_checkpoint(options.checkpoint), device)
        self.options = options
        self.moved = {copy: local_data(uri) for uri, copy in options.copies}
        self.answerer = Answerer(model, processor, options.batch_size, released=options.released)

    def __call__(self, unit: QuestionUnit) -> None:
        """Answer a unit and write its file; an answered one is left as it is."""
        location = storage.join(self.options.answers_dir, unit.file)
        if not storage.exists(location):
            write_answers(location, self.answers(unit))

    def _here(self, path: Path) -> Path:
        """This machine's copy of an image."""
        for driver, here in self.moved.items():
            if path.is_relative_to(driver):
                return here / path.relative_to(driver)
        return path

    def answers(self, unit: QuestionUnit) -> list[Answers]:
        """Answers to each question of a unit, in order."""
        images, indices, broken = _open_images(unit.questions, self._here)
        answers = [Answers(q.id, broken.get(q.image, "")) for q in unit.questions]
        asked = {index: _prompt(unit, q, indices) for index, q in enumerate(unit.questions) if q.image not in broken}
        embeds = self.answerer.encode(images)
        self._answer_view(unit, answers, "answer", asked, embeds)
        if self.options.baselines and images:
            blank = [self.answerer.blank()]
            self._answer_view(unit, answers, "blind", _with_images(asked, [0] * len(images)), blank)
        if self.options.baselines and len(images) > 1:
            others = _other_images(len(images), unit.number)
            self._answer_view(unit, answers, "shuffled", _with_images(asked, others), embeds)
        return answers

    def _answer_view(
        self,
        unit: QuestionUnit,
        answers: list[Answers],
        view: View,
        asked: dict[int, Prompt],
        embeds: Sequence[Tensor],
    ) -> None:
        """Add the answers of one view."""
        prompts = list(asked.values())
        if any(prompt.choices for prompt in prompts):
            ranked = zip(asked.items(), self.answerer.choice_losses(prompts, embeds), strict=True)
            for (index, prompt), losses in ranked:
                answers[index].views[view] = ViewAnswer(prompt.choices[int(np.argmin(losses))], tuple(losses))
                if not np.isfinite(losses).any():
                    answers[index].problem = "no choice has a finite loss: too long for the model, or damaged weights"
        if unit.generates:
            for index, reply in zip(asked, self.answerer.answer(prompts, embeds), strict=True):
                ranking = answers[index].views.get(view, ViewAnswer(""))
                answers[index].views[view] = replace(ranking, text=reply.text)
                answers[index].problem = answers[index].problem or reply.error


def _prompt(unit: QuestionUnit, question: Question, indices: dict[Path, int]) -> Prompt:
    image = None if question.image is None else indices[question.image]
    return Prompt(question.instruction, image, question.history, unit.max_new_tokens, question.choices)


def _with_images(asked: dict[int, Prompt], images: Sequence[int]) -> dict[int, Prompt]:
    """The same prompts with other images; those without an image stay as they are."""
    return {k: p if p.image is None else replace(p, image=images[p.image]) for k, p in asked.items()}


def _other_images(num_images: int, seed: int) -> list[int]:
    """For each image the index of another one: neighbours on a random circle."""
    circle = np.random.default_rng(seed).permutation(num_images)
    others = np.empty(num_images, dtype=int)
    others[circle] = np.roll(circle, -1)
    return others.tolist()


def _open_images(
    questions: Sequence[Question], here: Callable[[Path], Path]
) -> tuple[list[Image.Image], dict[Path, int], dict[Path | None, str]]:
    """Decoded images, the index of each path among them, and what is wrong with which path."""
    images: list[Image.Image] = []
    indices: dict[Path, int] = {}
    broken: dict[Path | None, str] = {}
    for path in dict.fromkeys(question.image for question in questions if question.image):
        try:
            images.append(open_image(here(path).read_bytes()))
            indices[path] = len(images) - 1
        except (OSError, ValueError) as error:
            broken[path] = f"{path} cannot be opened: {error}"
    return images, indices, broken
