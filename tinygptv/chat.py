"""Ask about images without a server.

python -m tinygptv.chat photo.jpg "what is the dog doing?"
python -m tinygptv.chat photo.jpg --task refer "the dog"           writes photo.boxes.png
python -m tinygptv.chat photo.jpg                                  asks until an empty line
python -m tinygptv.chat photos/ "describe it" --output answers.jsonl
python -m tinygptv.chat questions.jsonl --output answers.jsonl

A line of questions.jsonl is {"image": FILE, "question": TEXT}, with "task" and "box" as --task and --box.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    # Threads that wait for each other sleep. Those that spin are a sixth faster on an idle machine, and fourteen times
    # slower beside other work. OpenMP reads it when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tinygptv.data.boxes import parse_boxes, to_pixels
from tinygptv.data.conversation import TASKS, ChatImage, ChatMessage, task_instruction, task_of
from tinygptv.data.drawing import draw_boxes
from tinygptv.data.images import open_image
from tinygptv.inference.assistant import Assistant
from tinygptv.inference.loading import load_for_inference
from tinygptv.inference.sampling import SamplingParams
from tinygptv.json_object import JsonObject
from tinygptv.miniature.backbones import shipped_model

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}


@dataclass(frozen=True)
class Question:
    """One line of a batch.

    Attributes:
        image: its file.
        text: the words; empty where the task needs none.
        task: that words them, or None.
        row: what the row of the answer repeats.
        box: that ``identify`` asks about, as it was given.
    """

    image: Path
    text: str
    task: str | None
    row: JsonObject
    box: object = None


@dataclass(frozen=True)
class LoadedImage:
    """A single image: its file's bytes, and itself, upright."""

    data: bytes
    image: Image.Image


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m tinygptv.chat") -> int:
    """The command line; returns the exit status."""
    options = _parse(argv, prog)
    try:
        params = SamplingParams(
            max_tokens=options.max_tokens, temperature=options.temperature, top_p=options.top_p, seed=options.seed
        )
        if options.batch_size < 1:
            raise ValueError(f"--batch-size {options.batch_size} is no number of answers: give 1 or more.")
        # All files and options are checked before the model is loaded, which may take minutes.
        box = _read_box(options)
        source = _read_questions(options, box)
        if isinstance(source, LoadedImage) and options.question is not None:
            _worded(options, source, options.question, box)
        _check_device(options.device)
        _check_output(options, options.output if isinstance(source, list) else options.draw)
        model, processor = load_for_inference(options.model or shipped_model(), options.device)
        assistant = Assistant(model, processor, max_batch_size=options.batch_size)
        if isinstance(source, list):
            return _answer_batch(assistant, source, params, options.output)
        return _converse(assistant, options, source, box, params)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _parse(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", type=Path, help="an image, a folder of images, or a .jsonl file of questions")
    parser.add_argument("question", nargs="?", help="without it, questions are read from the terminal")
    parser.add_argument("--model", help="checkpoint or artifact folder; without it, the shipped miniature")
    parser.add_argument("--task", choices=TASKS, help="word the question as this task")
    parser.add_argument("--box", help="x1,y1,x2,y2 in pixels, for --task identify")
    parser.add_argument("--draw", type=Path, help="where the image with boxes goes [<image>.boxes.png, here]")
    parser.add_argument("--output", type=Path, default=Path("answers.jsonl"), help="answers of a folder or .jsonl file")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--batch-size", type=int, default=16, help="answers generated together")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    return parser.parse_intermixed_args(argv)  # options may stand between the image and the question


# ---------------------------------------------------------------------------------------------------- checks


def _read_box(options: argparse.Namespace) -> tuple[float, ...] | None:
    if options.box is None:
        return None
    try:
        box = tuple(float(value) for value in options.box.split(","))
    except ValueError:
        box = ()
    if len(box) != 4 or options.task != "identify":
        raise ValueError(f"--box {options.box} must be x1,y1,x2,y2 in pixels, and goes with --task identify.")
    return box


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)


def _check_device(device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"--device {device} is unknown: give cpu, cuda or cuda:<number>.") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch {torch.__version__} finds no CUDA GPU here.")


def _check_output(options: argparse.Namespace, path: Path | None) -> None:
    """The file that will be written: its folder exists, and it is not the input."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: {'it is a folder' if path.is_dir() else 'its folder is missing'}.")
    if path.exists() and options.image.exists() and path.samefile(options.image):
        raise ValueError(f"{path} is the input: give another file to write to.")
    if path == options.draw:
        if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:  # some are only read
            raise ValueError(f"--draw {path} is no name of an image file: end it with .png or .jpg.")
    elif path.exists() and not _is_answers(path):
        raise ValueError(f"{path} exists and holds no answers of this command: give another --output.")


def _is_answers(path: Path) -> bool:
    """Whether a file is empty or what an earlier run wrote, and may be replaced."""
    with path.open("rb") as file:
        line = file.readline()
    try:
        return not line or not {"answer", "error"}.isdisjoint(json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return False


# ---------------------------------------------------------------------------------------------------- one image


def _worded(options: argparse.Namespace, loaded: LoadedImage, text: str, box: Sequence[float] | None) -> str:
    """The question, worded as the task of the command line."""
    size = loaded.image.width, loaded.image.height
    return task_instruction(options.task, text, box, size) if options.task else text


def _converse(
    assistant: Assistant,
    options: argparse.Namespace,
    loaded: LoadedImage,
    box: Sequence[float] | None,
    params: SamplingParams,
) -> int:
    image = assistant.open(loaded.data)
    turns: list[ChatMessage[ChatImage]] = []
    for text in [options.question] if options.question is not None else _prompted():
        try:
            question = _worded(options, loaded, text, box)
        except ValueError as error:
            if options.question is not None:
                raise
            print(f"error: {error}", file=sys.stderr)
            continue
        is_task = task_of(question) is not None  # asked without the turns before: no checkpoint was trained on these
        messages = [*([] if is_task else turns)]
        messages.append(ChatMessage("user", question, () if messages else (image,)))
        answer = _stream(assistant, messages, params)
        if not is_task:
            turns = [*messages, ChatMessage("assistant", answer)]
        if parse_boxes(answer):
            path = options.draw or Path(f"{options.image.stem}.boxes.png")
            draw_boxes(loaded.image, answer).save(path)
            print(f"boxes drawn in {path}", file=sys.stderr)
    return 0


def _prompted() -> Iterator[str]:
    """Lines from the terminal until an empty one or its end."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def _stream(assistant: Assistant, messages: Sequence[ChatMessage[ChatImage]], params: SamplingParams) -> str:
    answer = ""
    for delta in assistant.iterate(messages, params):
        if delta.finish_reason == "error":
            raise ValueError(delta.error)
        answer += delta.text
        print(delta.text, end="", flush=True)
    print()
    return answer


# ---------------------------------------------------------------------------------------------------- many images


def _read_questions(options: argparse.Namespace, box: Sequence[float] | None = None) -> list[Question] | LoadedImage:
    """Questions of a folder or a .jsonl file, or a single image."""
    path: Path = options.image
    if path.is_dir():
        if not options.question and options.task not in ("caption", "grounding") and box is None:
            raise ValueError(f"{path} is a folder: give the question to ask about each of its images.")
        images = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise ValueError(f"{path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        return [_question({"image": str(p)}, p, options, box) for p in images]
    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    if path.suffix != ".jsonl":
        data = path.read_bytes()
        return LoadedImage(data, open_image(data, str(path)))
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # not splitlines: JSON's texts may hold its other line ends
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}.") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            questions.append(_question(row, path.parent / row["image"], options, box))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f'{path}, line {number} is not {{"image": ..., "question": ...}}: {error}') from error
    if not questions:
        raise ValueError(f'{path} has no lines: write {{"image": ..., "question": ...}} in each.')
    return questions


def _question(row: JsonObject, image: Path, options: argparse.Namespace, box: Sequence[float] | None) -> Question:
    """A row's own question, task and box, or those of the command line."""
    text, task = row.get("question", options.question), row.get("task", options.task)
    for name, value in (("question", text), ("task", task)):
        if not isinstance(value, str | None):
            raise ValueError(f"{name} is {value!r:.80}, which is no text")
    default = list(box) if box is not None and task == "identify" else None
    return Question(image, text or "", task, row, row.get("box", default))


def _answer_batch(assistant: Assistant, questions: list[Question], params: SamplingParams, output: Path) -> int:
    """Answer all questions, several at a time; rows come out in order, failures with their reason."""
    num_failed = 0
    # Half a surrogate pair is written as JSON escapes it.
    text_file = output.open("w", encoding="utf-8", errors="backslashreplace")
    with text_file as file, ThreadPoolExecutor(2 * assistant.max_batch_size) as pool:
        for row in pool.map(lambda question: _answer_one(assistant, question, params), questions):
            num_failed += "error" in row
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(questions) - num_failed} answers, {num_failed} failures: {output}")
    return int(num_failed == len(questions) > 0)


def _answer_one(assistant: Assistant, question: Question, params: SamplingParams) -> dict[str, object]:
    try:
        image: ChatImage = assistant.open(question.image.read_bytes())
        text = question.text
        if question.task:
            box: Any = question.box
            if box is not None and not _is_box(box):
                raise ValueError(f"box {box!r:.80} must be [x1, y1, x2, y2] in pixels.")
            text = task_instruction(question.task, text, box, (image.width, image.height))
        answer = assistant.answer([ChatMessage("user", text, (image,))], params)
    except (OSError, ValueError, RuntimeError) as error:
        return {**question.row, "error": str(error)}
    size = (image.width, image.height)
    boxes = [{"label": b.phrase, "box": [round(v, 2) for v in to_pixels(b.box, *size)]} for b in parse_boxes(answer)]
    return {**question.row, "answer": answer, "boxes": boxes}


if __name__ == "__main__":
    sys.exit(main())
