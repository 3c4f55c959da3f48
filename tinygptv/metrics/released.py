"""Scores as the TinyGPT-V release computes them, defects included, so that numbers can be compared with its own.

Its answers are not cut at the end symbol: they run on until EOS or the token limit. Source: the release's eval_vqa.py
and eval_ref.py; docs/evaluation.md says what differs from the official metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tinygptv.metrics.metrics import rec_hit, vqa_accuracy


def released_text(generated: str) -> str:
    """Text as the release's ``generate`` returns it: up to ``</s>``, without ``<s>``, from the last ``[/INST]`` on."""
    return generated.partition("</s>")[0].replace("<s>", "").rpartition("[/INST]")[2].strip()


def contains_answer(prediction: str, answer: str) -> float:
    """GQA and VSR: the true answer stands anywhere in the lower-cased answer."""
    return float(answer in prediction.lower())


def _cut_answer(prediction: str) -> str:
    """Text up to ``###``, from the last ``Assistant:`` on."""
    return prediction.partition("###")[0].rpartition("Assistant:")[2]


def released_vizwiz(prediction: str, answers: Sequence[str]) -> float:
    """VizWiz: an annotator agrees where either answer contains the other, so an empty answer agrees with everybody."""
    text = _cut_answer(prediction).strip().lower()
    # Annotators' answers are joined with "_" and split again, so an answer that holds one counts as two.
    truths = "_".join(answers).lower().split("_")
    return min(sum(text in truth or truth in text for truth in truths) / 3, 1.0)


def released_hateful(prediction: str, label: int) -> float:
    """Hateful Memes: ``yes`` anywhere counts as hateful, else ``no`` anywhere as not; accuracy."""
    text = _cut_answer(prediction).lower()
    predicted = 1 if "yes" in text else 0 if "no" in text else None
    return float(predicted == label)


def released_okvqa(prediction: str, answers: Sequence[str]) -> float:
    """OK-VQA: lower-cased and cut at ``###``, then the official accuracy."""
    return vqa_accuracy(prediction.lower().partition("###")[0].strip(), answers)


def released_rec(predictions: Sequence[str], truths: Sequence[Mapping[str, Any]]) -> list[float]:
    """Referring expressions: every answer about an ``img_id`` is scored against the box of that id's last entry.

    Args:
        predictions: one answer per entry.
        truths: ``img_id``, ``box`` (x1, y1, x2, y2 in pixels), ``width``, ``height`` of each entry.
    """
    last = {truth["img_id"]: truth for truth in truths}
    scores = []
    for prediction, truth in zip(predictions, truths, strict=True):
        meant = last[truth["img_id"]]
        scores.append(rec_hit(prediction, meant["box"], meant["width"], meant["height"]))
    return scores
