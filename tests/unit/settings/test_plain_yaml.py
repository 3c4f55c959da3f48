"""Scalars of YAML 1.2, and lists as they are written."""

from __future__ import annotations

import math

import pytest
import yaml

from pipelines.settings.near_match import near_match
from pipelines.settings.plain_yaml import load_text_list, load_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, None) for text in ("", "~", "null", "Null", "NULL")),
        *((text, True) for text in ("true", "True", "TRUE")),
        *((text, False) for text in ("false", "False", "FALSE")),
        *((text, text) for text in ("on", "off", "yes", "no", "12:30", "2024-01-01", "1_000", "nULL", "1e", ".", "x-")),
        *((text, int(text)) for text in ("0", "-3", "+7", "0123")),
        *((text, float(text)) for text in ("1.5", ".5", "5.", "5e-2", "1E3", "-1.5e+3")),
        ("0x1F", 31),
        ("0o17", 15),
        (".inf", math.inf),
        ("-.INF", -math.inf),
    ],
)
def test_scalars(text, value):
    found = load_yaml(text)
    assert (found, type(found)) == (value, type(value))


def test_containers_merge_keys_and_nan():
    assert load_yaml("a: &x {b: 1}\nc: {<<: *x, d: off}") == {"a": {"b": 1}, "c": {"b": 1, "d": "off"}}
    assert load_yaml("a:\nb: ''\nc: [d, ]") == {"a": None, "b": "", "c": ["d"]}, "nothing is null"
    assert math.isnan(load_yaml(".nan"))
    assert load_text_list("[1, on, 'a b', null]") == ["1", "on", "a b", "null"]
    with pytest.raises(yaml.YAMLError):
        load_yaml("!!python/object/apply:os.system [x]")


def test_a_near_name_or_all_in_their_order():
    assert near_match("max_step", ["min_side", "max_steps"]) == "did you mean 'max_steps'?"
    assert near_match("zebra", ["b", "a"]) == "known: b, a."
