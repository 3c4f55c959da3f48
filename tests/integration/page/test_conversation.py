"""Turns: history, tasks without it, full contexts, copy, regenerate and edit."""

from __future__ import annotations

from tests.page import GROUNDED, ask, expect, upload, wait_for_answer


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
    long = "a very long question\nof several lines\nthat can be read\nwhen it comes back"
    ask(page, long)
    page.wait_for_selector(".message.error")
    assert "549 tokens" in page.locator(".message.error").inner_text()
    assert page.locator(".message.error button").count() == 0, "trying again cannot help"
    assert page.input_value("#question") == long and page.is_enabled("#send")
    assert page.evaluate("(({scrollHeight, clientHeight}) => scrollHeight - clientHeight)(question)") <= 1


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
    expect(page.locator(".message.assistant > span")).to_have_text("another answer")
    expect(page.locator(".message.assistant footer")).to_contain_text("temperature 0.7")
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
