"""Answers to held-out questions while a stage trains, and their score per source.

Questions are the held-out rows whose answers are short: a question with its answer (VQA), the box of a phrase, the
phrase of a box. Their wording is that of the benchmarks. Answering changes nothing that training depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipelines.data.loader import BatchMaker
from pipelines.data.shards import ShardSet
from tinygptv.data.boxes import format_box
from tinygptv.data.images import open_image, stack_pixels
from tinygptv.data.prompt_layout import Exchange
from tinygptv.data.prompts import EVALUATION_INSTRUCTIONS
from tinygptv.data.sample import SampleRow
from tinygptv.metrics.metrics import exact_match, rec_hit, vqa_accuracy
from tinygptv.training.train_step import TrainStep

NEW_TOKENS = 24
"""Longest answer: a box of four numbers fits."""

_BATCH = 16
_ANNOTATORS = 3


def _score_text(answer: str, row: SampleRow) -> float:
    """VQA accuracy where several people answered, else whether it is one of the answers."""
    answers = row.turns[0].answers
    if len(answers) >= _ANNOTATORS:
        return vqa_accuracy(answer, answers)
    return max(exact_match(answer, each) for each in answers)


def _score_box(answer: str, row: SampleRow) -> float:
    return rec_hit(answer, row.boxes[0], row.width, row.height)


SCORES: dict[str, Callable[[str, SampleRow], float]] = {
    "vqa": _score_text,
    "identify": _score_text,
    "refer": _score_box,
}
"""Task -> score of an answer, 0..1."""


class HeldOutQuestions:
    """Asks the model in training; all workers of a training do it together."""

    def __init__(
        self,
        maker: BatchMaker,
        sources: Mapping[str, tuple[ShardSet, Sequence[int]]],
        train_step: TrainStep,
        per_source: int,
    ) -> None:
        """Choose the questions.

        Args:
            maker: of this worker.
            sources: shard set and held-out rows, by name; the first rows that are questions are asked.
            train_step: whose model answers, in the precision of the training.
            per_source: most questions of a source.
        """
        self.maker, self.train_step = maker, train_step
        found = {name: _questions(shards, rows, per_source) for name, (shards, rows) in sources.items()}
        self.rows = {name: rows for name, rows in found.items() if rows}
        self.shards = {name: shards for name, (shards, _) in sources.items()}

    @property
    def num_questions(self) -> dict[str, int]:
        """Questions that are asked, by source, over all workers."""
        return {name: len(rows) for name, rows in self.rows.items()}

    def sums(self) -> dict[str, tuple[float, int]]:
        """Sum of scores and number of questions per source, over this worker's share; the model must be evaluating."""
        return {name: self._sum(name, rows) for name, rows in self.rows.items()}

    def _sum(self, name: str, rows: Sequence[int]) -> tuple[float, int]:
        plan = self.maker.plan
        asked = [self.shards[name].row(row) for row in rows[plan.rank :: plan.world_size]]
        asked.sort(key=lambda row: row.image is None)  # all rows of a batch have an image, or none has
        with_image = sum(row.image is not None for row in asked)
        total = 0.0
        for start, end in ((0, with_image), (with_image, len(asked))):
            for first in range(start, end, _BATCH):
                batch = asked[first : min(first + _BATCH, end)]
                answers = self._answer(batch)
                total += sum(SCORES[row.task](answer, row) for answer, row in zip(answers, batch, strict=True))
        return total, len(asked)

    def _answer(self, rows: Sequence[SampleRow]) -> list[str]:
        """Greedy answers."""
        model, tokenizer, layout = self.train_step.model, self.maker.tokenizer, self.maker.encoder.layout
        ids = [layout.encode_prompt([question_of(row)]) for row in rows]
        longest = max(map(len, ids))
        padded = np.array([[tokenizer.pad_token_id] * (longest - len(each)) + list(each) for each in ids])
        mask = np.array([[0] * (longest - len(each)) + [1] * len(each) for each in ids])
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(padded).to(model.device),
            "attention_mask": torch.from_numpy(mask).to(model.device),
        }
        images = [open_image(row.image) for row in rows if row.image is not None]
        if images:
            pixels = stack_pixels(images, self.maker.plan.stage.image_size)
            inputs["query_features"] = self.train_step.encode(pixels)
        with self.train_step.autocast():
            output = model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        return [layout.template.cut_answer(str(text)) for text in texts]


def _questions(shards: ShardSet, rows: Sequence[int], most: int) -> tuple[int, ...]:
    """The first rows that are questions with a score."""
    found: list[int] = []
    for row in rows:
        if len(found) == most:
            break
        if shards.row(row).task in SCORES:
            found.append(row)
    return tuple(found)


def question_of(row: SampleRow) -> Exchange:
    """The first turn of a row as benchmarks word it, without its answer."""
    turn = row.turns[0]
    text = turn.question
    if row.task == "refer":
        text = turn.answers[0]
    elif row.task == "identify":
        text = format_box(row.boxes[0], row.width, row.height)
    words = EVALUATION_INSTRUCTIONS[row.task].replace("{}", text, 1)
    return Exchange(words, num_images=int(row.image is not None))
