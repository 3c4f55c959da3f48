"""Text normalisation of the official VQA evaluation: what makes two short answers equal.

Source: the VQA v2 evaluation as published (punctuation, number words, articles, contractions), oddities included: its
period rule removes every period that no digit follows, and a few of its contractions are mistyped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBER_WORDS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = frozenset({"a", "an", "the"})

# Written without its apostrophe -> with it; and a few words whose apostrophe is misplaced.
_PLAIN = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm "
    "I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd "
    "there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's "
    "where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll "
    "you're you've"
)
CONTRACTIONS = {word.replace("'", ""): word for word in _PLAIN.split()} | {
    "couldnt've": "couldn't've", "couldn'tve": "couldn't've", "hadnt've": "hadn't've", "hadn'tve": "hadn't've",
    "hed've": "he'd've", "he'dve": "he'd've", "Id've": "I'd've", "I'dve": "I'd've", "itd've": "it'd've",
    "it'dve": "it'd've", "let's": "let's", "mightnt've": "mightn't've", "mightn'tve": "mightn't've",
    "notve": "not've", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at", "she'dve": "she'd've",
    "she's": "she's", "shed've": "she'd've", "somebody'd": "somebodyd",
    "shouldnt've": "shouldn't've", "shouldn'tve": "shouldn't've", "somebody'dve": "somebody'd've",
    "somebodyd've": "somebody'd've", "someoned've": "someone'd've", "someone'dve": "someone'd've",
    "somethingd've": "something'd've", "something'dve": "something'd've", "thered've": "there'd've",
    "there'dve": "there'd've", "theyd've": "they'd've", "they'dve": "they'd've", "wed've": "we'd've",
    "we'dve": "we'd've", "whod've": "who'd've", "who'dve": "who'd've", "wouldnt've": "wouldn't've",
    "wouldn'tve": "wouldn't've", "yall'll": "y'all'll", "y'allll": "y'all'll", "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've", "youd've": "you'd've", "you'dve": "you'd've",
}  # fmt: skip

_CURLY = str.maketrans("'", "\u2019")
_STRAIGHT_KEYS = ("couldn'tve", "hadn'tve")
_STRAIGHT_WORDS = ("ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've")
VIZWIZ_CONTRACTIONS = {
    key if key in _STRAIGHT_KEYS else key.translate(_CURLY): word if word in _STRAIGHT_WORDS else word.translate(_CURLY)
    for key, word in CONTRACTIONS.items()
}
"""The table in VizWiz's script: most apostrophes are typographic, so that "dont" is not an annotator's "don't"."""

_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"(\d)(,)(\d)")


def remove_punctuation(text: str) -> str:
    """Delete punctuation that touches a space (anywhere in the text) or stands in a text with a thousands comma; else
    replace it with a space; then drop periods that no digit follows."""
    out = text
    for mark in PUNCTUATION:
        if f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text):
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    return _PERIOD.sub("", out)


def normalise_words(text: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """Lower-case; number words to digits; articles away; contractions with their apostrophe."""
    words = [NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


def normalise_answer(text: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """Both steps, on text without newlines and tabs."""
    plain = text.replace("\n", " ").replace("\t", " ").strip()
    return normalise_words(remove_punctuation(plain), contractions)
