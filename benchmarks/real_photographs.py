"""Real photographs through the whole pipeline: ingest of web tars, then questions, choices, boxes and captions scored.

    python benchmarks/real_photographs.py --data DIR                        the shipped miniature
    python benchmarks/real_photographs.py --data DIR --checkpoint DIR --limit 50

``--data`` is a folder with ``questions.jsonl``, ``boxes.jsonl``, ``phrases.jsonl``, ``captions.jsonl`` (one object per
line, each with ``image``, a path below the folder) and ``shards/*.tar``. None of it ships with the project. A model of
the drawn world knows no photograph: its scores say that real files go through, and what guessing gives.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.data.ingest.job import ingest
from pipelines.evaluation.benchmarks.base import Benchmark, Question, Statistics
from pipelines.evaluation.benchmarks.choices import POPE_STATISTICS, score_choice, score_pope
from pipelines.evaluation.benchmarks.files import DataFolder, read_lines
from pipelines.evaluation.benchmarks.grounding import OVERLAPS, score_refer
from pipelines.evaluation.benchmarks.vqa import ask
from pipelines.evaluation.run import evaluate
from pipelines.evaluation.scoring import score_table
from pipelines.settings import PrepareDataSettings, ScoreSettings
from tinygptv.metrics.metrics import exact_match, vqa_accuracy
from tinygptv.miniature.backbones import shipped_model

Entry = dict[str, Any]
ToQuestion = Callable[[Entry], dict[str, Any]]


def read_questions(file: str, chosen: Callable[[Entry], bool], question: ToQuestion) -> Any:
    """A benchmark's ``read``: the chosen lines of a file, each made a question."""

    def read(data: DataFolder) -> Iterator[Question]:
        for number, entry in enumerate(read_lines(data.root / file)):
            if chosen(entry):
                kind = entry.get("task", entry.get("kind", ""))
                yield Question(id=str(number), image=data.root / entry["image"], kind=kind, **question(entry))

    return read


def short_answer(entry: Entry) -> dict[str, Any]:
    return {"instruction": ask("vqa", entry["question"]), "truth": {"answers": entry["answers"]}}


def yes_or_no(entry: Entry) -> dict[str, Any]:
    return {"instruction": ask("vqa", entry["question"]), "truth": {"answer": entry["answer"]}}


def statement(entry: Entry) -> dict[str, Any]:
    return {"instruction": ask("true_false", entry["question"]), "truth": {"answer": entry["answer"]}}


def choice(entry: Entry) -> dict[str, Any]:
    return {**yes_or_no(entry), "choices": tuple(entry["choices"])}


def location(name: str) -> ToQuestion:
    """Where is what this field names?"""

    def question(entry: Entry) -> dict[str, Any]:
        truth = {"box": entry["box"], "width": entry["width"], "height": entry["height"]}
        return {"instruction": ask("refer", entry[name]), "truth": truth}

    return question


def caption(entry: Entry) -> dict[str, Any]:
    return {"instruction": ask("caption"), "truth": {"answers": entry["captions"]}}


def read_single_boxes(data: DataFolder) -> Iterator[Question]:
    """Boxes whose category is named, and in the image once: for others 'where is the dog?' has no one answer."""
    count = Counter(_what(entry) for entry in read_lines(data.root / "boxes.jsonl"))

    def is_single(entry: Entry) -> bool:
        return "category" in entry and count[_what(entry)] == 1

    yield from read_questions("boxes.jsonl", is_single, location("category"))(data)


def _what(entry: Entry) -> tuple[str, str]:
    return entry["image"], entry.get("category", "")


def has_task(*beginnings: str) -> Callable[[Entry], bool]:
    return lambda entry: entry["task"].startswith(beginnings)


def overlap_benchmark(name: str, read: Any) -> Benchmark:
    return Benchmark(name, "IoU > 0.5", read, score_refer, statistics=OVERLAPS)


def make_benchmarks() -> list[Benchmark]:
    """What the folder's files make."""
    file, everything = "questions.jsonl", lambda entry: True
    pope: Statistics = POPE_STATISTICS
    return [
        Benchmark(
            "real_vqa",
            "VQA accuracy",
            read_questions(file, has_task("vqav2", "aokvqa"), short_answer),
            lambda answer, truth: vqa_accuracy(answer, truth["answers"]),
        ),
        Benchmark(
            "real_choice",
            "accuracy",
            read_questions(file, has_task("aokvqa", "sugarcrepe", "valse"), choice),
            score_choice,
            generates=False,
        ),
        Benchmark("real_pope", "F1", read_questions(file, has_task("pope"), yes_or_no), score_pope, statistics=pope),
        Benchmark(
            "real_vsr",
            "exact match",
            read_questions(file, has_task("vsr"), statement),
            lambda answer, truth: exact_match(answer, truth["answer"]),
        ),
        overlap_benchmark("real_phrase", read_questions("phrases.jsonl", everything, location("phrase"))),
        overlap_benchmark("real_box", read_single_boxes),
        Benchmark(
            "real_caption",
            "ROUGE-L",
            read_questions("captions.jsonl", everything, caption),
            lambda answer, truth: rouge_l(answer.lower(), [text.lower() for text in truth["answers"]]),
            max_new_tokens=64,
        ),
    ]


def rouge_l(prediction: str, references: Sequence[str], beta: float = 1.2) -> float:
    """ROUGE-L as the COCO caption evaluation computes it: longest common subsequence of words.

    Args:
        prediction: generated caption.
        references: true captions; best precision and best recall over them are combined.
        beta: weight of recall over precision.
    """
    words = prediction.split()
    lengths = [(_common_length(words, reference.split()), len(reference.split())) for reference in references]
    precision = max(common / max(len(words), 1) for common, _ in lengths)
    recall = max(common / max(length, 1) for common, length in lengths)
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision) if precision else 0.0


def _common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def ingest_tars(data: Path, output: Path) -> dict[str, Any]:
    """The captioned photographs' tars, as the web pairs of stage 1."""
    fields = {"source": "laion", "input": str(data / "shards/*.tar"), "output": str(output), "tracking_uri": "none"}
    return ingest(PrepareDataSettings(**fields, quiet=True))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the photographs and their questions")
    parser.add_argument("--checkpoint", default="", help="checkpoint or artifact; empty: the shipped model")
    parser.add_argument("--output", type=Path, default=None, help="keep predictions and page here")
    parser.add_argument("--limit", type=int, default=0, help="questions per benchmark; 0 takes all")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        output = arguments.output or Path(folder)
        found = ingest_tars(arguments.data.absolute(), output / "shards")
        counts = ("rows_in", "rows_out", "duplicates", "filtered", "quarantined")
        print("ingest:", json.dumps({key: found[key] for key in counts}))
        settings = ScoreSettings(
            checkpoint=arguments.checkpoint or str(shipped_model()),
            data=str(arguments.data),
            output=str(output / "score"),
            limit=arguments.limit,
            num_workers=0,
            tracking_uri="none",
            quiet=True,
        )
        result = evaluate(settings, make_benchmarks())
        print(score_table(result["benchmarks"]))
        for name, entry in result["benchmarks"].items():
            parts = {part.partition("/")[2]: f"{p['value']:.1f} ({p['n']})" for part, p in entry["parts"].items()}
            print(f"{name}: {entry['also']} {parts}")
        print(f"{result['questions_per_second']} questions/s")


if __name__ == "__main__":
    main()
