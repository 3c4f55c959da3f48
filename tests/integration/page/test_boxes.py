"""Boxes in the right location, drawn ones in the request, and no piece of markup for a reader."""

from __future__ import annotations

import pytest

from tests.page import GROUNDED, HEIGHT, WIDTH, ask, expect, upload, wait_for_answer
from tests.paths import ROOT


@pytest.mark.parametrize("size", [(300, 200), (120, 400), (1200, 300)])
def test_boxes_lie_at_the_right_pixels(page, server, size):
    server.model.text = GROUNDED
    upload(page, *size)
    ask(page, "", "grounding")
    assert wait_for_answer(page).replace("\n", "") == "a dog and two cats."
    shown = page.evaluate(
        """() => { const i = document.getElementById('image'), f = i.getBoundingClientRect();
        const s = Math.min(f.width / i.naturalWidth, f.height / i.naturalHeight);
        return {x: f.x + (f.width - s * i.naturalWidth) / 2, y: f.y + (f.height - s * i.naturalHeight) / 2,
                width: s * i.naturalWidth, height: s * i.naturalHeight}; }"""
    )
    wanted = [(10, 20, 50, 60), (60, 0, 100, 50), (0, 70, 20, 100)]
    boxes = page.locator("#overlay .box:not(.shadow)")
    assert boxes.count() == 3
    for i, (x1, y1, x2, y2) in enumerate(wanted):
        # The geometry without the line: what the rectangle's own matrix makes of its corners.
        corners = boxes.nth(i).evaluate(
            """e => { const m = e.getScreenCTM(), b = e.getBBox(), p = (x, y) => new DOMPoint(x, y).matrixTransform(m);
            const a = p(b.x, b.y), c = p(b.x + b.width, b.y + b.height); return [a.x, a.y, c.x, c.y]; }"""
        )
        exact = [
            shown["x"] + x1 / 100 * shown["width"],
            shown["y"] + y1 / 100 * shown["height"],
            shown["x"] + x2 / 100 * shown["width"],
            shown["y"] + y2 / 100 * shown["height"],
        ]
        assert corners == pytest.approx(exact, abs=1.0)
    colours = [boxes.nth(i).get_attribute("stroke") for i in range(3)]
    assert colours == ["#e63946", "#2a9d8f", "#2a9d8f"]
    phrase = page.locator(".phrase").nth(1)
    assert phrase.evaluate("e => getComputedStyle(e).borderBottomColor") == "rgb(42, 157, 143)"
    phrase.focus()
    assert page.locator("#overlay g.lit").count() == 2, "a phrase shows its own boxes"


def test_markup_never_shows_while_it_streams(page, server):
    server.model.text, server.model.pause_s = GROUNDED, 0.02
    upload(page)
    ask(page, "", "grounding")
    seen = set()
    while page.locator(".message.assistant footer").count() == 0:
        seen.add(page.locator(".message.assistant > span").inner_text())
    assert not [text for text in seen if any(mark in text for mark in "<>{}")]


def test_a_drawn_box_is_asked_about(page, server):
    upload(page)
    page.check('input[name=task][value="identify"]', force=True)
    assert page.is_disabled("#send")
    frame = page.locator("#overlay").bounding_box()
    scale = min(frame["width"] / WIDTH, frame["height"] / HEIGHT)
    left = frame["x"] + (frame["width"] - scale * WIDTH) / 2
    top = frame["y"] + (frame["height"] - scale * HEIGHT) / 2
    page.mouse.move(left + 0.8 * WIDTH * scale + 2, top + 0.6 * HEIGHT * scale + 2)
    page.mouse.down()
    page.mouse.move(left + 0.25 * WIDTH * scale + 2, top + 0.105 * HEIGHT * scale + 2, steps=4)
    page.mouse.up()
    assert [page.input_value(f"#box-{side}") for side in ("x1", "y1", "x2", "y2")] == ["25", "11", "80", "60"]
    page.click("#send")
    wait_for_answer(page)
    assert server.model.jobs[0].messages[0].text.endswith("{<25><11><80><60>}")
    page.fill("#box-x1", "5")
    page.click("#send")
    wait_for_answer(page, 2)
    (message,) = server.model.jobs[1].messages  # a task goes without the turns before it
    assert message.text.endswith("{<5><11><80><60>}") and len(message.images) == 1


BROKEN = [
    ("p>p>p>p>a large purple triangle here.", "a large purple triangle here."),
    ("<p>a dog</p> {<10><20><30", "a dog"),
    ("a dog <", "a dog"),
    ("a dog {", "a dog"),
    ("<p>a dog", "a dog"),
    ("<p>a dog</p", "a dog"),
    ("two {<1><2>} dogs <delim>", "two dogs"),
    ("it is <12><3> far <deli", "it is  far"),
    ("3 < 5 and {x}", "3 < 5 and {x}"),
]


@pytest.mark.parametrize(("text", "shown"), BROKEN)
def test_no_piece_of_markup_reaches_a_reader(page, server, text, shown):
    server.model.text, server.model.pause_s = text, 0.03
    upload(page)
    ask(page, "what is it?")
    seen = set()
    while page.locator(".message.assistant footer").count() == 0:
        seen.add(page.locator(".message.assistant > span").inner_text())
    assert wait_for_answer(page).strip() == shown
    half = {"<", "{<", "{<1", "<p", "</", "<d", "<1"}
    assert not [text for text in seen if any(text.endswith(mark) for mark in half)]


def test_no_half_tag_stays_after_stop(page, server):
    upload(page)
    number = 0
    for text, shown in (("a dog <p>one", "a dog one"), ("a dog {<10", "a dog"), ("a dog <", "a dog")):
        server.model.text, server.model.pause_s = text + " " * 100_000, 0.03
        answer = ""
        while answer != shown:  # "a dog" where the tag had not come yet
            number += 1
            assert number < 30
            ask(page, "go on")
            expect(page.locator(".message.assistant > span").nth(number - 1)).to_contain_text("a dog")
            page.wait_for_timeout(300)
            page.click("#stop")
            answer = wait_for_answer(page, number).strip()
            assert answer in ("a dog", shown)


def test_find_says_what_and_where(page, server):
    server.model.text = "{<10><20><50><60>}"
    upload(page)
    ask(page, "the red star", "refer")
    assert wait_for_answer(page) == "the red star at (30, 40) – (150, 120) px"
    assert page.locator("#overlay text").text_content() == "the red star"


def test_page_and_library_use_the_same_colours():
    from tinygptv.data.boxes import COLOURS

    source = (ROOT / "pipelines/serving/ui/markup.js").read_text()
    assert "[" + ", ".join('"#{:02x}{:02x}{:02x}"'.format(*colour) for colour in COLOURS) + "]" in source
