"""The processor's conversations: each option reaches what it is for, and what ends an answer is told to generation."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from tinygptv.config import TinyGPTVConfig
from tinygptv.data import processing as module
from tinygptv.data.images import normalise_pixels, stack_pixels
from tinygptv.data.processing import (
    TinyGPTVImageProcessor,
    TinyGPTVProcessor,
    complete_special_tokens,
    flatten_images,
    load_tokenizer,
)
from tinygptv.data.prompt_layout import Exchange
from tinygptv.data.prompts import TEMPLATES
from tinygptv.miniature.tiny import tiny_config, tiny_tokenizer

PICTURES = [Image.new("RGB", (30, 20), colour) for colour in ("red", "green", "blue")]
IMAGE = {"type": "image"}


@pytest.fixture
def processor():
    return TinyGPTVProcessor.from_config(tiny_config(), tiny_tokenizer())


def user(*parts):
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def assistant(text):
    return {"role": "assistant", "content": text}


def pixels(*images, side=28):
    return normalise_pixels(stack_pixels(images, side))


# ---------------------------------------------------------------------- the parts of a processor


def test_a_processor_is_made_as_its_configuration_says():
    config = tiny_config(template="inst", image_token_id=300, num_query_tokens=5)
    config.vision_config.image_size = 42
    found = TinyGPTVProcessor.from_config(config, tiny_tokenizer())
    assert (found.template, found.image_token_id, found.num_query_tokens) == ("inst", 300, 5)
    assert found.image_processor.image_size == 42 and found.image_token == "<ImageHere>"
    assert found.layout().encode_rendered("<ImageHere>") == [300] * 5
    assert (found.layout().template, found.layout("caption").template) == (TEMPLATES["inst"], TEMPLATES["caption"])
    bare = TinyGPTVProcessor(TinyGPTVImageProcessor(), tiny_tokenizer(), chat_template="of an old folder")
    assert (bare.template, bare.image_token_id, bare.num_query_tokens) == ("human", 50295, 32)
    assert bare.chat_template != "of an old folder"


def test_a_token_that_is_added_at_the_images_id_is_refused():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    processor = TinyGPTVProcessor(TinyGPTVImageProcessor(28), tokenizer, 3, image_token_id=len(tokenizer))
    assert processor(text="a<new>")["input_ids"].max() < len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"^image_token_id \d+ is the tokenizer's token '<new>', which was added"):
        processor(text="a<new>")
    processor.image_token_id += 1
    assert processor(text="a<new>")["input_ids"].max() == processor.image_token_id - 1


def test_auto_classes_know_the_processor_and_its_image_side():
    assert PROCESSOR_MAPPING[TinyGPTVConfig] is TinyGPTVProcessor
    found = IMAGE_PROCESSOR_MAPPING[TinyGPTVConfig]
    kinds = set(found.values()) if isinstance(found, dict) else set(found)
    assert kinds == {TinyGPTVImageProcessor}


def test_the_image_side_keeps_other_settings_and_gives_what_was_asked_for():
    images = TinyGPTVImageProcessor(20, note="kept")
    assert isinstance(images, BaseImageProcessor) and (images.image_size, images.note) == (20, "kept")
    assert images.model_input_names == ["pixel_values"]
    for kind, tensors in ((np.ndarray, None), (np.ndarray, "np"), (torch.Tensor, "pt")):
        found = images([PICTURES[:2], [PICTURES[2]]], return_tensors=tensors, other="ignored")["pixel_values"]
        assert isinstance(found, kind) and np.array_equal(found, pixels(*PICTURES, side=20))


def test_lists_and_arrays_of_images_are_flattened_whatever_their_depth():
    batch = np.arange(2 * 3 * 4 * 5 * 3).reshape(2, 3, 4, 5, 3)
    found = flatten_images([batch, None, PICTURES[0], [b"bytes", batch[0, 0]], batch[0, 0, :, :, 0]])
    assert [np.shape(f) for f in found[:6]] == [(4, 5, 3)] * 6 and np.array_equal(found[4], batch[1, 1])
    assert found[6] is PICTURES[0] and found[7] == b"bytes" and np.array_equal(found[8], batch[0, 0])
    assert found[9].shape == (4, 5) and len(found) == 10
    empty = np.zeros((0, 5))
    assert flatten_images("") == [""] and flatten_images(empty)[0] is empty and flatten_images([]) == []


# ---------------------------------------------------------------------- prompts


def test_placeholders_are_counted_over_all_prompts(processor):
    mark = "<ImageHere>"
    found = processor(images=PICTURES, text=["no image", f"{mark}a{mark}", f"b{mark}"])
    assert (found["input_ids"] == 256).sum(1).tolist() == [0, 8, 4]
    assert np.array_equal(found["pixel_values"], pixels(*PICTURES))
    for images, text, told in (
        (None, f"a{mark}", "the text has 1 <ImageHere> but 0 images"),
        (PICTURES, ["plain", mark], "the text has 1 <ImageHere> but 3 images"),
        (PICTURES[:1], [mark, f"{mark}{mark}"], "the text has 3 <ImageHere> but 1 images"),
    ):
        with pytest.raises(ValueError, match=told):
            processor(images=images, text=text)
    assert isinstance(processor(text="a")["input_ids"], torch.Tensor), "without a word"
    assert isinstance(processor(text="a", return_tensors="np")["input_ids"], np.ndarray)
    with pytest.raises(ValueError, match="2 images were given for 3 texts"):
        processor(images=PICTURES[:2], text=["a", "b", "c"])
    assert module._images_per_text([PICTURES, [], PICTURES[:1], None], 4, 4) == [3, 0, 1, 0]


# ---------------------------------------------------------------------- conversations


@pytest.mark.parametrize("own", [True, False], ids=["of the processor", "of the call"])
def test_with_a_template_of_ones_own_everything_goes_to_transformers(processor, monkeypatch, own):
    asked = []
    monkeypatch.setattr(
        module.ProcessorMixin, "apply_chat_template", lambda self, *given, **more: asked.append((given, more)) or "done"
    )
    options = {
        "tokenize": True,
        "return_dict": True,
        "add_generation_prompt": True,
        "continue_final_message": True,
        "return_assistant_tokens_mask": True,
        "return_tensors": "np",
    }
    messages = (user("a"),)
    if own:
        processor.chat_template = "mine"
    template = None if own else "theirs"
    more = {**options, "processor_kwargs": {"side": 1}, "other": 2}
    assert processor.apply_chat_template(messages, template, **more) == "done"
    assert asked == [(([user("a")], template), {**options, "processor_kwargs": {"side": 1}, "other": 2})]
    assert processor.apply_chat_template(messages, template) == "done"
    off = {**dict.fromkeys(options, False), "return_tensors": "pt", "processor_kwargs": {}}
    assert asked[1] == (([user("a")], template), off)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_of_the_project_is_laid_out_here(processor, monkeypatch, template):
    monkeypatch.setattr(module.ProcessorMixin, "apply_chat_template", lambda *_, **__: pytest.fail("transformers'"))
    processor.chat_template = module.jinja_template(TEMPLATES[template])
    assert processor.apply_chat_template([user("a")]) == processor.layout().render([Exchange("a")])


def test_one_conversation_gives_one_text_and_a_list_of_one_a_list(processor):
    wanted = processor.layout().render([Exchange("a")])
    assert processor.apply_chat_template([user("a")]) == wanted
    for one in ([[user("a")]], ((user("a"),),)):
        assert processor.apply_chat_template(one) == [wanted]
    ids = processor.layout().encode_prompt([Exchange("a")])
    assert processor.apply_chat_template([user("a")], tokenize=True).tolist() == [ids]
    assert processor.apply_chat_template([user("a")], tokenize=True, return_tensors="np").dtype == np.int64


def test_a_call_says_how_its_conversations_end(processor):
    talk = [user("a"), assistant("b")]
    asked_again = processor.layout().render([Exchange("a", "b"), Exchange("")])
    assert processor.apply_chat_template(talk, add_generation_prompt=True) == asked_again
    with pytest.raises(ValueError, match=r"^continue_final_message needs"):
        processor.apply_chat_template(talk[:1], continue_final_message=True)
    whole = processor.apply_chat_template(talk)
    assert whole == processor.apply_chat_template(talk, continue_final_message=True) + "###"


def test_images_of_all_conversations_are_loaded_in_order_and_only_if_they_are_wanted(processor):
    conversations = [[user(IMAGE, "a"), assistant("b"), user({**IMAGE, "image": PICTURES[2]}, "c")], [user(IMAGE)]]
    given = {"tokenize": True, "return_dict": True, "images": [[PICTURES[0]], PICTURES[1]]}
    found = processor.apply_chat_template(conversations, **given)
    assert np.array_equal(found["pixel_values"], pixels(PICTURES[0], PICTURES[2], PICTURES[1]))
    assert sorted(found) == ["attention_mask", "input_ids", "pixel_values"]
    missing = [user({**IMAGE, "path": "/nowhere.png"}, "a")]
    ids = processor.apply_chat_template(missing, tokenize=True)
    assert (ids == 256).sum() == 4 and "<ImageHere>" in processor.apply_chat_template(missing)
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        processor.apply_chat_template(missing, tokenize=True, return_dict=True)


def test_processor_kwargs_win_over_those_of_the_call(processor):
    conversations = [[user("a")], [user("a longer one")]]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "np"}
    rows = [processor.layout().encode_prompt([Exchange(text)]) for text in ("a", "a longer one")]
    lacks = len(rows[1]) - len(rows[0])
    for more, side in (
        ({}, "left"),
        ({"padding_side": "right"}, "right"),
        ({"processor_kwargs": {"padding_side": "right"}}, "right"),
        ({"padding_side": "left", "processor_kwargs": {"padding_side": "right"}}, "right"),
    ):
        found = processor.apply_chat_template(conversations, **options, **more)
        masks = {"left": [0] * lacks + [1] * len(rows[0]), "right": [1] * len(rows[0]) + [0] * lacks}
        assert found["attention_mask"].tolist() == [masks[side], [1] * len(rows[1])]
        assert isinstance(found["input_ids"], np.ndarray)


def padded_tokenizer():
    """The tiny tokenizer with padding of its own, which is neither 0 nor the end of a text."""
    tiny = tiny_tokenizer()
    return type(tiny)(
        tokenizer_object=tiny._tokenizer, bos_token=tiny.bos_token, eos_token=tiny.eos_token, pad_token="~"
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tensors", ["np", "pt"])
def test_answers_are_marked_token_by_token(side, tensors):
    processor = TinyGPTVProcessor.from_config(tiny_config(), padded_tokenizer())
    talks = [[user("a"), assistant("bcd"), user("e"), assistant("f")], [user("x"), assistant("yz")]]
    found = processor.apply_chat_template(
        talks,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        padding_side=side,
        return_tensors=tensors,
    )
    layout = processor.layout()
    turns = [layout.encode_turns(e) for e in ([Exchange("a", "bcd"), Exchange("e", "f")], [Exchange("x", "yz")])]
    rows = [
        [mark for turn in talk for mark in [0] * (len(turn.bos) + len(turn.question)) + [1] * len(turn.answer)]
        for talk in turns
    ]
    padding = [0] * (len(rows[0]) - len(rows[1]))
    padded = [rows[0], padding + rows[1] if side == "left" else rows[1] + padding]
    assert found["assistant_masks"].tolist() == padded and [sum(row) for row in rows] == [len("bcd###f###"), 5]
    texts = [
        [i for i, m in zip(*two, strict=True) if m] for two in zip(found["input_ids"].tolist(), padded, strict=True)
    ]
    assert [processor.tokenizer.decode(ids) for ids in texts] == ["bcd###f###", "yz###"]
    assert type(found["assistant_masks"]) is type(found["input_ids"]), "of the kind asked for"
    talk = talks[0]
    asked = processor.apply_chat_template(talk, tokenize=True, return_assistant_tokens_mask=True)
    assert asked.tolist() == [processor.layout().encode_prompt([Exchange("a", "bcd"), Exchange("e", "f")])]


# ---------------------------------------------------------------------- the end of an answer

VOCABULARY = ["<e>", "E", "EN", "D", "END", " END", "xE", "D!", "Nx", "NE", None, "", "N", "ENDS", "x", "DE"]


def test_generation_is_told_every_token_that_ends_an_answer_or_is_a_piece_of_the_end():
    tokenizer = SimpleNamespace(
        eos_token_id=0,
        pad_token_id=9,
        tokenize=lambda text: {"END": ["EN", "D"]}[text],
        convert_ids_to_tokens=lambda ids: [VOCABULARY[i] for i in ids],
        decode=lambda ids: VOCABULARY[ids[0]],
    )
    asked = type("Tokenizer", (SimpleNamespace,), {"__len__": lambda self: len(VOCABULARY)})(**vars(tokenizer))
    settings = GenerationConfig()
    settings._from_model_config = True
    TinyGPTVProcessor.set_end_symbol(SimpleNamespace(end_symbol="END", tokenizer=asked), settings)
    assert settings.eos_token_id == [0, 4, 5, 13] and settings.pad_token_id == 9 and settings.end_symbol == "END"
    pieces = {1: "E", 2: "EN", 3: "D", 6: "xE", 7: "D!", 9: "NE", 12: "N", 15: "DE"}
    assert settings.end_pieces == pieces and settings._from_model_config is False


@pytest.mark.parametrize(
    ("end", "text", "shown"),
    [
        ("END", "a END", "a "),
        ("END", "a ENDDD <p>", "a <p>"),
        ("END", "aEND<|b|>", "a<|b|>"),
        ("END", "a ENDX", "a ENDX"),
        ("END", "aEND<p><p>", "a<p><p>"),
        ("END", "aEND<p>b", "aEND<p>b"),
        ("END", "ENDaEND\n ", "ENDa"),
        ("\n", "a\n\n<p>", "a<p>"),
        ("#.", "a#x", "a#x"),
        ("#.", "a#..", "a"),
    ],
)
def test_the_end_goes_with_its_last_letters_and_padding_stays(end, text, shown):
    asked = SimpleNamespace(end_symbol=end, tokenizer=SimpleNamespace(all_special_tokens=["<p>", "<|b|>"]))
    assert TinyGPTVProcessor._without_end(asked, text) == shown


def test_an_answer_is_decoded_without_special_tokens_and_cut_at_the_templates_end():
    processor = TinyGPTVProcessor.from_config(tiny_config(template="caption"), tiny_tokenizer())
    ids = processor.tokenizer.encode("<|endoftext|> a ### b \nc")
    assert ids[0] == 0 and processor.decode_answer(ids) == processor.decode_answer(torch.tensor(ids)) == "a ### b"


# ---------------------------------------------------------------------- tokenizers


class Roles(SimpleNamespace):
    """A tokenizer that knows words and names some of them."""

    def get_vocab(self):
        return {word: number for number, word in enumerate(self.words)}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, None), ("<|endoftext|>",) * 3),
        ((None, "<e>", None), ("<e>", "<e>", "<e>")),
        (("<b>", None, None), ("<b>", "<b>", "<b>")),
        (("<b>", "<e>", None), ("<b>", "<e>", "<e>")),
        (("<b>", "<e>", "<p>"), ("<b>", "<e>", "<p>")),
        ((None, None, "<p>"), ("<|endoftext|>", "<|endoftext|>", "<p>")),
    ],
)
def test_a_token_that_is_not_named_is_the_one_that_ends_texts(given, expected):
    words = ["<b>", "<e>", "<p>", "<|endoftext|>"]
    tokenizer = Roles(words=words, **dict(zip(("bos_token", "eos_token", "pad_token"), given, strict=True)))
    complete_special_tokens(tokenizer)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == expected


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((None, None, None), "names None as bos_token, and '<|endoftext|>' is not in its vocabulary: set bos_token in"),
        (("<b>", "<x>", "<b>"), "names '<x>' as eos_token, and '<x>' is not in its vocabulary: set eos_token in tok"),
        (("<b>", "<b>", "<x>"), "names '<x>' as pad_token, and '<x>' is not in its vocabulary: set pad_token in tok"),
    ],
)
def test_a_token_that_the_vocabulary_lacks_is_named_with_its_folder(monkeypatch, given, told):
    tokenizer = Roles(words=["<b>"], **dict(zip(("bos_token", "eos_token", "pad_token"), given, strict=True)))
    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", lambda folder, **_: tokenizer)
    for act, start in (
        (lambda: load_tokenizer("/a/folder"), "/a/folder: the tokenizer "),
        (lambda: TinyGPTVProcessor(TinyGPTVImageProcessor(), tokenizer), "the tokenizer "),
    ):
        with pytest.raises(ValueError) as caught:
            act()
        assert str(caught.value).startswith(start + told)


def test_a_tokenizer_is_completed_as_it_is_loaded_and_a_damaged_one_is_named(monkeypatch):
    asked = []
    tokenizer = Roles(words=["<e>"], bos_token=None, eos_token="<e>", pad_token=None)
    monkeypatch.setattr(
        module.AutoTokenizer, "from_pretrained", lambda *given, **how: asked.append((*given, how)) or tokenizer
    )
    assert load_tokenizer(Path("/a")) is tokenizer and tokenizer.pad_token == "<e>"
    options = {"local_files_only": True, "trust_remote_code": False}
    assert asked == [("/a", options)], "nothing is downloaded and no code runs"

    def broken(folder, **_):
        raise Exception("data did not match")

    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", broken)
    with pytest.raises(ValueError) as caught:
        load_tokenizer("/a")
    told = "no tokenizer in /a, or a damaged one: it needs tokenizer.json, or vocab.json and merges.txt."
    assert str(caught.value) == told
