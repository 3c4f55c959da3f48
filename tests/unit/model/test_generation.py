"""``generate`` with images: which are encoded, which a pass sees, and where an answer ends, without weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.generation import GenerationMixin

from tinygptv.model.generation import EndSymbolCriteria, ImageGenerationMixin

IMAGE, PAD = 90, 7
CONFIG = SimpleNamespace(
    image_token_id=IMAGE, num_query_tokens=2, text_config=SimpleNamespace(pad_token_id=PAD, eos_token_id=0)
)


class Model(ImageGenerationMixin):
    """Has no weights."""

    def __init__(self, **settings):
        self.config, self.generation_config = CONFIG, SimpleNamespace(**settings)

    def encode_images(self, pixels):
        return ("encoded", pixels)

    def projector(self, features):
        return ("projected", features)


@pytest.fixture
def generated(monkeypatch):
    """What transformers' ``generate`` is given."""
    given = []
    monkeypatch.setattr(
        GenerationMixin, "generate", lambda self, *args, **kwargs: given.append((args, kwargs)) or "ids"
    )
    return given


def test_images_are_encoded_once_and_what_else_is_given_is_handed_on(generated):
    model = Model()
    assert (
        model.generate("ids", "more", pixel_values="p", query_features=None, image_embeds=None, do_sample=False)
        == "ids"
    )
    assert model.generate(input_ids="ids", query_features="f", pixel_values=None) == "ids"
    assert model.generate("ids", image_embeds="e", attention_mask=None) == "ids"
    assert generated == [
        (("more",), {"input_ids": "ids", "image_embeds": ("encoded", "p"), "do_sample": False}),
        ((), {"input_ids": "ids", "image_embeds": ("projected", "f")}),
        ((), {"input_ids": "ids", "image_embeds": "e", "attention_mask": None}),
    ]


@pytest.mark.parametrize(("length", "is_encoded"), [(0, True), (5, False)])
def test_what_a_cache_holds_is_not_encoded_again(generated, length, is_encoded):
    cache = SimpleNamespace(get_seq_length=lambda: length)
    Model().generate("ids", pixel_values="p", past_key_values=cache)
    assert ("image_embeds" in generated[0][1]) is is_encoded and ("pixel_values" in generated[0][1]) is not is_encoded


def test_an_assistant_gets_pixels(generated):
    Model().generate("ids", pixel_values="p", assistant_model="small")
    assert generated[0][1] == {"input_ids": "ids", "pixel_values": "p", "assistant_model": "small"}


def test_answers_end_as_the_call_says_else_as_the_model_does(generated):
    model = Model(end_symbol="##", end_pieces={"1": "#"})
    own = SimpleNamespace(end_symbol="x", end_pieces={2: "x"})
    for settings, wanted in ((None, ("##", {1: "#"})), (own, ("x", {2: "x"})), (SimpleNamespace(), ("##", {1: "#"}))):
        model.generate("ids", generation_config=settings, stopping_criteria=["mine"])
        mine, found = generated.pop()[1]["stopping_criteria"]
        assert mine == "mine" and (found.end_symbol, found.pieces) == wanted
    model.generate("ids")
    assert len(generated.pop()[1]["stopping_criteria"]) == 1
    Model(end_symbol="#", end_pieces={}).generate("ids", stopping_criteria=["mine"])
    assert generated.pop()[1]["stopping_criteria"] == ["mine"]


# ---------------------------------------------------------------------- the end symbol

PIECES = {1: "#", 2: "##", 3: "a#", 4: "#b"}


def ends(criteria, *rows, **more):
    return criteria(torch.tensor(rows), None, **more).tolist()


def test_each_row_ends_by_itself():
    criteria = EndSymbolCriteria("###", PIECES)
    assert ends(criteria, [9, 2], [9, 2], [9, 2]) == [False] * 3
    assert ends(criteria, [9, 2, 2], [9, 2, 9], [9, 2, 4]) == [True, False, True]


def test_what_the_prompt_holds_is_no_end():
    criteria = EndSymbolCriteria("###", PIECES)
    assert ends(criteria, [2, 1, 1]) == [False], "two of three stand in the prompt"
    assert ends(criteria, [2, 1, 1, 1]) == [False] and ends(criteria, [2, 1, 1, 1, 1]) == [True]
    whole = EndSymbolCriteria("###", PIECES)
    assert ends(whole, [2, 2, 1]) == [False]


@pytest.mark.parametrize(("new", "ended"), [(1, False), (2, True), (3, True)])
def test_several_tokens_of_one_step_count_from_the_first(new, ended):
    assert ends(EndSymbolCriteria("###", PIECES), [9, 2, 4], new_token_length=new) == [ended]


def test_a_symbol_that_ends_within_the_tokens_of_a_later_step_is_found():
    criteria = EndSymbolCriteria("###", PIECES)
    assert ends(criteria, [9, 1]) == [False]
    assert ends(criteria, [9, 1, 1, 1, 9, 9, 9]) == [True], "four candidates of an assistant at once"
    criteria = EndSymbolCriteria("###", PIECES)
    assert ends(criteria, [9, 2]) == [False] and ends(criteria, [9, 2, 9, 1]) == [False], "another token between them"


# ---------------------------------------------------------------------- what a pass sees


@pytest.fixture
def prepare(monkeypatch):
    """Inputs of a pass over the last ``length`` ids."""

    def inputs(self, input_ids, next_sequence_length=None, **kwargs):
        if kwargs.get("inputs_embeds") is not None:
            return {"inputs_embeds": kwargs["inputs_embeds"], **kwargs}
        return {"input_ids": input_ids[:, -next_sequence_length:] if next_sequence_length else input_ids, **kwargs}

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", inputs)

    def run(rows, length=None, **kwargs):
        found = Model().prepare_inputs_for_generation(torch.tensor(rows), next_sequence_length=length, **kwargs)
        images = found.get("image_embeds")
        return found["input_ids"].tolist(), None if images is None else images.ravel().tolist()

    return run


I2 = [IMAGE] * 2


@pytest.mark.parametrize(
    ("rows", "length", "images", "shown"),
    [
        ([[1, *I2, 2]], None, [0], [0]),
        ([[1, *I2, *I2, 2]], 3, [0, 1], [1]),  # the first image is in the cache
        ([[1, *I2, *I2, 2]], 1, [0, 1], None),
        ([[*I2, *I2, 1], [3, 3, *I2, 1]], None, [0, 1, 2], [0, 1, 2]),
        ([[*I2, *I2, 1], [3, 3, *I2, 1]], 3, [0, 1, 2], [1, 2]),
        ([[*I2, *I2, 1], [*I2, 3, 3, 1]], 3, [0, 1, 2], [1]),
    ],
)
def test_images_go_in_with_the_ids_that_they_belong_to(prepare, rows, length, images, shown):
    ids, found = prepare(rows, length, image_embeds=torch.tensor(images), is_first_iteration=True)
    assert ids == [row[-length:] if length else row for row in rows] and found == shown


def test_candidates_that_are_copied_out_of_the_prompt_bring_no_image(prepare):
    first = {"image_embeds": torch.tensor([0]), "is_first_iteration": True}
    assert prepare([[1, *I2, 2, *I2]], **first) == ([[1, *I2, 2, PAD, PAD]], [0])
    two = {"image_embeds": torch.tensor([0, 1]), "is_first_iteration": True}
    assert prepare([[1, *I2, *I2, 2, *I2]], **two) == ([[1, *I2, *I2, 2, PAD, PAD]], [0, 1])
    assert prepare([[1, *I2, 2, *I2]], 2, **first) == ([[PAD, PAD]], None)
    assert prepare([[1, *I2, 2, *I2]], 2, image_embeds=torch.tensor([0])) == ([[PAD, PAD]], None), "a later pass"
    without_cache = {"image_embeds": torch.tensor([0]), "use_cache": False}
    assert prepare([[1, *I2, 2]], **without_cache) == ([[1, *I2, 2]], [0]), "each pass reads the whole"


def test_images_and_places_of_a_batch_must_agree(prepare):
    with pytest.raises(ValueError) as caught:
        prepare([[*I2, 1], [*I2, 1]], 1, image_embeds=torch.tensor([0]), is_first_iteration=True)
    assert str(caught.value) == (
        "the prompts have positions for 2 images but 1 were given: each <ImageHere> needs exactly one image."
    )


def test_an_assembled_prompt_is_read_as_it_is_and_all_else_goes_on_to_transformers(prepare):
    given = {"inputs_embeds": torch.zeros(1, 3, 2), "image_embeds": torch.tensor([0])}
    more = {"past_key_values": "cache", "attention_mask": torch.ones(1, 3), "use_cache": True, "position_ids": None}
    found = Model().prepare_inputs_for_generation(torch.tensor([[1]]), is_first_iteration=True, **given, **more)
    assert found["inputs_embeds"] is given["inputs_embeds"] and "image_embeds" not in found
    assert {name: found[name] for name in more} == more and found["is_first_iteration"] is True


@pytest.mark.parametrize(("size", "wanted"), [(1, [0, 1]), (3, [0, 0, 0, 1, 1, 1])])
def test_images_are_repeated_with_their_rows(size, wanted):
    rows = torch.tensor([[*I2, 1], [*I2, 2]])
    given = {"image_embeds": torch.arange(2), "attention_mask": rows * 0}
    ids, found = Model()._expand_inputs_for_generation(size, input_ids=rows, **given)
    assert (
        ids.tolist() == [row for row in rows.tolist() for _ in range(size)] and len(found["attention_mask"]) == 2 * size
    )
    assert found["image_embeds"].tolist() == wanted


def test_rows_of_several_images_and_of_none_keep_their_own_when_they_are_repeated():
    rows = torch.tensor([[*I2, *I2, 1], [1, 1, 1, 1, 1], [1, 1, 1, *I2]])
    _, found = Model()._expand_inputs_for_generation(2, input_ids=rows, query_features=torch.tensor([7, 8, 9]))
    assert found["query_features"].tolist() == [7, 8, 7, 8, 9, 9]
