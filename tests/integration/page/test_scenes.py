"""What the served model knows: its scope, examples, and scenes with their truth."""

from __future__ import annotations

import re

import pytest

from tests.page import Server, expect, open_page, upload, wait_for_answer
from tests.paths import ROOT


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
    assert "knows drawn scenes only" in note
    assert "\nreleased:" in (ROOT / "Makefile").read_text() and note.endswith("make released")
    (guide,) = re.findall(r"docs/[\w-]+\.md", note)
    assert (ROOT / guide).is_file()


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
        expect(line).to_have_count(1)
        assert line.inner_text().startswith("Truth: ")
        if task == "refer":
            assert page.locator("#overlay .truth").count() == 1 and "px (dashed)" in line.inner_text()
        truths.add(task)
        assert server.model.jobs[-1].messages[0].text.endswith(question)
        if truths == {"vqa", "refer"}:
            return
        page.click("#another-scene")
        expect(page.locator(".message")).to_have_count(0)
        expect(page.locator("#question")).not_to_have_value("")
        assert number < 29
