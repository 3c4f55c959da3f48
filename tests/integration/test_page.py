"""The web page in headless Chromium, over a model that says what it is told to; skipped where there is no browser."""

from __future__ import annotations

import asyncio
import base64
import shutil
import socket
import threading
import time

import pytest
import uvicorn

from pipelines.serving.api import build_api
from pipelines.serving.backend import Failure, ModelInfo, Piece, PromptRead
from pipelines.settings import ServeSettings
from tests.paths import ROOT
from tests.serving_model import make_image

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine"),
]

WIDTH, HEIGHT = 300, 200
GROUNDED = "<p>a dog</p> {<10><20><50><60>} and <p>two cats</p> {<60><0><100><50>}<delim>{<0><70><20><100>}."


class ScriptedModel:
    """Answers with ``text``, a few characters at a time; remembers what it was asked."""

    def __init__(self):
        self.text, self.jobs, self.closed, self.pause_s, self.error = "hello", [], 0, 0.01, None
        self.scope, self.healthy, self.most_messages = "drawn scenes", True, 99
        self.reason, self.prompt_tokens = "stop", 5

    async def describe(self):
        return ModelInfo(16, 500, 1, self.scope)

    async def stream(self, job):
        self.jobs.append(job)
        try:
            if self.error:
                error, self.error = self.error, None
                yield error
                return
            if len(job.messages) > self.most_messages:
                yield Failure("the prompt has 549 tokens but the context is 500.", "too_long")
                return
            yield PromptRead(self.prompt_tokens)
            for start in range(0, len(self.text), 4):
                await asyncio.sleep(self.pause_s)
                last = start + 4 >= len(self.text)
                yield Piece(self.text[start : start + 4], finish_reason=self.reason if last else None)
        finally:
            self.closed += 1

    async def complete(self, job):
        return [item async for item in self.stream(job)]

    async def stats(self):
        return []

    async def check_health(self):
        if not self.healthy:
            raise RuntimeError("stuck")


class Server:
    def __init__(self, **settings):
        self.model = ScriptedModel()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        app = build_api(ServeSettings(**settings), self.model)
        self.server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self.port}/"

    def stop(self):
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        quiet += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        browser = driver.chromium.launch(executable_path=BROWSER, args=quiet)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def page(browser, server):
    server.model.__init__()
    yield from open_page(browser, server)


def open_page(browser, server, **options):
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
    page = context.new_page()
    problems, addresses = [], []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: addresses.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("#status[data-state=ready]")
    page.problems = problems
    yield page
    context.close()
    assert [text for text in problems if "status of" not in text] == []
    own = (server.url, "data:", "blob:")
    assert [url for url in addresses if not url.startswith(own)] == [], "the page loads nothing from elsewhere"


def upload(page, width=WIDTH, height=HEIGHT):
    data = make_image(width=width, height=height)
    page.set_input_files("#file", {"name": "dog.png", "mimeType": "image/png", "buffer": data})
    page.wait_for_selector("#stage:not([hidden])")
    return data


def ask(page, text, task=""):
    page.check(f'input[name=task][value="{task}"]', force=True)
    page.fill("#question", text)
    page.press("#question", "Enter")


def wait_for_answer(page, number=1):
    # Not wait_for_function: the page's own policy forbids evaluating strings, and stays in force here.
    playwright.expect(page.locator(".message.assistant footer")).to_have_count(number, timeout=15_000)
    return page.locator(".message.assistant > span").nth(number - 1).inner_text()


def test_upload_ask_and_stream(page, server):
    server.model.text, server.model.pause_s = "one two three four five six seven eight nine ten", 0.1
    upload(page)
    ask(page, "count")
    lengths = set()
    while page.locator(".message.assistant footer").count() == 0:
        lengths.add(len(page.locator(".message.assistant > span").inner_text()))
    assert wait_for_answer(page) == server.model.text
    assert len(lengths) > 2, "the answer grows as it comes"
    (job,) = server.model.jobs
    assert job.messages[0].text == "count" and (job.messages[0].images[0].width, job.messages[0].images[0].height) == (
        WIDTH,
        HEIGHT,
    )
    assert "Answer: one two" in page.locator("#announcer").text_content(), "screen readers hear the whole answer"


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


def test_turns_are_sent_with_their_history_and_one_image(page, server):
    upload(page)
    for number, text in enumerate(("first", "second", "third"), 1):
        ask(page, text)
        wait_for_answer(page, number)
    messages = server.model.jobs[-1].messages
    assert [m.text for m in messages] == ["first", "hello", "second", "hello", "third"]
    assert [len(m.images) for m in messages] == [1, 0, 0, 0, 0]
    page.click("#new-chat")
    assert page.locator(".message").count() == 0 and page.is_visible("#stage"), "a new chat keeps the image"
    ask(page, "fourth")
    wait_for_answer(page)
    (message,) = server.model.jobs[-1].messages
    assert message.text == "fourth" and len(message.images) == 1
    page.click("#remove-image")
    assert page.is_visible("#empty") and page.locator(".message").count() == 0


def test_the_stop_button_stops_the_model(page, server):
    server.model.text, server.model.pause_s = "word " * 500, 0.02
    upload(page)
    ask(page, "go on")
    playwright.expect(page.locator(".message.assistant > span")).to_contain_text("word word word")
    page.click("#stop")
    assert "stopped" in page.locator(".message.assistant footer").inner_text()
    deadline = time.monotonic() + 5
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


def test_pasted_and_dropped_images_are_taken(page):
    data = base64.b64encode(make_image(width=50, height=30)).decode()
    for kind in ("paste", "drop"):
        page.evaluate(
            """([kind, data]) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), transfer = new DataTransfer();
            transfer.items.add(new File([bytes], 'cat.png', {type: 'image/png'}));
            const event = kind === 'paste' ? new ClipboardEvent('paste', {clipboardData: transfer, bubbles: true})
                                           : new DragEvent('drop', {dataTransfer: transfer, bubbles: true});
            document.body.dispatchEvent(event); }""",
            [kind, data],
        )
        page.wait_for_selector("#stage:not([hidden])")
        assert "50 × 30" in page.locator("#caption").inner_text()


def test_what_is_no_image_is_refused_with_a_sentence(page):
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"})
    page.wait_for_selector(".message.error")
    assert "notes.txt is not an image" in page.locator(".message.error").inner_text()


def test_a_huge_photograph_is_shrunk_before_it_is_sent(page, server):
    upload(page, 2600, 650)
    ask(page, "hi")
    wait_for_answer(page)
    image = server.model.jobs[0].messages[0].images[0]
    assert (image.width, image.height) == (2048, 512)


def test_examples_can_be_clicked(page, server):
    assert page.locator("#examples button").count() == 4
    page.click("#examples li:nth-child(2) button")
    wait_for_answer(page)
    assert page.locator(".message.note").count() == 0, "an example is a scene that the model knows"
    assert server.model.jobs[0].messages[0].text == "[refer] give me the location of the yellow square"


def test_the_page_says_what_the_model_knows(page, server):
    assert page.locator("#scope").inner_text() == "drawn scenes"
    upload(page)
    note = page.locator(".message.note").inner_text()
    assert "knows drawn scenes only" in note and "python jobs/serve_http.py artifact=DIR" in note


@pytest.mark.parametrize("scope", ["photographs", ""])
def test_a_model_of_photographs_offers_no_scenes(browser, server, scope):
    server.model.__init__()
    other = Server()
    other.model.scope = scope
    for page in open_page(browser, other):
        assert page.locator("#scope").is_visible() == bool(scope)
        assert not page.is_visible("#new-scene") and not page.is_visible("#examples")
        upload(page)
        assert page.locator(".message.note").count() == 0
    other.stop()


def test_a_new_scene_comes_with_a_question_and_its_truth(page, server):
    page.click("#new-scene")
    page.wait_for_selector("#stage:not([hidden])")
    truths = set()
    for number in range(1, 30):
        question = page.input_value("#question")
        assert question
        task = page.locator("input[name=task]:checked").get_attribute("value")
        server.model.text = "{<10><20><50><60>}" if task == "refer" else "red"
        page.click("#send")
        line = page.locator(".truth-line")
        playwright.expect(line).to_have_count(1)
        assert line.inner_text().startswith("Truth: ")
        if task == "refer":
            assert page.locator("#overlay .truth").count() == 1 and "px (dashed)" in line.inner_text()
        truths.add(task)
        assert server.model.jobs[-1].messages[0].text.endswith(question)
        if truths == {"vqa", "refer"}:
            return
        page.click("#another-scene")
        playwright.expect(page.locator(".message")).to_have_count(0)
        playwright.expect(page.locator("#question")).not_to_have_value("")
        assert number < 29


def test_tasks_go_without_history_and_leave_none(page, server):
    upload(page)
    ask(page, "first")
    wait_for_answer(page, 1)
    server.model.text = GROUNDED
    ask(page, "the dog", "refer")
    wait_for_answer(page, 2)
    server.model.text = "hello"
    ask(page, "second")
    wait_for_answer(page, 3)
    task, chat = server.model.jobs[1:]
    assert [m.text for m in task.messages] == ["[refer] give me the location of the dog"]
    assert [m.text for m in chat.messages] == ["first", "hello", "second"]
    assert [len(m.images) for m in chat.messages] == [1, 0, 0]


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
    for number, (text, shown) in enumerate(
        [("a dog <p>one", "a dog one"), ("a dog {<10", "a dog"), ("a dog <", "a dog")], 1
    ):
        server.model.text, server.model.pause_s = text + " " * 4000, 0.03
        ask(page, "go on")
        playwright.expect(page.locator(".message.assistant > span").nth(number - 1)).to_contain_text("a dog")
        page.wait_for_timeout(300)
        page.click("#stop")
        assert wait_for_answer(page, number).strip() == shown


def test_find_says_what_and_where(page, server):
    server.model.text = "{<10><20><50><60>}"
    upload(page)
    ask(page, "the red star", "refer")
    assert wait_for_answer(page) == "the red star at (30, 40) – (150, 120) px"
    assert page.locator("#overlay text").text_content() == "the red star"


def test_a_full_context_leaves_out_old_turns_and_says_so(page, server):
    upload(page)
    for number in (1, 2):
        ask(page, f"question {number}")
        wait_for_answer(page, number)
    server.model.most_messages = 3
    ask(page, "question 3")
    wait_for_answer(page, 3)
    messages = server.model.jobs[-1].messages
    assert [m.text for m in messages] == ["question 2", "hello", "question 3"]
    assert [len(m.images) for m in messages] == [1, 0, 0], "the image stays"
    assert "earlier turns were left out" in page.locator(".message.assistant footer").nth(2).inner_text()
    assert page.locator(".message.error").count() == 0


def test_a_question_that_is_too_long_alone_comes_back_to_be_shortened(page, server):
    server.model.most_messages = 0
    upload(page)
    ask(page, "a very long question")
    page.wait_for_selector(".message.error")
    assert "549 tokens" in page.locator(".message.error").inner_text()
    assert page.locator(".message.error button").count() == 0, "trying again cannot help"
    assert page.input_value("#question") == "a very long question" and page.is_enabled("#send")


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


def test_cut_answers_say_why(page, server):
    server.model.reason = "length"
    upload(page)
    ask(page, "hi")
    wait_for_answer(page)
    assert "cut at 256 tokens" in page.locator(".message.assistant footer").inner_text()
    server.model.prompt_tokens = 499
    ask(page, "hi")
    wait_for_answer(page, 2)
    assert "the context is full" in page.locator(".message.assistant footer").nth(1).inner_text()


def test_copy_regenerate_and_edit(page, server):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    server.model.text = "<p>a dog</p> {<10><20><50><60>}."
    upload(page)
    ask(page, "first")
    wait_for_answer(page, 1)
    page.click(".message.assistant button:has-text('Copy')")
    assert page.evaluate("navigator.clipboard.readText()") == "a dog."
    server.model.text = "another answer"
    page.click(".message.assistant button:has-text('Regenerate')")
    playwright.expect(page.locator(".message.assistant > span")).to_have_text("another answer")
    playwright.expect(page.locator(".message.assistant footer")).to_contain_text("temperature 0.7")
    assert server.model.jobs[-1].sampling["temperature"] == 0.7
    assert [m.text for m in server.model.jobs[-1].messages] == ["first"]
    ask(page, "second")
    wait_for_answer(page, 2)
    assert [m.text for m in server.model.jobs[-1].messages] == ["first", "another answer", "second"]
    page.locator(".message.user").nth(0).hover()
    page.locator(".message.user button").nth(0).click()
    assert page.locator(".message:not(.note)").count() == 0 and page.input_value("#question") == "first"
    ask(page, "changed")
    wait_for_answer(page, 1)
    assert [m.text for m in server.model.jobs[-1].messages] == ["changed"]


def test_the_dot_follows_the_server(browser):
    server = Server()
    for page in open_page(browser, server):
        page.clock.install()
        page.reload()
        page.wait_for_selector("#status[data-state=ready]")
        server.model.healthy = False
        page.clock.run_for(11_000)
        page.wait_for_selector("#status[data-state=gone]")
        assert page.locator("#status-text").inner_text() == "not ready"
        server.model.healthy = True
        page.clock.run_for(4_000)
        page.wait_for_selector("#status[data-state=ready]")
        assert page.locator("#status-text").inner_text() == "tinygpt-v"
    server.stop()


def test_everything_can_be_reached_and_has_a_name(page):
    upload(page)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, a, img, summary')]
        .filter((e) => e.checkVisibility() && !(e.ariaLabel || e.textContent.trim() || e.labels?.length || e.alt
                       || e.getAttribute('alt') === '')).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    page.focus("#new-chat")
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
    assert {"theme", "file", "task", "question"} <= set(reached)


def test_the_theme_follows_the_system_and_the_button(browser, server):
    for page in open_page(browser, server, color_scheme="dark"):
        colour = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(colour)
        page.click("#theme")
        light = page.evaluate(colour)
        page.reload()
        assert page.evaluate(colour) == light != dark
        page.click("#theme")
        assert page.evaluate(colour) == dark


def test_a_phone_shows_everything_without_scrolling_sideways(browser, server):
    server.model.__init__()
    server.model.text = GROUNDED
    phone = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
    for page in open_page(browser, server, **phone):
        sideways = "document.documentElement.scrollWidth - innerWidth"
        assert page.evaluate(sideways) <= 0
        upload(page)
        ask(page, "where?", "refer")
        wait_for_answer(page)
        assert page.evaluate(sideways) <= 0
        assert page.locator("#overlay .box:not(.shadow)").count() == 3
        composer = page.locator("#form").bounding_box()
        assert composer["y"] + composer["height"] <= 740 and composer["width"] <= 360, "the composer stays in reach"
        for selector in ("#new-chat", "#theme", "#send", "#remove-image"):
            box = page.locator(selector).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 360, selector


def test_a_key_is_asked_for(browser):
    server = Server(api_keys=["open sesame"])
    context = browser.new_context()
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


def test_the_api_page_shows_the_schema(browser, server):
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url + "docs")
    page.wait_for_selector("#fields tr")
    assert "repetition_penalty" in page.locator("#fields").inner_text()
    context.close()


def test_page_and_library_use_the_same_colours():
    from tinygptv.data.boxes import COLOURS

    source = (ROOT / "pipelines/serving/ui/markup.js").read_text()
    assert "[" + ", ".join('"#{:02x}{:02x}{:02x}"'.format(*colour) for colour in COLOURS) + "]" in source
