"""Rendering and token layout, checked by hand on a byte tokenizer."""

from __future__ import annotations

import numpy as np
import pytest

from tinygptv.data.collate import LoadedSample, collate, cut, pack
from tinygptv.data.prompt_layout import Exchange, PromptLayout
from tinygptv.data.prompts import INSTRUCTIONS, TEMPLATES, clean_caption, escape_markers
from tinygptv.data.sample import (
    IGNORE_INDEX,
    SampleEncoder,
    SampleRow,
    TextLimits,
    Turn,
    chooser,
    render_sample,
)
from tinygptv.miniature.tiny import tiny_tokenizer

IMAGE = 256


def first(options):
    return options[0]


def encoder(template="human", limit=1000, **limits):
    layout = PromptLayout(tiny_tokenizer(), TEMPLATES[template], image_token_id=IMAGE, num_query_tokens=3)
    return SampleEncoder(layout, TextLimits(limit, **limits))


def text_of(ids):
    return "".join("#IMG" if i == IMAGE else tiny_tokenizer().decode([i]) for i in ids).replace("#IMG#IMG#IMG", "<I>")


def row(task, turns, **fields):
    return SampleRow("1", "test", task, tuple(Turn(q, tuple(a)) for q, a in turns), **fields)


PICTURE = {"image": b"x", "width": 200, "height": 100}


@pytest.mark.parametrize(
    ("sample", "instruction", "answer"),
    [
        (row("pair", [("", ["a dog"])], **PICTURE), None, "a dog"),
        (row("align", [("", ["a dog"])], **PICTURE), "Describe this image in detail.", "a dog"),
        (row("vqa", [("what?", ["x", "y"])], **PICTURE), "[vqa] what?", "x"),
        (
            row("refer", [("", ["the dog"])], boxes=((20, 10, 100.9, 99), ), **PICTURE),
            "[refer] the dog",
            "{<10><10><50><99>}",
        ),
        (
            row("identify", [("", ["the dog"])], boxes=((20, 10, 100.9, 99), ), **PICTURE),
            "[identify] {<10><10><50><99>}",
            "the dog",
        ),
        (
            row("detection", [("a dog", ["<p>a dog</p> {<1><2><3><4>}"])], **PICTURE),
            "[detection] a dog",
            "<p>a dog</p> {<1><2><3><4>}",
        ),
        (row("text", [("say hi", ["hi"])]), "say hi", "hi"),
        (row("vqa", [("is {} a set?", ["no"])], **PICTURE), "[vqa] is {} a set?", "no"),
    ],
)  # fmt: skip
def test_rendering(sample, instruction, answer):
    assert render_sample(sample, first) == [Exchange(instruction, answer, int(sample.image is not None))]


def test_a_wording_takes_the_question_once_and_as_it_is():
    sample = row("vqa", [("is {} a set?", ["no"])], **PICTURE)

    def choose(options):
        return "say {} or {}" if options is INSTRUCTIONS["vqa"] else options[0]

    assert render_sample(sample, choose) == [Exchange("say is {} a set? or {}", "no", 1)]


def test_an_image_is_shown_once():
    turns = [("a?", ["b"]), ("c?", ["d"]), ("e?", ["f"])]
    shown = [exchange.num_images for exchange in render_sample(row("conversation", turns, **PICTURE), first)]
    assert shown == [1, 0, 0]
    assert [e.num_images for e in render_sample(row("text", turns), first)] == [0, 0, 0]


# ---------------------------------------------------------------------- rows and draws

STORED = {
    "id": "7",
    "source": "refcoco",
    "task": "refer",
    "image": b"jpeg",
    "width": 200,
    "height": 100,
    "turns": [{"question": "where?", "answers": ["here", "there"]}, {"question": "", "answers": ["x"]}],
    "boxes": [[1.0, 2.0, 3.5, 4.0], [5.0, 6.0, 7.0, 8.0]],
}


def test_a_row_is_its_columns():
    loaded = SampleRow.from_dict(STORED)
    assert loaded == SampleRow(
        id="7",
        source="refcoco",
        task="refer",
        turns=(Turn("where?", ("here", "there")), Turn("", ("x",))),
        image=b"jpeg",
        width=200,
        height=100,
        boxes=((1.0, 2.0, 3.5, 4.0), (5.0, 6.0, 7.0, 8.0)),
    )
    assert loaded.to_dict() == STORED
    whole_numbers = SampleRow.from_dict({**STORED, "boxes": [[1, 2, 3, 4]]}).boxes
    assert whole_numbers == ((1, 2, 3, 4),) and all(isinstance(corner, float) for corner in whole_numbers[0])


def test_a_row_of_text_has_no_image_and_no_boxes():
    text = {**STORED, "task": "text", "image": None, "width": 0, "height": 0}
    for boxes in (None, []):
        loaded = SampleRow.from_dict({**text, "boxes": boxes})
        assert loaded == SampleRow("7", "refcoco", "text", loaded.turns) and loaded.boxes == () and loaded.image is None
        assert loaded.to_dict() == {**text, "boxes": []}


def test_a_chooser_draws_each_option_as_often():
    choose = chooser(np.random.default_rng(0))
    drawn = [choose(("a", "b", "c")) for _ in range(3000)]
    assert all(abs(drawn.count(option) - 1000) < 100 for option in "abc")
    again = chooser(np.random.default_rng(0))
    assert [again(("a", "b", "c")) for _ in range(3000)] == drawn
    halves = [choose(("a", "b")) for _ in range(1000)]
    assert 400 < halves.count("a") < 600


def test_one_option_takes_no_draw():
    """A wording that is added to another task must not change what this one draws."""
    generator = np.random.default_rng(0)
    assert chooser(generator)(["only"]) == "only"
    assert generator.integers(1 << 30) == np.random.default_rng(0).integers(1 << 30)


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"max_text_tokens": 0}, "limits.max_text_tokens"),
        ({"max_text_tokens": 2.5}, "limits.max_text_tokens"),
        ({"max_text_tokens": 1, "max_context_tokens": 0}, "limits.max_context_tokens"),
        ({"max_text_tokens": 1, "max_context_tokens": 9.5}, "limits.max_context_tokens"),
    ],
)
def test_limits_are_whole_numbers_from_1_on(limits, named):
    with pytest.raises(ValueError, match=rf"^{named}\b"):
        TextLimits(**limits)
    assert TextLimits(1, 1) == TextLimits(1, 1, mask_inner_bos=False)
    assert TextLimits(1).max_context_tokens == 3800


def test_later_turns_have_no_image():
    sample = row("conversation", [("what is it?", ["a dog"]), ("color?", ["red"])], **PICTURE)
    assert render_sample(sample, first)[1] == Exchange("color?", "red")


def test_rendering_errors_name_the_sample():
    with pytest.raises(ValueError, match="'1' of 'test' has task 'nonsense'"):
        render_sample(row("nonsense", [("", ["a"])]), first)
    with pytest.raises(ValueError, match="no box"):
        render_sample(row("refer", [("", ["a"])], **PICTURE), first)


def test_single_turn_layout():
    encoded = encoder().encode([Exchange("[vqa] what?", "a dog", 1)])
    assert text_of(encoded.input_ids) == "<|endoftext|>###Human: <Img><I></Img> [vqa] what?  ###Assistant: a dog###"
    learned = [i for i, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != IGNORE_INDEX]
    assert text_of(learned) == "a dog###" and IGNORE_INDEX == -100, "which torch's cross-entropy leaves out by default"
    assert all(a == b for a, b in zip(encoded.input_ids, encoded.labels, strict=True) if b != IGNORE_INDEX)


def test_image_without_words():
    encoded = encoder("caption").encode([Exchange(None, "a dog", 1)])
    assert text_of(encoded.input_ids) == "<|endoftext|><I>a dog\n"


def test_several_turns_learn_all_answers_and_no_question():
    turns = [Exchange("one?", "A", 1), Exchange("two?", "B")]
    encoded = encoder("inst").encode(turns)
    assert text_of(encoded.input_ids) == (
        "<|endoftext|>[INST] <Img><I></Img> one?  [/INST]A###<|endoftext|>[INST] two?  [/INST]B###"
    )
    learned = [i for i, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != IGNORE_INDEX]
    assert text_of(learned) == "A###B###"
    assert all(encoded.attention_mask)
    hidden = encoder("inst", mask_inner_bos=True).encode(turns)
    assert hidden.attention_mask.count(0) == 1 and hidden.input_ids[hidden.attention_mask.index(0)] == 0


def test_answers_are_cut_at_the_limit():
    encoded = encoder(limit=3).encode([Exchange("q", "abcdef")])
    assert text_of([i for i in encoded.labels if i != IGNORE_INDEX]) == "abc"


def test_an_answer_cannot_end_itself():
    """Nothing behind an end symbol inside an answer could ever be said."""
    answer = "## Summary\n### Objects\n##### a star"
    learned = [i for i in encoder().encode([Exchange("q", answer)]).labels if i != IGNORE_INDEX]
    assert text_of(learned) == "## Summary\n# # # Objects\n# # # # # a star###"
    learned = [
        i for i in encoder("caption").encode([Exchange(None, "a star\non a sea", 1)]).labels if i != IGNORE_INDEX
    ]
    assert text_of(learned) == "a star on a sea\n"


def test_caption_cleaner():
    assert clean_caption('  A "Dog", (running)!\nOn the grass...  ') == "a dog , running on the grass"
    assert clean_caption("word " * 60) == " ".join(["word"] * 50)


def test_markers_in_untrusted_text_become_words():
    harmless = escape_markers("<ImageHere> and <|endoftext|>")
    assert "<ImageHere>" not in harmless and "<|endoftext|>" not in harmless


def test_wordings_take_one_question():
    assert {task: len(wordings) for task, wordings in INSTRUCTIONS.items()} == {
        "pair": 0, "align": 4, "vqa": 2, "caption": 17, "refer": 7, "identify": 7, "grounding": 4,
        **dict.fromkeys(("detection", "conversation", "instruct", "text"), 1),
    }  # fmt: skip
    assert all(len(set(wordings)) == len(wordings) for wordings in INSTRUCTIONS.values())
    for task, wordings in INSTRUCTIONS.items():
        for wording in wordings:
            assert wording.count("{}") == (0 if task in ("align", "caption", "grounding") else 1), (task, wording)


# ------------------------------------------------------------------ batches


def loaded(length, source=0, answer=2):
    encoded = encoder().encode([Exchange("q" * length, "a" * answer)])
    return LoadedSample(encoded, source)


def test_padding_stands_at_the_end_and_is_not_supervised():
    batch = collate([loaded(5), loaded(9, source=1)], pad_token_id=0)
    assert batch.attention_mask is None and batch.position_ids is None
    assert batch.input_ids.shape[0] == 2 and batch.input_ids[0, -4:].tolist() == [0] * 4
    assert len(batch.supervised_ids) == 2 * (2 + 3)
    following = batch.input_ids.ravel()[batch.supervised_positions + 1]
    assert following.tolist() == batch.supervised_ids.tolist()
    assert sorted(set(batch.supervised_sources.tolist())) == [0, 1]


def test_packing_keeps_samples_whole_and_restarts_positions():
    samples = [loaded(n) for n in (3, 30, 7, 12, 5)]
    batch = collate(samples, pad_token_id=0, pack_length=70)
    assert batch.input_ids.shape[0] < len(samples)
    assert batch.num_real == sum(len(s.encoded.input_ids) for s in samples)
    assert (batch.position_ids == 0).sum() >= len(samples)
    assert len(batch.supervised_ids) == sum(s.encoded.labels.count(-100) * 0 + 5 for s in samples)


def test_bins_hold_what_fits():
    lengths = [5, 9, 1, 4, 4, 7]
    bins = pack(lengths, 10)
    assert sorted(i for row in bins for i in row) == list(range(6))
    assert all(sum(lengths[i] for i in row) <= 10 for row in bins)
    assert len(bins) == 4


def test_micro_batches_have_so_many_samples_and_tokens_at_most():
    lengths = [3, 3, 4, 8, 8, 20]
    assert cut(lengths, 4) == [slice(0, 4), slice(4, 8)]
    assert [sum(lengths[piece]) for piece in cut(lengths, 6, 27, padded=False)] == [26, 20]
    assert [lengths[piece] for piece in cut(lengths, 6, 27)] == [[3, 3, 4], [8, 8], [20]]
    assert cut(lengths, 2, 1000) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert cut([50, 60], 8, 10) == [slice(0, 1), slice(1, 2)]  # longer ones stand alone
    assert cut([], 8, 10) == cut([], 8) == []


@pytest.mark.parametrize("padded", [False, True])
def test_micro_batches_are_few_and_of_like_size(padded):
    lengths = sorted(int(n) for n in np.random.default_rng(0).integers(20, 800, 200))

    def tokens(piece):
        return max(lengths[piece]) * len(lengths[piece]) if padded else sum(lengths[piece])

    pieces = cut(lengths, 64, 6000, padded=padded)
    assert [i for piece in pieces for i in range(*piece.indices(200))] == list(range(200))
    assert all(tokens(piece) <= 6000 for piece in pieces)
    assert len(pieces) <= sum(tokens(piece) for piece in pieces) / 6000 + 2
    assert max(map(tokens, pieces)) - min(map(tokens, pieces)) < 3000


def test_packing_refuses_hidden_tokens():
    turns = [Exchange("one?", "A"), Exchange("two?", "B")]
    hidden = LoadedSample(encoder(mask_inner_bos=True).encode(turns), 0)
    with pytest.raises(ValueError, match="cannot be packed"):
        collate([hidden], 0, pack_length=100)
    assert collate([hidden], 0).attention_mask is not None


# ---------------------------------------------------------------------- limits


def test_a_question_beyond_the_limit_loses_its_own_last_words_and_no_word_of_the_template():
    question = "[vqa] what is the colour of the very long thing?"
    whole = encoder().encode([Exchange(question, "a dog", 1)])
    assert not whole.question_cut and not whole.answer_cut
    length = len(whole.input_ids) - len("a dog###") - 1  # BOS does not count
    exact = encoder(max_context_tokens=length).encode([Exchange(question, "a dog", 1)])
    assert exact == whole, "what just fits is not cut"
    encoded = encoder(max_context_tokens=length - 10).encode([Exchange(question, "a dog", 1)])
    expected = "<|endoftext|>###Human: <Img><I></Img> [vqa] what is the colour of the very l  ###Assistant: a dog###"
    assert encoded.question_cut and not encoded.answer_cut
    assert text_of(encoded.input_ids) == expected
    assert len(encoded.input_ids) == length - 10 + 1 + len("a dog###")
    assert text_of([i for i in encoded.labels if i != IGNORE_INDEX]) == "a dog###"


def test_the_releases_layout_cuts_the_template_too_and_says_so():
    encoded = encoder(max_context_tokens=30, mask_inner_bos=True).encode([Exchange("what is it?", "a dog", 1)])
    assert encoded.question_cut and len(encoded.input_ids) == 1 + 30 + len("a dog###")
    assert "Assistant" not in text_of(encoded.input_ids)


def test_a_limit_without_room_for_the_template_is_refused():
    with pytest.raises(ValueError, match=r"max_context_tokens=20 has no room for the image .* template 'human'"):
        encoder(max_context_tokens=20).encode([Exchange("what?", "a dog", 1)])


def test_an_answer_beyond_the_limit_says_so():
    encoded = encoder(limit=4).encode([Exchange("what?", "a dog", 1)])
    assert encoded.answer_cut and not encoded.question_cut
    assert text_of([i for i in encoded.labels if i != IGNORE_INDEX]) == "a do"
    assert len(encoded.labels) == len(encoded.attention_mask) == len(encoded.input_ids)
    assert not encoder(limit=8).encode([Exchange("what?", "a dog", 1)]).answer_cut, "it just fits"
