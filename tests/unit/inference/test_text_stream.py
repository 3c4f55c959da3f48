"""Streamed text: whatever the pieces, the whole is right, no character is split and no stop string shows."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.serving_model import make_tokenizer
from tinygptv.inference.text_stream import TextStream, TokenBytes, _held_back

TOKENS = TokenBytes(make_tokenizer())


def pieces_of(ids, stop=()):
    stream = TextStream(TOKENS, stop)
    pieces = [stream.push(token) for token in ids]
    return [*pieces, stream.finish()], stream


@given(st.lists(st.integers(0, 399), max_size=60))
@settings(max_examples=100)
def test_pieces_add_up_to_the_decoded_text(ids):
    pieces, stream = pieces_of(ids)
    assert "".join(pieces) == stream.text
    wanted = make_tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert stream.text == wanted.strip()


@pytest.mark.parametrize(("text", "shown"), [("  a b ", "  a b"), (" ", ""), ("a", "a"), (" a### b", " a")])
def test_the_rest_of_an_answer_keeps_its_space_before(text, shown):
    stream = TextStream(TOKENS, ("###",), continues=True)
    pieces = [stream.push(token) for token in make_tokenizer().encode(text, add_special_tokens=False)]
    assert "".join(pieces) + stream.finish() == stream.text == shown


@given(st.text(max_size=40), st.lists(st.sampled_from(["###", "\n", "ab", "aab", "é!", "b"]), max_size=3, unique=True))
@settings(max_examples=100)
def test_no_part_of_a_stop_string_is_shown(text, stops):
    ids = make_tokenizer().encode(text, add_special_tokens=False)
    pieces, stream = pieces_of(ids, stops)
    shown = ""
    for piece in pieces:
        shown += piece
        assert not any(stop in shown for stop in stops)
    whole = make_tokenizer().decode(ids, clean_up_tokenization_spaces=False)
    found = [at for at in (whole.find(stop) for stop in stops) if at >= 0]
    assert stream.stopped == bool(found)
    if found and len(stops) == 1:
        assert shown == whole[: found[0]].strip()
    if not found:
        assert shown == whole.strip()


def test_the_first_of_several_stop_strings_in_a_token_ends_the_text():
    tokenizer = make_tokenizer()
    (token,) = tokenizer.encode("all", add_special_tokens=False)
    for stops in (("al", "ll"), ("ll", "al"), ("l", "a")):
        pieces, stream = pieces_of([token], stops)
        assert stream.stopped and stream.text == "".join(pieces) == ""
    assert pieces_of([token], ("ll",))[1].text == "a"


def test_a_character_of_several_tokens_comes_in_one_piece():
    ids = make_tokenizer().encode("a😀b", add_special_tokens=False)
    assert len(ids) == 6
    pieces, _ = pieces_of(ids)
    assert [piece for piece in pieces if piece] == ["a", "😀", "b"]


def test_the_end_symbol_stops_however_it_is_tokenised():
    tokenizer = make_tokenizer()
    joined = tokenizer.encode("###", add_special_tokens=False)
    single = tokenizer.convert_tokens_to_ids(["#", "#", "#"])
    assert joined != single
    for end in (joined, single):
        pieces, stream = pieces_of([*tokenizer.encode("red", add_special_tokens=False), *end], ["###"])
        assert "".join(pieces) == "red" and stream.stopped


def test_what_only_looked_like_a_stop_string_is_shown_in_the_end():
    ids = make_tokenizer().convert_tokens_to_ids(["a", "#", "#"])
    pieces, _ = pieces_of(ids, ["###"])
    assert pieces == ["a", "", "", "##"]


def test_an_empty_answer_may_stop_at_once():
    ids = make_tokenizer().encode("\nmore", add_special_tokens=False)
    pieces, stream = pieces_of(ids, ["\n"])
    assert "".join(pieces) == "" and stream.stopped


def test_ids_without_text_are_silent():
    pieces, _ = pieces_of([0, 5000, -1])
    assert "".join(pieces) == ""


def test_other_kinds_of_tokenizer_are_refused():
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"▁日": 0, "[UNK]": 1}, "[UNK]")))
    with pytest.raises(ValueError, match="byte-level"):
        TokenBytes(plain)


# ------------------------------------------------------------------------------------------------- piece by piece


class Bytes:
    """Tokens that are the bytes of their texts."""

    def __init__(self, *texts):
        self.texts = [text if isinstance(text, bytes) else text.encode() for text in texts]

    def __getitem__(self, token):
        return self.texts[token]


def shown(*texts, stop=()):
    """What each token sets free, and what the end does; the whole is what was given out."""
    stream = TextStream(Bytes(*texts), stop)
    pieces = [stream.push(token) for token in range(len(texts))]
    pieces.append(stream.finish())
    assert stream.text == "".join(pieces)
    assert stream.finish() == "" and stream.text == "".join(pieces), "there is one end"
    return pieces, stream


@pytest.mark.parametrize(
    ("texts", "stop", "pieces", "stopped"),
    [
        (("a", " ", "b"), (), ["a", "", " b", ""], False),
        ((" ", "\n", "a ", "b", " \n"), (), ["", "", "a", " b", "", ""], False),
        (("a", "  "), (), ["a", "", ""], False),
        ((b"\xc3", b"\xbc", b"\xc3"), (), ["", "\u00fc", "", "\ufffd"], False),
        (("ab", "cd"), ("xbc",), ["ab", "cd", ""], False),
        (("xb", "d"), ("xbc",), ["", "xbd", ""], False),
        (("axb", "cz", "more"), ("xbc",), ["a", "", "", ""], True),
        (("a ", "x", "b", "late"), ("xb",), ["a", "", "", "", ""], True),
        (("a", "x", "y"), ("xyz", "q"), ["a", "", "", "xy"], False),
        (("a b", "c"), ("bc", "b cd"), ["a", "", ""], True),
        (("one.", " two.", " three"), (".",), ["one", "", "", ""], True),
        (("x",), ("x",), ["", ""], True),
        (("abab", "c"), ("ababc",), ["", "", ""], True),
        (("aab", "x"), ("ab!", "b!!!"), ["a", "abx", ""], False),
        (("a", " #"), ("##",), ["a", "", " #"], False),
        ((" #",), ("##",), ["", "#"], False),
        (("a", "# "), ("# #",), ["a", "", "#"], False),
        (("axbxb",), ("xb",), ["a", ""], True),
        (("a", " b #x"), ("#x",), ["a", " b", ""], True),
        (("ab#", b"\xc3"), ("b#x", "\ufffd"), ["a", "", "b#"], True),
    ],
)
def test_what_each_token_sets_free(texts, stop, pieces, stopped):
    found, stream = shown(*texts, stop=stop)
    assert found == pieces and stream.stopped is stopped


@pytest.mark.parametrize(
    ("text", "stop", "length"),
    [
        ("ab", (), 0),
        ("ab", ("bc",), 1),
        ("ab", ("abc",), 2),
        ("ab", ("abc", "bx"), 2),
        ("ab", ("bx", "abc"), 2),
        ("ab", ("ab",), 0),
        ("b", ("bbb",), 1),
        ("bbbb", ("bbb",), 2),
        ("", ("a",), 0),
        ("xa", ("ab", "a!"), 1),
        ("xab", ("abcd",), 2),
    ],
)
def test_the_longest_end_that_may_begin_a_stop_string_is_held_back(text, stop, length):
    assert _held_back(text, stop) == length


def test_the_bytes_of_special_added_and_unknown_tokens():
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.add_tokens(["<new \u00fc>"])
    number = tokenizer.convert_tokens_to_ids("<new \u00fc>")
    tokens = TokenBytes(tokenizer)
    assert tokens.special_ids == {0} and tokens[0] == b""
    assert tokens[number] == "<new \u00fc>".encode() and len(tokens.table) == number + 1
    assert tokens[number + 1] == tokens[-1] == b""
    tokens.table[0] = b"!"
    assert tokens[0] == b"!", "where the first token is an ordinary one"
    (space,) = tokenizer.encode(" ", add_special_tokens=False)
    assert tokens[space] == b" "
