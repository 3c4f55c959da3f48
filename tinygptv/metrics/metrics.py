"""Scores of answers: pure functions, one per metric.

Each follows its benchmark's own published evaluation; ``released`` holds the release's looser versions, and
docs/evaluation.md tells the two apart. A score of one answer is 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinygptv.data.boxes import Box, iou, parse_answer_box, parse_boxes, to_pixels
from tinygptv.metrics.vqa_text import VIZWIZ_CONTRACTIONS, normalise_answer

REC_THRESHOLD = 0.5


# ---------------------------------------------------------------------- short answers


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy (VQAv2, OK-VQA).

    Each annotator is left out in turn; m of the others agree with the prediction, and the score is min(1, m / 3),
    averaged. Texts are normalised only where the annotators disagree, as in the published code.

    Args:
        prediction: the model's answer.
        answers: the annotators' answers (ten in the data sets).
    """
    prediction = _one_line(prediction)
    truth = [_one_line(answer) for answer in answers]
    if len(set(truth)) > 1:
        truth = [normalise_answer(answer) for answer in truth]
        prediction = normalise_answer(prediction)
    return _leave_one_out(prediction, truth)


def vizwiz_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VizWiz accuracy: as ``vqa_accuracy``, but the prediction alone is normalised, and always."""
    return _leave_one_out(normalise_answer(prediction, VIZWIZ_CONTRACTIONS), list(answers))


def direct_answer_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """A-OKVQA's direct answers: min(1, m / 3) for m annotators with the very same answer, as its own code counts."""
    return min(1.0, sum(answer == prediction.strip() for answer in answers) / 3)


def exact_match(prediction: str, answer: str) -> float:
    """1 where the answers are equal but for case and surrounding space (GQA, VSR)."""
    return float(prediction.strip().lower() == answer.strip().lower())


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    if not answers:
        return 0.0
    num_same = sum(answer == prediction for answer in answers)
    with_same, without = min(1.0, (num_same - 1) / 3), min(1.0, num_same / 3)
    return (num_same * with_same + (len(answers) - num_same) * without) / len(answers)


# ---------------------------------------------------------------------- yes or no


def yes_no(prediction: str) -> str | None:
    """``yes`` or ``no`` where the answer's first word is one of them."""
    words = normalise_answer(prediction).split()
    return words[0] if words and words[0] in ("yes", "no") else None


def pope_answer(prediction: str) -> str:
    """``no`` where the first sentence holds the word No, no or not; else ``yes``, as POPE reads answers."""
    words = prediction.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def precision(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Share of the predicted positives that are positive; 0 where nothing was predicted."""
    return _ratio((predicted * truth).sum(), predicted.sum())


def recall(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Share of the positives that were predicted; 0 where there are none."""
    return _ratio((predicted * truth).sum(), truth.sum())


def f1(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Harmonic mean of precision and recall of 0/1 arrays."""
    return _ratio(2 * (predicted * truth).sum(), predicted.sum() + truth.sum())


def _ratio(part: np.number | float, whole: np.number | float) -> float:
    return float(part / whole) if whole else 0.0


def auroc(scores: np.ndarray | Sequence[float], labels: np.ndarray | Sequence[int]) -> float:
    """Area under the ROC curve: the chance that a positive scores higher than a negative; ties count half.

    Args:
        scores: [n], larger for positives.
        labels: [n], 1 for positives and 0 for negatives.

    Returns:
        0..1; not a number where one class is missing.
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    num_positive, num_negative = int((truth == 1).sum()), int((truth == 0).sum())
    if not num_positive or not num_negative:
        return float("nan")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = ((last - counts + 1) + last) / 2  # mean rank of each distinct value
    rank_sum = ranks[inverse][truth == 1].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


# ---------------------------------------------------------------------- boxes


def grounding_overlap(prediction: str, box: Sequence[float], width: float, height: float) -> float:
    """IoU of a [refer] answer with the true box.

    Args:
        prediction: generated text.
        box: x1, y1, x2, y2 in pixels.
        width: of the image, in pixels.
        height: of the image, in pixels.

    Returns:
        0..1; 0 for an answer that does not start with a well-formed box.
    """
    found = parse_answer_box(prediction)
    return iou(to_pixels(found, width, height), box) if found else 0.0


def rec_hit(
    prediction: str, box: Sequence[float], width: float, height: float, threshold: float = REC_THRESHOLD
) -> float:
    """1 where the overlap is larger than the threshold (accuracy of referring expression comprehension)."""
    return float(grounding_overlap(prediction, box, width, height) > threshold)


def grounded_f1(prediction: str, truth: str, width: float, height: float, threshold: float = 0.5) -> float:
    """F1 of grounded phrases: a predicted one counts where a true one has the same words and its box overlaps enough.

    Args:
        prediction: generated grounded caption.
        truth: reference grounded caption.
        width: of the image, in pixels.
        height: of the image, in pixels.
        threshold: least IoU.
    """
    found, wanted = parse_boxes(prediction), parse_boxes(truth)
    if not found or not wanted:
        return 0.0
    left = list(wanted)
    hits = 0
    for candidate in found:
        box: Box = to_pixels(candidate.box, width, height)
        for reference in left:
            same = candidate.phrase.strip().lower() == reference.phrase.strip().lower()
            if same and iou(box, to_pixels(reference.box, width, height)) > threshold:
                left.remove(reference)
                hits += 1
                break
    return 2 * hits / (len(found) + len(wanted))
