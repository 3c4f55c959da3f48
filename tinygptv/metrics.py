"""Scores of answers: pure functions, one per metric, official and as released.

Official metrics follow each benchmark's own evaluation. ``released_*`` reproduce the scoring of the TinyGPT-V release with
its defects, for comparison with its numbers; docs/evaluation.md tells the two apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tinygptv.boxes import Box, iou, parse_answer_box, parse_boxes, to_pixels
from tinygptv.vqa_text import normalise_answer

REC_THRESHOLD = 0.5


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Official VQA accuracy of one answer.

    Each annotator is left out in turn; the others agree with the prediction m times, and the score is min(1, m / 3),
    averaged. Normalisation happens only where the annotators disagree, as in the official code.

    Args:
        prediction: the model's answer.
        answers: the annotators' answers (ten in the data sets).

    Returns:
        0..1.
    """
    prediction = prediction.replace("\n", " ").replace("\t", " ").strip()
    truth = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    if len(set(truth)) > 1:
        truth = [normalise_answer(answer) for answer in truth]
        prediction = normalise_answer(prediction)
    scores = []
    for left_out in range(len(truth)):
        matches = sum(answer == prediction for i, answer in enumerate(truth) if i != left_out)
        scores.append(min(1.0, matches / 3))
    return float(np.mean(scores)) if scores else 0.0


def exact_match(prediction: str, answer: str) -> float:
    """1 where the answers are equal but for case and surrounding space (GQA and VSR)."""
    return float(prediction.strip().lower() == answer.strip().lower())


def yes_no(prediction: str) -> str | None:
    """``yes`` or ``no`` where the answer's first word is one of them."""
    words = normalise_answer(prediction).split()
    return words[0] if words and words[0] in ("yes", "no") else None


def grounding_overlap(prediction: str, box: Box, width: float, height: float) -> float:
    """IoU of a [refer] answer with the true pixel box; 0 for an answer without a box."""
    found = parse_answer_box(prediction)
    return iou(to_pixels(found, width, height), box) if found else 0.0


def rec_hit(prediction: str, box: Box, width: float, height: float, threshold: float = REC_THRESHOLD) -> float:
    """1 where the overlap is larger than the threshold (RefCOCO's accuracy)."""
    return float(grounding_overlap(prediction, box, width, height) > threshold)


def grounded_f1(prediction: str, truth: str, width: float, height: float, threshold: float = 0.5) -> float:
    """F1 of grounded phrases: a predicted phrase with box counts where a true one has the same words and overlaps enough.

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
    open_ = list(wanted)
    hits = 0
    for candidate in found:
        for reference in open_:
            same = candidate.phrase.strip().lower() == reference.phrase.strip().lower()
            boxes = (to_pixels(b.box, width, height) for b in (candidate, reference))
            if same and iou(*boxes) > threshold:
                open_.remove(reference)
                hits += 1
                break
    return 2 * hits / (len(found) + len(wanted))


def auroc(scores: Sequence[float], labels: Sequence[int]) -> float:
    """Area under the ROC curve: the chance that a positive scores higher than a negative; ties count half.

    Raises:
        ValueError: only one class is present.
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    positives, negatives = int((truth == 1).sum()), int((truth == 0).sum())
    if not positives or not negatives:
        raise ValueError("AUROC needs both positive and negative samples.")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = ((last - counts + 1) + last) / 2  # mean rank of each distinct value
    rank_sum = ranks[inverse][truth == 1].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


# ---------------------------------------------------------------------- as released


def released_contains(prediction: str, answer: str) -> float:
    """GQA and VSR: the true answer is a substring of the lower-cased raw answer."""
    return float(answer in prediction.lower())


def released_vizwiz(prediction: str, answers: Sequence[str]) -> float:
    """VizWiz: either string contains the other; an empty answer matches everything."""
    text = prediction.split("###")[0].split("Assistant:")[-1].strip().lower()
    count = 0
    for answer in answers:
        truth = answer.split("_")[0].lower()
        count += text == truth or text in truth or truth in text
    return min(count / 3.0, 1.0)


def released_hateful(prediction: str, label: int) -> float:
    """Hateful Memes: ``yes`` anywhere, else ``no`` anywhere, as a 0/1 answer."""
    text = prediction.split("###")[0].lower()
    answer = 1 if "yes" in text else 0 if "no" in text else None
    return float(answer == label)


def released_okvqa(prediction: str, answers: Sequence[str]) -> float:
    """OK-VQA: lower-cased, cut at ``###``, then the official accuracy."""
    return vqa_accuracy(prediction.lower().split("###")[0].strip(), answers)


# ---------------------------------------------------------------------- uncertainty


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% bootstrap interval, all in per cent.

    Attributes:
        value: the mean.
        low: 2.5th percentile of resampled means.
        high: 97.5th percentile.
        n: number of samples.
    """

    value: float
    low: float
    high: float
    n: int


def bootstrap(
    scores: Sequence[float], statistic: Callable[[np.ndarray], float] | None = None, rounds: int = 1000, seed: int = 0
) -> Interval:
    """Mean (or another statistic) of scores in 0..1, in per cent, with a 95% interval.

    Args:
        scores: one per sample.
        statistic: function of resampled scores; None is the mean.
        rounds: resamplings.
        seed: makes the interval reproducible.
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(values) == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    rng = np.random.default_rng(seed)
    if statistic is None:
        drawn = np.array([rng.choice(values, len(values)).mean() for _ in range(rounds)])
        centre = values.mean()
    else:
        drawn = np.array([statistic(rng.choice(values, len(values))) for _ in range(rounds)])
        centre = statistic(values)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(*(round(float(100 * v), 3) for v in (centre, low, high)), n=len(values))


def paired_difference(ours: Sequence[float], theirs: Sequence[float], rounds: int = 1000, seed: int = 0) -> Interval:
    """Mean difference of two models on the same samples, in points, with a 95% bootstrap interval.

    Raises:
        ValueError: the lists differ in length.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"a paired comparison needs the same samples: {len(ours)} and {len(theirs)} scores were given.")
    return bootstrap(np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64), rounds=rounds, seed=seed)
