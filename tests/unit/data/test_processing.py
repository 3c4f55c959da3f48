"""Rows of the processor: padding on either side, with the tokenizer's own id or another."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tinygptv.data import processing as module
from tinygptv.data.chat_template import jinja_template
from tinygptv.data.conversation import ChatMessage
from tinygptv.data.images import normalise_pixels, stack_pixels
from tinygptv.data.processing import TinyGPTVImageProcessor, TinyGPTVProcessor, load_tokenizer
from tinygptv.data.prompt_layout import Exchange
from tinygptv.data.prompts import TEMPLATES
from tinygptv.miniature.tiny import tiny_config, tiny_tokenizer


@pytest.mark.parametrize(
    ("options", "ids", "mask"),
    [
        ({}, [[0, 0, 7], [4, 5, 6]], [[0, 0, 1], [1, 1, 1]]),
        ({"side": "left", "fill": -100}, [[-100, -100, 7], [4, 5, 6]], [[0, 0, 1], [1, 1, 1]]),
        ({"side": "right"}, [[7, 0, 0], [4, 5, 6]], [[1, 0, 0], [1, 1, 1]]),
        ({"side": "right", "fill": 9}, [[7, 9, 9], [4, 5, 6]], [[1, 0, 0], [1, 1, 1]]),
    ],
)
def test_rows_are_padded_to_one_length(options, ids, mask):
    found = TinyGPTVProcessor.from_config(tiny_config(), tiny_tokenizer()).pad([[7], [4, 5, 6]], **options)
    assert {name: array.tolist() for name, array in found.items()} == {"input_ids": ids, "attention_mask": mask}
    assert {array.dtype.name for array in found.values()} == {"int64"}


def test_a_layout_is_of_the_checkpoints_template_or_of_the_one_asked_for():
    processor = TinyGPTVProcessor.from_config(tiny_config(template="caption"), tiny_tokenizer())
    for asked, template in ((None, "caption"), ("", "caption"), ("released_eval", "released_eval")):
        layout = processor.layout(asked)
        assert layout.template is TEMPLATES[template] and layout.tokenizer is processor.tokenizer
        assert layout.encode_rendered("a<ImageHere>")[1:] == [256] * 4


def test_rows_are_filled_with_the_id_asked_for_even_if_it_is_0():
    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=9))
    for options, filled in (({}, 9), ({"fill": 0}, 0), ({"fill": None}, 9)):
        found = TinyGPTVProcessor.pad(processor, [[7], [4, 5]], side="right", **options)
        assert found["input_ids"].tolist() == [[7, filled], [4, 5]]


PICTURES = [Image.new("RGB", (30, 20), colour) for colour in ("red", "green", "blue")]


@pytest.fixture(scope="module")
def processor():
    return TinyGPTVProcessor.from_config(tiny_config(), tiny_tokenizer())


@pytest.mark.parametrize(
    ("images", "texts", "counts"),
    [
        (PICTURES, 1, [3]),
        (PICTURES[0], 1, [1]),
        (PICTURES, 3, [1, 1, 1]),
        ([PICTURES[:2], []], 2, [2, 0]),
        ([[], PICTURES], 2, [0, 3]),
        (np.zeros((2, 4, 4, 3)), 2, [1, 1]),
        (([PICTURES[0], PICTURES[1]], PICTURES[2]), 2, [2, 1]),
    ],
)
def test_images_of_plain_prompts_are_all_of_one_one_each_or_as_the_lists_say(images, texts, counts):
    flat = module.flatten_images(images)
    assert module._images_per_text(images, len(flat), texts) == counts


def test_images_that_no_prompt_can_be_found_for_are_refused(processor):
    with pytest.raises(ValueError, match=r"^3 images were given for 2 texts: give a list of images per text\.$"):
        processor(images=PICTURES, text=["a", "b"])
    with pytest.raises(ValueError, match=r"^the text has 2 <ImageHere> but 1 images were given: write one placeholder"):
        processor(images=PICTURES[:1], text=["<ImageHere>", "<ImageHere>"])


def test_inputs_are_padded_on_the_side_and_of_the_kind_asked_for(processor):
    found = processor(images=[PICTURES[:1], PICTURES[1:]], text=["what?", "a longer one?"])
    layout = processor.layout()
    rows = [layout.encode_rendered(layout.add_images(text, n)) for text, n in (("what?", 1), ("a longer one?", 2))]
    assert found["input_ids"].tolist() == [[0] * (len(rows[1]) - len(rows[0])) + rows[0], rows[1]]
    assert found["attention_mask"].sum(1).tolist() == [len(row) for row in rows]
    assert torch.equal(found["pixel_values"], torch.from_numpy(normalise_pixels(stack_pixels(PICTURES, 28))))
    other = processor(text="what?", return_tensors="np", padding_side="right")
    assert sorted(other) == ["attention_mask", "input_ids"] and isinstance(other["input_ids"], np.ndarray)
    assert processor(text=["a", "bcd"], padding_side="right")["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert sorted(processor(images=PICTURES[0])) == ["pixel_values"], "images alone"


def test_the_image_processor_gives_normalised_pixels_of_its_size():
    images = TinyGPTVImageProcessor(20)
    found = images(PICTURES[:2], return_tensors="pt")["pixel_values"]
    assert found.shape == (2, 3, 20, 20) and found.dtype == torch.float32
    assert np.array_equal(found.numpy(), normalise_pixels(stack_pixels(PICTURES[:2], 20)))
    assert isinstance(images(PICTURES[0])["pixel_values"], np.ndarray) and TinyGPTVImageProcessor().image_size == 224


def test_the_end_symbol_goes_from_the_end_of_an_answer_alone(processor):
    ids = processor.tokenizer.encode
    end = "<|endoftext|>"
    for text, shown in (("a ### b", "a ### b"), ("a###", "a"), ("a####", "a"), ("a### ", "a"), ("a##", "a##")):
        assert processor.decode(ids(text)) == shown
        assert processor.decode(ids(text + end * 2)) == shown + end * 2, "padding stays, as the tokenizer says"
        assert processor.batch_decode([ids(text), ids("x")]) == [shown, "x"]
        assert processor.decode([ids(text), ids("x###")]) == [shown, "x"]
        assert processor.post_process_image_text_to_text([ids(text + end)]) == [shown]
        assert processor.post_process_image_text_to_text([ids(text + end)], False) == [shown + end]
        assert processor.batch_decode([ids(text + end)], skip_special_tokens=True) == [shown]
    assert processor.decode_answer(ids("a ### b")) == "a" and processor.decode_answer(ids("a" + end)) == "a"


def test_a_folder_gets_the_templates_own_words_or_those_that_a_user_wrote(tmp_path):
    processor = TinyGPTVProcessor.from_config(tiny_config(), tiny_tokenizer())
    assert processor.tokenizer.padding_side == "left" and processor.image_token == "<ImageHere>"
    processor.template = "caption"
    processor.save_pretrained(tmp_path / "ours")
    assert processor.chat_template == jinja_template(TEMPLATES["caption"]) and processor.end_symbol == "\n"
    processor.chat_template = "mine"
    processor.save_pretrained(tmp_path / "mine")
    assert processor.chat_template == "mine"
    assert processor.apply_chat_template([{"role": "user", "content": "x"}], "theirs {{ messages[0].content }}") == (
        "theirs x"
    )


def test_options_go_on_to_transformers_and_to_the_tokenizer(processor, monkeypatch):
    monkeypatch.setattr(module.ProcessorMixin, "save_pretrained", lambda self, *given, **more: (given, more))
    assert processor.save_pretrained("folder", push_to_hub=True) == (("folder",), {"push_to_hub": True})
    monkeypatch.setattr(processor.tokenizer, "decode", lambda *given, **more: f"{given} {more}")
    found = processor.post_process_image_text_to_text([[7]], clean=True)
    assert found == "([[7]],) {'skip_special_tokens': True, 'clean': True}"


def test_a_conversation_ends_as_the_caller_says():
    asked, answered = [ChatMessage("user", "a")], [ChatMessage("user", "a"), ChatMessage("assistant", "b")]
    assert [e.answer for e in module._turns(asked, True, False)] == [None]
    assert [(e.answer, e.is_complete) for e in module._turns(answered, False, False)] == [("b", True)]
    assert [(e.answer, e.is_complete) for e in module._turns(answered, False, True)] == [("b", False)]
    assert module._turns(answered, True, False) == [Exchange("a", "b"), Exchange("")]
    for messages, asks in ((asked, False), (answered, True)):
        with pytest.raises(ValueError, match=r"^continue_final_message needs a last message of the assistant, without"):
            module._turns(messages, asks, True)


@pytest.mark.parametrize(
    ("text", "can"),
    [("#", True), ("##", True), ("a#", True), ("a##", True), ("#b", True), ("##b", True), ("a#b", False), ("", False),
     ("ab", False), ("###", True), (" ", False)],
)  # fmt: skip
def test_pieces_of_an_end_symbol(text, can):
    assert module._can_be_piece(text, "###") is can


def test_a_tokenizer_with_code_of_its_own_is_named(monkeypatch):
    def needs_code(*given, **options):
        assert options == {"local_files_only": True, "trust_remote_code": False}
        raise ValueError("execute the file: set trust_remote_code=True")

    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", needs_code)
    with pytest.raises(
        ValueError, match=r"^the tokenizer in /a needs code of its own \(auto_map\), which is never run"
    ):
        load_tokenizer("/a")
