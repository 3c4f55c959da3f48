"""A gallery of what a model answers: right and wrong cases of every benchmark, images with their boxes, as Markdown.

    python jobs/score.py --config configs/mini.yaml checkpoint=DIR data=WORLD output=outputs/score
    python benchmarks/gallery.py outputs/score docs/gallery.md

Cases are taken evenly from the predictions, in their order: nothing is picked by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.evaluation.page import drawn_case, truth_text
from pipelines.evaluation.scoring import PREDICTIONS
from tinygptv.data.prompts import IMAGE_PLACEHOLDER

SIDE = 220
"""Longer side of an image in pixels."""

Row = dict[str, Any]


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """``count`` rows at even distances."""
    return [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]


def cases(rows: Sequence[Row], right: int, wrong: int) -> list[Row]:
    """Right and wrong cases, each spread over all there are."""
    good = [row for row in rows if row["score"] >= 1]
    bad = [row for row in rows if row["score"] < 1]
    return spread(good, right) + spread(bad, wrong)


def question_text(row: Row) -> str:
    """What was asked, earlier turns included, without the image mark."""
    turns = [f"{asked} — *{answered}*" for asked, answered in row["history"]]
    texts = [*turns, row["instruction"]]
    return "<br>".join(" ".join(t.replace(f"<Img>{IMAGE_PLACEHOLDER}</Img>", "").split()) for t in texts)


def escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    for mark in "\\`<>|*_{}[]":
        text = text.replace(mark, f"&#{ord(mark)};")
    return text


def write_gallery(score: Path, target: Path, right: int, wrong: int) -> int:
    """Write ``target`` and its images, into a folder of its name.

    Args:
        score: output folder of ``jobs/score.py``.
        target: the Markdown file.
        right: right cases per benchmark.
        wrong: wrong cases per benchmark.

    Returns:
        Number of cases.
    """
    rows = [json.loads(line) for line in (score / PREDICTIONS).read_text().splitlines()]
    pictures = target.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Gallery",
        "",
        "Right and wrong answers about held-out scenes, taken evenly from the predictions by `benchmarks/gallery.py`. "
        "For referring expressions the green box is the true one, the red one the model's.",
    ]
    count = 0
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        lines += ["", f"## {name}", "", "| | asked | answered | true | |", "|---|---|---|---|---|"]
        for row in cases([r for r in rows if r["benchmark"] == name], right, wrong):
            picture = drawn_case(row, SIDE)
            if picture is None:
                continue
            picture.convert("RGB").save(pictures / f"{row['id']}.jpg", quality=85, optimize=True)
            mark = "right" if row["score"] >= 1 else f"wrong ({row['score']:.2f})" if row["score"] else "wrong"
            asked, answered, true = (
                question_text({**row, "instruction": escape(row["instruction"])}),
                escape(row["answer"] or ""),
                escape(truth_text(row["truth"])),
            )
            lines.append(f"| ![]({pictures.name}/{row['id']}.jpg) | {asked} | {answered} | {true} | {mark} |")
            count += 1
    target.write_text("\n".join(lines) + "\n")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("score", type=Path, help="output folder of jobs/score.py")
    parser.add_argument("target", type=Path, help="Markdown file to write")
    parser.add_argument("--right", type=int, default=4)
    parser.add_argument("--wrong", type=int, default=2)
    options = parser.parse_args()
    print(f"{write_gallery(options.score, options.target, options.right, options.wrong)} cases in {options.target}")


if __name__ == "__main__":
    main()
