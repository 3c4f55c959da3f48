"""The page as a whole: status, keyboard, themes, phones, the page of the API."""

from __future__ import annotations

from tests.page import GROUNDED, Server, ask, expect, new_context, open_page, upload, wait_for_answer


def test_the_dot_follows_the_server(browser):
    server = Server()
    for page in open_page(browser, server):
        page.add_init_script("AbortSignal.timeout = () => new AbortController().signal;")  # it has a clock of its own
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


def test_the_temperature_that_is_shown_is_the_one_that_is_used(page, server):
    """A browser that goes back to the page fills its fields in again, but not what the page wrote beside them."""
    page.click("summary")
    page.fill("#temperature", "0.7")
    expect(page.locator("#temperature-value")).to_have_text("0.7")
    page.click("footer a")
    page.go_back()
    expect(page.locator("#temperature-value")).to_have_text(page.input_value("#temperature"))


def test_the_api_page_shows_the_schema(browser, server):
    context = new_context(browser)
    page = context.new_page()
    page.goto(server.url + "docs")
    page.wait_for_selector("#fields tr")
    assert "repetition_penalty" in page.locator("#fields").inner_text()
    assert "max_output_tokens" in page.locator("#responses-fields").inner_text()
    context.close()
