"""The page of a comparison: two models on the same questions, numbers first, then the answers that differ.

One file: images are embedded, nothing is loaded from a network.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from string import Template

from pipelines.evaluation.compare import Comparison, same_questions
from pipelines.evaluation.page import STYLE, data_url, drawn_case, html_table, truth_text
from pipelines.evaluation.scoring import Prediction

COMPARISON_PAGE = "comparison.html"

Pair = tuple[Prediction, Prediction]


def comparison_page(
    compared: Mapping[str, Comparison],
    ours: Sequence[Prediction],
    theirs: Sequence[Prediction],
    titles: tuple[str, str],
    num_cases: int,
) -> str:
    """The page as HTML.

    Args:
        compared: benchmark -> its numbers.
        ours: predictions of one model (after).
        theirs: predictions of the other (before).
        titles: names of ours and theirs.
        num_cases: questions shown per benchmark and direction.
    """
    pairs = list(same_questions(ours, theirs))
    sections = [
        _section(name, [pair for pair in pairs if pair[0]["benchmark"] == name], num_cases) for name in compared
    ]
    return _PAGE.substitute(
        style=STYLE,
        ours=html.escape(titles[0]),
        theirs=html.escape(titles[1]),
        table=_table(compared),
        sections="".join(sections),
    )


def _table(compared: Mapping[str, Comparison]) -> str:
    head = ("benchmark", "before", "after", "difference", "95% interval", "p", "better", "worse", "questions")
    rows = [
        (
            f'<a href="#{html.escape(name)}">{html.escape(name)}</a>',
            f"{found['theirs']:.1f}",
            f"<b>{found['ours']:.1f}</b>",
            f"{found['difference']:+.1f}",
            f"{found['low']:+.1f} .. {found['high']:+.1f}",
            f"{found['p']:.4f}",
            str(found["better"]),
            str(found["worse"]),
            f"{found['n']:,}",
        )
        for name, found in compared.items()
    ]
    return html_table(head, rows)


def _section(name: str, pairs: Sequence[Pair], num_cases: int) -> str:
    by_gain = sorted(pairs, key=lambda pair: pair[1]["score"] - pair[0]["score"])
    better = [pair for pair in by_gain if pair[0]["score"] > pair[1]["score"]]
    worse = [pair for pair in reversed(by_gain) if pair[0]["score"] < pair[1]["score"]]
    same = [pair for pair in pairs if pair[0]["score"] == pair[1]["score"]]
    groups = (("Better after", better), ("Worse after", worse), ("The same score", same))
    shown = "".join(
        f"<h3>{title}: {len(found)}</h3><div class=cases>{''.join(map(_case, found[:num_cases]))}</div>"
        for title, found in groups
        if found
    )
    return f'<section id="{html.escape(name)}"><h2>{html.escape(name)}</h2>{shown}</section>'


def _case(pair: Pair) -> str:
    after, before = pair
    drawn = drawn_case(after, other=before["answer"] or "")
    image = f'<img loading="lazy" alt="" src="{data_url(drawn)}">' if drawn else "<div class=none>no image</div>"
    change = "right" if after["score"] > before["score"] else "wrong" if after["score"] < before["score"] else "same"
    return (
        f'<figure class="{change}">{image}<figcaption><p>{html.escape(after["instruction"])}</p><dl>'
        f"<dt>truth</dt><dd>{html.escape(truth_text(after['truth']))}</dd>"
        f"<dt>before</dt><dd>{html.escape(before['answer'] or '')} ({before['score']:.2f})</dd>"
        f"<dt>after</dt><dd>{html.escape(after['answer'] or '')} ({after['score']:.2f})</dd></dl></figcaption></figure>"
    )


_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Before and after</title>
<style>$style</style></head><body>
<h1>Before and after</h1><p class="what">before: $theirs<br>after: $ours</p>
$table
<p class="key">Scores in per cent. The interval and p are of the paired difference over the same questions: the two
models differ where the interval leaves out 0. <span style="color:#26a65b">Green box</span>: true.
<span style="color:#e63946">Red box</span>: after. <span style="color:#e08c00">Orange box</span>: before.</p>
$sections
</body></html>
""")
