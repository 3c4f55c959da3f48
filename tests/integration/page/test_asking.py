"""An image, a question, an answer: uploads, streams, errors, keys."""

from __future__ import annotations

import base64
import threading
import time

import pytest
from PIL import Image

from pipelines.serving.backend import Failure
from tests.page import HEIGHT, WIDTH, Server, ask, expect, new_context, upload, upload_image, wait_for_answer
from tests.serving_model import make_image


def test_upload_ask_and_stream(page, server):
    server.model.text, server.model.permits = "one two six ten five", threading.Semaphore(0)
    upload(page)
    ask(page, "count")
    for beginning in ("one", "one two", "one two six"):  # each comes once the one before is shown
        server.model.permits.release()
        expect(page.locator(".message.assistant > span")).to_have_text(beginning)
    server.model.permits.release(100)
    assert wait_for_answer(page) == server.model.text
    (job,) = server.model.jobs
    assert job.messages[0].text == "count" and (job.messages[0].images[0].width, job.messages[0].images[0].height) == (
        WIDTH,
        HEIGHT,
    )
    assert "Answer: one two" in page.locator("#announcer").text_content(), "screen readers hear the whole answer"


def test_the_stop_button_stops_the_model(page, server):
    server.model.text, server.model.pause_s = "word " * 100_000, 0.02
    upload(page)
    ask(page, "go on")
    expect(page.locator(".message.assistant > span")).to_contain_text("word word word")
    page.click("#stop")
    assert "stopped" in page.locator(".message.assistant footer").inner_text()
    deadline = time.monotonic() + 60
    while not server.model.closed and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.model.closed == 1
    assert page.is_visible("#send")


def test_an_error_is_shown_and_can_be_tried_again(page, server):
    server.model.error = Failure("the model is busy.", "unavailable")
    upload(page)
    ask(page, "hi")
    page.wait_for_selector(".message.error")
    assert "the model is busy. Try again in about 5 s." in page.locator(".message.error").inner_text()
    page.click(".message.error button")
    assert wait_for_answer(page) == "hello"
    assert page.locator(".message.error").count() == 0


def test_a_connection_that_breaks_is_told_and_can_be_tried_again(page, server):
    server.model.text, server.model.permits = "one two six", threading.Semaphore(1)
    upload(page)
    ask(page, "count")
    expect(page.locator(".message.assistant > span")).to_have_text("one")
    server.cut_connections()
    page.wait_for_selector(".message.error")
    assert "The connection ended in the middle of the answer." in page.locator(".message.error").inner_text()
    page.problems.clear()  # the browser's own line about it
    server.model.permits.release(100)
    page.click(".message.error button")
    assert wait_for_answer(page) == "one two six"


@pytest.mark.parametrize(
    ("kind", "side", "called"), [("PNG", 2600, ""), ("PNG", 60, ""), ("AVIF", 60, ""), ("AVIF", 60, "jpeg")]
)
def test_what_a_browser_shows_is_what_the_model_gets(page, server, kind, side, called):
    """Also a format that the server does not read; and transparency is white, whoever lays it on something."""
    image = Image.new("RGBA", (side, 40), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, side // 2, 40))
    upload_image(page, image, kind, called)
    ask(page, "what is it?")
    assert wait_for_answer(page) == "hello"
    pixels = server.model.jobs[0].messages[0].images[0].pixels  # 16 x 16
    assert (abs(pixels[:, 8, 2].astype(int) - [255, 0, 0]) < 10).all() and (pixels[:, 8, 13] > 245).all()


def give(page, kind, files, texts=()):
    """Paste or drop files of (name, type, bytes) and texts of (type, text); whether the page took them."""
    files = [(name, mime, base64.b64encode(data).decode()) for name, mime, data in files]
    return page.evaluate(
        """([kind, files, texts]) => {
        const transfer = new DataTransfer();
        for (const [name, type, data] of files)
            transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, {type}));
        for (const [type, text] of texts) transfer.setData(type, text);
        const options = {bubbles: true, cancelable: true};
        const event = kind === 'paste' ? new ClipboardEvent('paste', {clipboardData: transfer, ...options})
                                       : new DragEvent('drop', {dataTransfer: transfer, ...options});
        return !document.body.dispatchEvent(event); }""",
        [kind, files, texts],
    )


CAT = ("cat.png", "image/png", make_image(width=50, height=30))


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_pasted_and_dropped_images_are_taken(page, kind):
    assert give(page, kind, [CAT])
    page.wait_for_selector("#stage:not([hidden])")
    assert "50 × 30" in page.locator("#caption").inner_text()


def test_a_pasted_text_stays_text_though_an_office_program_adds_its_image(page):
    assert not give(page, "paste", [CAT], [("text/plain", "a cell"), ("text/html", "<td>a cell</td>")])
    assert give(page, "paste", [CAT], [("text/plain", "cat.png")]), "a file that was copied in a file manager"


def test_of_several_dropped_files_the_first_image_is_shown_and_the_others_are_told(page):
    give(page, "drop", [("notes.pdf", "application/pdf", b"%PDF"), CAT, CAT, CAT])
    page.wait_for_selector("#stage:not([hidden])")
    assert page.locator("#caption").inner_text().startswith("cat.png")
    assert "One image at a time: cat.png is shown, 2 more" in page.locator(".message.note").first.inner_text()


def test_the_image_that_was_chosen_last_is_shown(page):
    give(page, "drop", [("large.png", "image/png", make_image(width=4000, height=3000))])
    give(page, "drop", [CAT])
    page.wait_for_selector("#stage:not([hidden])")
    page.wait_for_timeout(1500)  # the large one is read by then
    assert page.locator("#caption").inner_text().startswith("cat.png") and page.locator(".error").count() == 0


def test_a_line_of_pixels_is_an_image(page, server):
    upload(page, 9000, 2)
    ask(page, "what is it?")
    assert wait_for_answer(page) == "hello"
    image = server.model.jobs[0].messages[0].images[0]
    assert (image.width, image.height) == (2048, 1)


def test_what_is_no_image_is_refused_with_a_sentence(page):
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"})
    page.wait_for_selector(".message.error")
    assert "notes.txt is not an image" in page.locator(".message.error").inner_text()


def test_a_huge_photograph_is_shrunk_before_it_is_sent_and_its_own_pixels_are_told(page, server):
    server.model.text = "{<10><20><50><60>}"
    upload(page, 2600, 650)
    assert "2600 × 650 pixels" in page.inner_text("#caption")
    ask(page, "the dog", "refer")
    assert wait_for_answer(page) == "the dog at (260, 130) – (1300, 390) px"
    image = server.model.jobs[0].messages[0].images[0]
    assert (image.width, image.height) == (2048, 512)


def test_an_error_is_seen_above_the_composer(page, server):
    upload(page)
    server.model.text = "a line\n" * 60
    ask(page, "long")
    wait_for_answer(page)
    page.locator("#messages").evaluate("e => { e.scrollTop = 0; }")
    server.model.error = Failure("the model is busy.", "unavailable")
    ask(page, "again")
    page.wait_for_selector(".message.error")
    error, form = page.locator(".message.error").bounding_box(), page.locator("#form").bounding_box()
    assert error["y"] + error["height"] <= form["y"] + 1


def test_a_key_that_is_not_given_is_asked_for_with_the_next_question(browser):
    """Not every three seconds, over whatever somebody reads."""
    server = Server(api_keys=["open sesame"])
    context = new_context(browser)
    page = context.new_page()
    page.clock.install()
    page.goto(server.url)
    page.wait_for_selector("#key-dialog[open]")
    page.click("#key-dialog button[value=cancel]")
    expect(page.locator("#status-text")).to_have_text("needs an API key")
    page.clock.run_for(20_000)
    assert page.locator("#key-dialog[open]").count() == 0
    ask(page, "hi")
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "open sesame")
    page.click("#key-dialog button[value=ok]")
    assert wait_for_answer(page) == "hello"
    expect(page.locator("#status-text")).to_have_text("tinygpt-v")
    context.close()
    server.stop()


def test_a_key_is_asked_for(browser):
    server = Server(api_keys=["open sesame"])
    context = new_context(browser)
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "open sesame")
    page.click("#key-dialog button[value=ok]")
    page.wait_for_selector("#status[data-state=ready]")
    ask(page, "hi")
    assert wait_for_answer(page) == "hello"
    context.close()
    server.stop()
