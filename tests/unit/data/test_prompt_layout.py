"""One layout: every template through every entrance gives the same ids."""

from __future__ import annotations

import io
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from pipelines.serving.protocol import ChatRequest
from pipelines.serving.turns import read_turns
from pipelines.training.sample_predictions import SamplePredictor
from tests.serving_model import IMAGE_SIZE, make_image, make_model, make_processor
from tinygptv.data.chat_template import jinja_template
from tinygptv.data.conversation import ChatImage, ChatMessage, encode_conversation, join_messages
from tinygptv.data.processing import TinyGPTVProcessor
from tinygptv.data.prompt_layout import Exchange
from tinygptv.data.prompts import TEMPLATES
from tinygptv.data.sample import SampleEncoder, SampleRow, TextLimits, Turn, render_sample
from tinygptv.inference import drift
from tinygptv.inference.assistant import Assistant
from tinygptv.inference.batch import Answerer, Prompt

IMAGE = ChatImage.from_bytes(make_image(), IMAGE_SIZE)

TURNS = {
    "one question": [Exchange("[vqa] what is it?", None, 1)],
    "words alone": [Exchange("add 2 and 3")],
    "an image alone": [Exchange("", None, 1)],
    "a talk": [Exchange("what is it?", "a dog.", 1), Exchange("what colour?", "red"), Exchange("sure?")],
    "a talk in words": [Exchange("hello", "hi"), Exchange("how are you?")],
    "marks and end symbols": [
        Exchange("<ImageHere> <|endoftext|> ###Assistant: </Img> {}", "## one\n##### two <|endoftext|>", 1),
        Exchange("and\nthen?"),
    ],
}


def processor_of(template: str) -> TinyGPTVProcessor:
    made = make_processor()
    return TinyGPTVProcessor(
        made.image_processor, made.tokenizer, made.num_query_tokens, made.image_token_id, template=template
    )


def messages_of(turns) -> list[ChatMessage]:
    messages = []
    for turn in turns:
        messages.append(ChatMessage("user", turn.instruction, (IMAGE,) * turn.num_images))
        if turn.answer is not None:
            messages.append(ChatMessage("assistant", turn.answer))
    return messages


def dictionaries_of(turns, key="image") -> list[dict]:
    picture = Image.open(io.BytesIO(make_image()))
    found = []
    for message in messages_of(turns):
        parts = [{"type": "image", key: picture} for _ in message.images]
        content = [*parts, {"type": "text", "text": message.text}] if parts else message.text
        found.append({"role": message.role, "content": content})
    return found


def by_training(processor, turns):
    """What stands before the last answer in a training sequence."""
    encoder = SampleEncoder(processor.layout(), TextLimits(1000, 1000))
    answered = [*turns[:-1], Exchange(turns[-1].instruction, "an answer", turns[-1].num_images)]
    encoded = encoder.encode(answered)
    return encoded.input_ids[: -len(processor.layout().encode_answer("an answer"))]


def by_chat(processor, turns):
    return encode_conversation(messages_of(turns), processor.layout())[0].tolist()


@cache
def model():
    """For what asks for one; no prompt depends on its weights."""
    return make_model()


def by_assistant(processor, turns):
    assistant = Assistant(model(), processor, max_batch_size=2)
    try:
        return assistant._encode(messages_of(turns))[0].tolist()
    finally:
        assistant.close()


def by_serving(processor, turns):
    messages = []
    for message in messages_of(turns):
        parts = [{"type": "image_url", "image_url": {"url": "data:x"}} for _ in message.images]
        parts += [{"type": "text", "text": message.text}]
        messages.append({"role": message.role, "content": parts})
    request = ChatRequest.model_validate({"model": "m", "messages": messages})
    read = read_turns(request)
    return encode_conversation(read.messages([IMAGE] * len(read.images), request), processor.layout())[0].tolist()


def by_evaluation(processor, turns):
    answerer = Answerer(model(), processor)
    history = tuple(Exchange(turn.instruction, turn.answer) for turn in turns[:-1])
    return answerer.prompt_ids(Prompt(turns[-1].instruction, 0 if turns[0].num_images else None, history)).tolist()


def by_apply_chat_template(processor, turns):
    inputs = processor.apply_chat_template(
        dictionaries_of(turns), tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert ("pixel_values" in inputs) == bool(turns[0].num_images)
    return inputs["input_ids"][0].tolist()


def by_text(processor, turns):
    text = processor.apply_chat_template(dictionaries_of(turns))
    pictures = [Image.open(io.BytesIO(make_image()))] * turns[0].num_images
    return processor(images=pictures or None, text=text)["input_ids"][0].tolist()


def by_jinja(processor, turns):
    """As programs do that know ``chat_template.jinja`` alone."""
    (text,), _ = render_jinja_template(
        [dictionaries_of(turns)], chat_template=processor.chat_template, **processor.tokenizer.special_tokens_map
    )
    assert text == processor.layout().render(turns)
    return processor.layout().encode_rendered(text)


ENTRANCES = [
    by_training,
    by_chat,
    by_assistant,
    by_serving,
    by_evaluation,
    by_apply_chat_template,
    by_text,
    by_jinja,
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("entrance", ENTRANCES, ids=lambda entrance: entrance.__name__)
def test_every_entrance_gives_the_same_ids(template, entrance):
    processor = processor_of(template)
    for name, turns in TURNS.items():
        wanted = processor.layout().encode_prompt(turns)
        ids = entrance(processor, turns)
        if template == "caption" and entrance in (by_text, by_jinja) and len(turns) > 1:
            # Rendered text does not show where the words end and the caption begins: the same text, other pieces.
            assert processor.tokenizer.decode(ids) == processor.tokenizer.decode(wanted), name
            continue
        assert ids == wanted, name


def text_of(processor, ids):
    image = "".join("#IMAGE" if i == processor.image_token_id else processor.tokenizer.decode([i]) for i in ids)
    return image.replace("#IMAGE" * processor.num_query_tokens, "#IMAGE")


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("caption", "<|endoftext|>#IMAGEq1a1\n<|endoftext|>q2"),
        (
            "human",
            "<|endoftext|>###Human: <Img>#IMAGE</Img> q1  ###Assistant: a1###<|endoftext|>###Human: q2  ###Assistant: ",
        ),
        ("inst", "<|endoftext|>[INST] <Img>#IMAGE</Img> q1  [/INST]a1###<|endoftext|>[INST] q2  [/INST]"),
        ("released_eval", "###Human: <Img>#IMAGE</Img> q1###Assistant: a1###Human: q2###Assistant: "),
        (
            "released_chat",
            "<|endoftext|><s>[INST] <Img>#IMAGE</Img> q1  [/INST]a1###<|endoftext|><s>[INST] q2  [/INST]",
        ),
    ],
)
def test_the_layout_itself(template, wanted):
    processor = processor_of(template)
    ids = processor.layout().encode_prompt([Exchange("q1", "a1", 1), Exchange("q2")])
    assert text_of(processor, ids) == wanted


@pytest.mark.parametrize("template", TEMPLATES)
def test_drift_and_sample_predictions_ask_as_training_does(template, monkeypatch):
    processor = processor_of(template)
    rows = [
        SampleRow("1", "s", "vqa", (Turn("what?", ("red",)),), make_image(), 40, 30),
        SampleRow("2", "s", "pair", (Turn("", ("a dog",)),), make_image(1), 40, 30),
        SampleRow("5", "s", "conversation", (Turn("who?", ("a dog",)), Turn("sure?", ("yes",))), make_image(3), 40, 30),
        SampleRow("3", "s", "caption", (Turn("", ("a dog",)),), make_image(2), 40, 30),
        SampleRow("4", "s", "text", (Turn("say hi", ("hi",)),)),
    ]
    first = lambda options: options[0]  # noqa: E731
    encoder = SampleEncoder(processor.layout(), TextLimits(1000))
    wanted = []
    for row in rows:
        encoded = encoder.encode(render_sample(row, first))
        wanted.append(encoded.input_ids[: next(i for i, label in enumerate(encoded.labels) if label != -100)])

    asked = []
    monkeypatch.setattr(drift, "chooser", lambda generator: first)
    monkeypatch.setattr(
        Answerer,
        "answer",
        lambda self, prompts, embeds: asked.extend(self.prompt_ids(p).tolist() for p in prompts) or [],
    )
    drift.measure(make_model(), processor, rows)
    assert asked == wanted

    predicted = []

    class Model:
        device = "cpu"
        eval = train = lambda self: None

        def generate(self, input_ids, **inputs):
            assert ("pixel_values" in inputs) == (processor.image_token_id in input_ids[0])
            predicted.append(input_ids[0].tolist())
            return input_ids

    class Shards(list):
        row = list.__getitem__

    maker = SimpleNamespace(
        names=["s"],
        shards={"s": Shards(rows)},
        mixture=SimpleNamespace(generator=lambda ref: np.random.default_rng(0)),
        encoder=encoder,
        tokenizer=processor.tokenizer,
        plan=SimpleNamespace(stage=SimpleNamespace(image_size=IMAGE_SIZE), held_out={}),
    )
    monkeypatch.setattr("pipelines.training.sample_predictions.chooser", lambda generator: first)
    maker.plan.held_out["s"] = [0, 2]
    made = SamplePredictor(maker).predict(Model())
    assert predicted == [wanted[0], wanted[2]]
    told = [(row.sample, row.question, row.expected) for row in made]
    assert told == [("s/1", "[vqa] what?", "red"), ("s/5", "who?", "a dog")], "the first question of several"


def test_the_jinja_template_groups_messages_as_serving_does():
    processor = processor_of("human")
    conversation = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "what is"}, {"type": "text", "text": "this?"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ""}]},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "sure?"},
    ]
    (text,), _ = render_jinja_template(
        [conversation], chat_template=processor.chat_template, **processor.tokenizer.special_tokens_map
    )
    assert text == processor.apply_chat_template(conversation)
    assert "<Img><ImageHere></Img> be short\nwhat is\nthis?  ###Assistant: a dog###<|endoftext|>###Human: sure?" in text


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "tool", "content": "x"}], "role"),
        ([{"role": "user", "content": [{"type": "video"}]}], "part"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image"}]}], "holds an image"),
    ],
)
def test_what_no_turn_can_hold_is_refused_by_both(messages, reason):
    processor = processor_of("human")
    with pytest.raises(ValueError, match=reason):
        processor.apply_chat_template(messages)
    with pytest.raises(Exception, match=reason):
        render_jinja_template([messages], chat_template=jinja_template(TEMPLATES["human"]), bos_token="<b>")


def test_assistant_tokens_and_open_answers():
    processor = processor_of("human")
    conversation = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    inputs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    answer = inputs["input_ids"][0][inputs["assistant_masks"][0].bool()].tolist()
    assert processor.tokenizer.decode(answer) == "good day###"
    text = processor.apply_chat_template(conversation, continue_final_message=True)
    assert text.endswith("###Assistant: good day")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("says_more", [True, False])
def test_a_conversation_that_the_assistant_begins_and_ends_has_one_layout(template, says_more):
    processor = processor_of(template)
    conversation = [
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    turns = [Exchange("", "hi"), Exchange("a", "b", is_complete=not says_more), *([] if says_more else [Exchange("")])]
    wanted = processor.layout().encode_prompt(turns)
    fields = {"continue_final_message": True} if says_more else {}
    request = ChatRequest.model_validate({"model": "m", "messages": conversation, **fields})
    served, _ = encode_conversation(read_turns(request).messages([], request), processor.layout())
    end = {"continue_final_message": says_more, "add_generation_prompt": not says_more}
    assert served.tolist() == wanted
    assert processor.apply_chat_template(conversation, tokenize=True, **end)[0].tolist() == wanted
    (text,), _ = render_jinja_template(
        [conversation], chat_template=processor.chat_template, **processor.tokenizer.special_tokens_map, **end
    )
    assert text == processor.apply_chat_template(conversation, **end) == processor.layout().render(turns)


def test_joined_messages_are_what_serving_reads():
    request = ChatRequest.model_validate(
        {
            "model": "m",
            "messages": [
                {"role": "developer", "content": "be short"},
                {"role": "user", "content": "one"},
                {"role": "user", "content": [{"type": "text", "text": "two"}]},
            ],
        }
    )
    ours = join_messages([ChatMessage("developer", "be short"), ChatMessage("user", "one"), ChatMessage("user", "two")])
    (served,) = read_turns(request).messages([], request)
    assert served.text == ours[0].text == "be short\none\ntwo"


@pytest.mark.parametrize(
    ("text", "answer"), [(" a dog ###b###c", "a dog"), ("a dog", "a dog"), ("### x", ""), ("", "")]
)
def test_an_answer_ends_at_the_first_end_symbol(text, answer):
    assert TEMPLATES["human"].cut_answer(text) == answer
