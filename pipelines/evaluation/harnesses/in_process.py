"""Answers a harness in process: texts about images, and log-likelihoods of continuations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from tinygptv.data.images import to_rgb
from tinygptv.inference.batch import Answerer, Prompt
from tinygptv.inference.loading import load_for_inference

logger = logging.getLogger(__name__)

_BATCHES_AT_ONCE = 4


@dataclass(frozen=True)
class HarnessQuestion:
    """A question of a harness.

    Attributes:
        text: the question in the harness's wording.
        image: its image; None for text only.
        max_new_tokens: of the answer.
        stop: texts at which the answer ends, besides the model's own end symbol.
    """

    text: str
    image: Image.Image | None = None
    max_new_tokens: int = 20
    stop: tuple[str, ...] = ()


class InProcessModel:
    """A checkpoint or artifact that answers greedily, in batches."""

    def __init__(
        self, checkpoint: str, *, device: str = "cpu", batch_size: int = 64, threads: int = 0, tag: str = "[vqa] "
    ) -> None:
        """Load.

        Args:
            checkpoint: checkpoint or artifact folder.
            device: where the model runs.
            batch_size: answers generated together.
            threads: torch threads; 0 leaves them as they are.
            tag: put before every question, as in training: ``[vqa]``, ``[refer]``, ... or nothing.

        Raises:
            ValueError: the folder is no checkpoint.
        """
        if threads:
            torch.set_num_threads(threads)
        self.answerer = Answerer(*load_for_inference(checkpoint, device), batch_size)
        self.tag, self.chunk = tag, _BATCHES_AT_ONCE * batch_size

    def answer(self, questions: Sequence[HarnessQuestion]) -> list[str]:
        """Answers, in the order of the questions; empty, with a warning, where the model can give none."""
        answers: list[str] = []
        for start in range(0, len(questions), self.chunk):
            part = questions[start : start + self.chunk]
            images, prompts = self._prompts(part, [()] * len(part))
            replies = self.answerer.answer(prompts, self.answerer.encode(images))
            for number, (question, reply) in enumerate(zip(part, replies, strict=True), start=start):
                if reply.error:
                    logger.warning("question %d of the harness has no answer: %s", number, reply.error)
                answers.append(_cut(reply.text, question.stop))
        return answers

    def log_likelihoods(
        self, questions: Sequence[HarnessQuestion], continuations: Sequence[str]
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation as the answer, end symbol included.

        Returns:
            Per question the log-likelihood in nats, and whether the greedy answer is this text.
        """
        found: list[tuple[float, bool]] = []
        for start in range(0, len(questions), self.chunk):
            part, texts = questions[start : start + self.chunk], continuations[start : start + self.chunk]
            images, prompts = self._prompts(part, [(text.strip(),) for text in texts])
            embeds = self.answerer.encode(images)
            losses = self.answerer.choice_losses(prompts, embeds)
            replies = self.answerer.answer(prompts, embeds)
            for text, (loss,), reply in zip(texts, losses, replies, strict=True):
                found.append((-loss, reply.text == text.strip()))
        return found

    def _prompts(
        self, questions: Sequence[HarnessQuestion], choices: Sequence[tuple[str, ...]]
    ) -> tuple[list[Image.Image], list[Prompt]]:
        """The distinct images of the questions, and prompts about them."""
        images: list[Image.Image] = []
        indices: dict[int, int] = {}
        prompts = []
        for question, texts in zip(questions, choices, strict=True):
            if question.image is not None and id(question.image) not in indices:
                indices[id(question.image)] = len(images)
                images.append(to_rgb(question.image))
            index = None if question.image is None else indices[id(question.image)]
            instruction = self.tag + question.text.strip()
            prompts.append(Prompt(instruction, index, (), question.max_new_tokens, texts))
        return images, prompts


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    ends = [index for mark in stop if mark and (index := text.find(mark)) >= 0]
    return text[: min(ends)].strip() if ends else text
