"""Phi-2's own tokenizer gives the release's ids, and answers of every template end where they should."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from tests.paths import REALDATA
from tinygptv.config import TinyGPTVConfig
from tinygptv.data.processing import TinyGPTVProcessor, load_tokenizer
from tinygptv.data.prompt_layout import Exchange
from tinygptv.data.prompts import TEMPLATES
from tinygptv.data.sample import SampleEncoder, TextLimits
from tinygptv.model.generation import EndSymbolCriteria

FOLDER = REALDATA / "phi2_tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER)


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_end_symbols_and_special_tokens(tokenizer):
    assert len(tokenizer) == 50295
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 50256
    assert ids(tokenizer, "###") == [21017] and ids(tokenizer, " ###") == [44386] and ids(tokenizer, "\n") == [198]
    for before in ("dog", ".", "?", "!", '"', ")", "}"):
        assert ids(tokenizer, f"a {before}###")[-1] == 21017, before
    assert len(ids(tokenizer, "100")) == 1


def test_boxes_take_twelve_tokens(tokenizer):
    pieces = [tokenizer.decode([i]) for i in ids(tokenizer, "{<12><34><56><78>}###")]
    assert pieces == ["{", "<", "12", "><", "34", "><", "56", "><", "78", ">", "}", "###"]


def test_no_hidden_bos(tokenizer):
    """BOS is put in by the sequence layout alone, in training and in generation."""
    processor = TinyGPTVProcessor.from_config(TinyGPTVConfig.phi2(), tokenizer)
    layout = processor.layout()
    prompt = layout.encode_prompt([Exchange("hello")])
    assert prompt.count(50256) == 1 and prompt[0] == 50256
    training = SampleEncoder(layout, TextLimits(100)).encode([Exchange("hello", "hi")])
    assert training.input_ids[: len(prompt)] == prompt


def test_text_that_the_processor_reads_has_the_layout_of_training(tokenizer):
    """ ": " and "a dog" are tokenised apart in training, and so from text, though together they would be ": a"."""
    processor = TinyGPTVProcessor.from_config(TinyGPTVConfig.phi2(), tokenizer)
    turns = [Exchange("[vqa] what?", "a dog", 1), Exchange("big?", "yes.", 0), Exchange("sure?")]
    for name in TEMPLATES:
        layout = processor.layout(name)
        text = layout.render(turns)
        assert layout.encode_rendered(text) == layout.encode_prompt(turns) or name == "caption", name
        assert tokenizer.decode(layout.encode_prompt(turns)) == text.replace("<ImageHere>", ""), name


@pytest.mark.parametrize("name", ["caption", "human"])
def test_generation_stops_at_the_end_symbol_however_it_is_tokenised(tokenizer, name):
    config = TinyGPTVConfig.phi2()
    config.template = name
    processor = TinyGPTVProcessor.from_config(config, tokenizer)
    settings = GenerationConfig()
    processor.set_end_symbol(settings)
    ends = settings.eos_token_id
    assert 50256 in ends
    if name == "caption":
        assert 198 in ends and settings.end_pieces == {}
        return
    assert {21017, 44386} <= set(ends)
    one, two = ids(tokenizer, "#")[0], ids(tokenizer, "##")[0]
    criteria = EndSymbolCriteria("###", settings.end_pieces)
    rows = torch.tensor([[1, one, two], [1, two, two], [one, 1, two], [one, one, one]])
    criteria(rows[:, :1], None)
    criteria(rows[:, :2], None)
    assert criteria(rows, None).tolist() == [True, True, False, True]
