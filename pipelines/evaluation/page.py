"""The page of a score run: the table, then images with true and predicted boxes or answers, worst cases first.

One file: images are embedded, nothing is loaded from a network.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template

from PIL import Image, ImageDraw

from pipelines.evaluation.answers import VIEWS
from pipelines.evaluation.benchmarks.base import Truth
from pipelines.evaluation.scoring import BenchmarkScore, PartScore, Prediction, format_number
from tinygptv.data.boxes import ordered, parse_answer_box, parse_boxes, to_pixels
from tinygptv.data.drawing import draw_boxes
from tinygptv.data.images import open_image

TRUE_COLOUR, PREDICTED_COLOUR, OTHER_COLOUR = (38, 166, 91), (230, 57, 70), (224, 140, 0)
_SIDE = 320


def worst_first(lines: Sequence[Prediction]) -> list[Prediction]:
    """Least score first; among equals, those that a blank image answers better, then the benchmark's order."""
    return sorted(lines, key=lambda line: (line["score"], -(line["blind_score"] or 0.0)))


def drawn_case(line: Prediction, side: int = _SIDE, other: str = "") -> Image.Image | None:
    """The image of a question with the true box in green and the predicted in red, where it has boxes.

    Args:
        line: a line of ``predictions.jsonl``.
        side: longer side of the result, in pixels.
        other: the answer of another model, whose box is drawn in orange.

    Returns:
        None where there is no image, or it cannot be opened.
    """
    if not line["image"]:
        return None
    try:
        image = open_image(Path(line["image"]).read_bytes())
    except (OSError, ValueError):
        return None
    scale = side / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    truth, answer = line["truth"], line["answer"] or ""
    if "box" in truth:
        scaled = _scale(truth["box"], image.width / truth["width"], image.height / truth["height"])
        _outline(image, scaled, TRUE_COLOUR)
        for text, colour in ((other, OTHER_COLOUR), (answer, PREDICTED_COLOUR)):
            found = parse_answer_box(text)
            if found:
                _outline(image, to_pixels(found, *image.size), colour)
    elif parse_boxes(answer):
        image = draw_boxes(image, answer)
    return image


def _scale(box: Sequence[float], across: float, down: float) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box
    return (x1 * across, y1 * down, x2 * across, y2 * down)


def _outline(image: Image.Image, box: Sequence[float], colour: tuple[int, int, int]) -> None:
    ImageDraw.Draw(image).rectangle(ordered(box), outline=colour, width=3)


def score_page(scores: Mapping[str, BenchmarkScore], lines: Sequence[Prediction], title: str, num_cases: int) -> str:
    """The page as HTML.

    Args:
        scores: benchmark -> its numbers (``scoring.score_benchmark``).
        lines: all predictions.
        title: what was scored.
        num_cases: questions shown per benchmark: three quarters the worst ones, the rest the best.
    """
    sections = []
    for name, score in scores.items():
        own = worst_first([line for line in lines if line["benchmark"] == name])
        num_best = min(num_cases // 4, len(own))
        worst = own[: max(0, min(num_cases - num_best, len(own) - num_best))]
        best = own[len(own) - num_best :][::-1] if num_best else []
        sections.append(_section(name, score, worst, best))
    return _PAGE.substitute(
        style=STYLE, title=html.escape(title), table=_score_table(scores), sections="".join(sections)
    )


def _section(name: str, score: BenchmarkScore, worst: Sequence[Prediction], best: Sequence[Prediction]) -> str:
    also = "".join(f"<li>{html.escape(key)}: {value:.1f}</li>" for key, value in score["also"].items())
    problems = "".join(f"<li>{html.escape(problem)}</li>" for problem in score["problems"])
    unanswered = f"<details><summary>{score['unanswered']} without an answer</summary><ul>{problems}</ul></details>"
    return (
        f'<section id="{name}"><h2>{html.escape(name)}</h2><ul class="also">{also}</ul>{_parts(score["parts"])}'
        f"{unanswered if score['unanswered'] else ''}"
        f"<h3>Worst first</h3><div class=cases>{''.join(map(_case, worst))}</div>"
        f"<h3>Best</h3><div class=cases>{''.join(map(_case, best))}</div></section>"
    )


def _score_table(scores: Mapping[str, BenchmarkScore]) -> str:
    head = ("benchmark", "metric", "score", "95% interval", "blind", "shuffled", "questions", "unanswered")
    rows = [
        (
            f'<a href="#{name}">{html.escape(name)}</a>',
            html.escape(score["metric"]),
            f"<b>{format_number(score['value'])}</b>",
            f"{format_number(score['low'])} – {format_number(score['high'])}",
            format_number(score["blind"]),
            format_number(score["shuffled"]),
            f"{score['n']:,}",
            str(score["unanswered"] or ""),
        )
        for name, score in scores.items()
    ]
    return html_table(head, rows)


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{body}</table>"


def _parts(parts: Mapping[str, PartScore]) -> str:
    if not parts:
        return ""
    rows = []
    for name, part in parts.items():
        interval = f"{format_number(part['low'])} – {format_number(part['high'])}"
        rows.append((html.escape(name), format_number(part["value"]), interval, f"{part['n']:,}"))
    table = html_table(("part", "score", "95% interval", "questions"), rows)
    return f"<details><summary>Parts</summary>{table}</details>"


def _case(line: Prediction) -> str:
    drawn = drawn_case(line)
    image = f'<img loading="lazy" alt="" src="{data_url(drawn)}">' if drawn else "<div class=none>no image</div>"
    wrong = "right" if line["score"] >= 1 else "wrong" if line["score"] <= 0 else "partly"
    answers = "".join(
        f"<dt>{view}</dt><dd>{html.escape(text)}</dd>" for view in VIEWS if (text := line[view]) is not None
    )
    problem = f"<dt>problem</dt><dd>{html.escape(line['problem'])}</dd>" if line["problem"] else ""
    return (
        f'<figure class="{wrong}">{image}<figcaption><p>{html.escape(line["instruction"])}</p><dl>'
        f"<dt>truth</dt><dd>{html.escape(truth_text(line['truth']))}</dd>{answers}{problem}"
        f"<dt>score</dt><dd>{line['score']:.2f}</dd></dl></figcaption></figure>"
    )


def truth_text(truth: Truth) -> str:
    """The truth as text, to compare the answer with."""
    if "answers" in truth:
        return ", ".join(dict.fromkeys(truth["answers"]))
    for key in ("answer", "caption", "label"):
        if key in truth:
            return str(truth[key])
    if "box" in truth:
        return "the green box"
    if "phrases" in truth:
        return ", ".join(truth["phrases"])
    if "objects" in truth:
        return "; ".join(" ".join(str(o[k]) for k in ("size", "colour", "texture", "shape")) for o in truth["objects"])
    return json.dumps(truth)


def data_url(image: Image.Image) -> str:
    """An image as a URL that holds its JPEG."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #66758a; --line: #dde3ea; --page: #fbfcfd;
  --good: #26a65b; --bad: #e63946; --half: #e0a100; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf1; --soft: #93a1b3; --line: #2c3744; --page: #131a22; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem; }
h3 { font-size: .95rem; color: var(--soft); margin: 1rem 0 .4rem; }
.what { color: var(--soft); overflow-wrap: anywhere; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .25rem 1.1rem .25rem 0;
  border-bottom: 1px solid var(--line); } td:nth-child(n+3) { font-variant-numeric: tabular-nums; }
.also { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; list-style: none; padding: 0; margin: 0;
  color: var(--soft); }
.cases { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); align-items: start; }
figure { margin: 0; border: 1px solid var(--line); border-left: 5px solid var(--half); border-radius: 8px;
  padding: .6rem; }
figure.right { border-left-color: var(--good); } figure.wrong { border-left-color: var(--bad); }
img { width: 100%; border-radius: 4px; display: block; }
.none { color: var(--soft); padding: 2rem 0; text-align: center; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; } figcaption p { margin: .5rem 0; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .6rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; } summary { cursor: pointer; color: var(--soft); }
.key span { font-weight: 600; } a { color: inherit; }
"""

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Scores</title>
<style>$style</style></head><body>
<h1>Scores</h1><p class="what">$title</p>
$table
<p class="key"><span style="color:#26a65b">Green box</span>: true.
<span style="color:#e63946">Red box</span>: predicted.
Blind answers were given a blank image, shuffled ones the image of another question.</p>
$sections
</body></html>
""")
