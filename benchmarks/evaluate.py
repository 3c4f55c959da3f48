"""Questions per second of the evaluation, next to two plain ways to write it with transformers' ``generate``.

    python benchmarks/evaluate.py                                 the shipped miniature
    python benchmarks/evaluate.py --checkpoint DIR --count 400    another model
    python benchmarks/evaluate.py --checkpoint random             random weights of the miniature's size

* ``one at a time``: read the image, processor, ``generate``, next question.
* ``padded batches``: the same with batches in the benchmark's order, padded on the left.
* ``evaluation``: what ``jobs/score.py`` runs in each of its actors (``pipelines.evaluation.worker``), baselines off.

All three answer the same questions of a drawn world, one process with the same threads, in turns for a few rounds; each
starts from files. ``generate`` has its cache and stops at the end symbol. CPU time per question stays comparable where
others use the machine too. Answers are compared: batches round differently, so a few may differ.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from serving_common import make_checkpoint

from pipelines.evaluation.benchmarks import BENCHMARKS, Question
from pipelines.evaluation.benchmarks.files import DataFolder
from pipelines.evaluation.worker import AnswerOptions, QuestionUnit, UnitAnswerer
from tinygptv.inference.loading import load_for_inference
from tinygptv.miniature.backbones import shipped_model
from tinygptv.miniature.writers import write_world

Way = Callable[[Sequence[Question], int], list[str]]


class PlainLoop:
    """``generate`` on batches of a given size."""

    def __init__(self, checkpoint: str, batch_size: int) -> None:
        self.model, self.processor = load_for_inference(checkpoint)
        self.batch_size = batch_size

    @torch.inference_mode()
    def __call__(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        answers: list[str] = []
        for start in range(0, len(questions), self.batch_size):
            batch = questions[start : start + self.batch_size]
            inputs = self.processor(
                images=[Image.open(question.image).convert("RGB") for question in batch],
                text=[self.processor.apply_chat_template(messages(question)) for question in batch],
            )
            ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            length = inputs["input_ids"].shape[1]
            answers += [self.processor.decode_answer(row[length:]) for row in ids]
        return answers


def messages(question: Question) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.instruction}]}]


class Evaluation:
    """Units of questions, as the evaluation cuts them."""

    def __init__(self, checkpoint: str, batch_size: int) -> None:
        options = AnswerOptions(checkpoint, "", batch_size, baselines=False, released=False, answers_dir="")
        self.answerer, self.unit_size = UnitAnswerer(options), 4 * batch_size

    def __call__(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        answers: list[str] = []
        for number, start in enumerate(range(0, len(questions), self.unit_size)):
            part = tuple(questions[start : start + self.unit_size])
            unit = QuestionUnit("", number, part, max_new_tokens, generates=True, file="")
            answers += [answer.views["answer"].text for answer in self.answerer.answers(unit)]
        return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="", help="folder; empty: the shipped model; 'random': random weights")
    parser.add_argument("--benchmarks", nargs="+", default=["miniature_vqa", "miniature_refer", "miniature_caption"])
    parser.add_argument("--count", type=int, default=192, help="questions of each benchmark")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder, "world")
        write_world(world, 1, max(arguments.count, 8), sources=())
        if arguments.checkpoint == "random":
            checkpoint = str(make_checkpoint(Path(folder, "model")))
        else:
            checkpoint = arguments.checkpoint or str(shipped_model())
        ways: dict[str, Way] = {
            "one at a time": PlainLoop(checkpoint, 1),
            f"padded batches of {arguments.batch_size}": PlainLoop(checkpoint, arguments.batch_size),
            "evaluation": Evaluation(checkpoint, arguments.batch_size),
        }
        print(f"{arguments.threads} threads, {arguments.rounds} rounds, median; {arguments.count} questions each\n")
        print("| benchmark | way | questions/s | times the loop | CPU ms per question | same answers as the loop |")
        print("|---|---|---|---|---|---|")
        for name in arguments.benchmarks:
            measure(name, list(BENCHMARKS[name].read(DataFolder(world)))[: arguments.count], ways, arguments.rounds)


def measure(name: str, questions: Sequence[Question], ways: dict[str, Way], rounds: int) -> None:
    """Run all ways in turns and print a line for each."""
    length = BENCHMARKS[name].max_new_tokens
    answers = {way: answer(questions[:8], length) for way, answer in ways.items()}  # warm
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    cpu_seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, answer in ways.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            answers[way] = answer(questions, length)
            seconds[way].append(time.perf_counter() - started)
            cpu_seconds[way].append(time.process_time() - cpu_started)
    loop, *_ = ways
    for way in ways:
        typical = statistics.median(seconds[way])
        same = sum(a == b for a, b in zip(answers[way], answers[loop], strict=True))
        print(
            f"| {name} | {way} | {len(questions) / typical:.1f} | {statistics.median(seconds[loop]) / typical:.1f} "
            f"| {1000 * statistics.median(cpu_seconds[way]) / len(questions):.0f} | {same} of {len(questions)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
