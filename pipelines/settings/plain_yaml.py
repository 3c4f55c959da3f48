"""YAML with the scalars of YAML 1.2: ``off`` is a word, ``5e-2`` a number, ``0123`` is 123, ``12:30`` is text.

PyYAML reads YAML 1.1, in which ``guard: off`` is false, ``5e-2`` is text and ``12:30`` is 750.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("float", r"[-+]?(?:\.\d+|\d+\.\d*)(?:[eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
     "-+.0123456789"),
    ("int", r"[-+]?\d+|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    ("merge", r"<<", "<"),
)  # fmt: skip
"""Tag, form and first characters of the scalars that are not text; an empty scalar is null."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


for _tag, _form, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_form})\\Z"), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"\Z"), [""])
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def load_yaml(text: str) -> Any:
    """Read a YAML document.

    Raises:
        yaml.YAMLError: it is none.
    """
    return yaml.load(text, Loader=_Loader)  # a subclass of the safe loader


def load_text_list(text: str) -> Any:
    """Read ``[a, b]`` with every entry as the text that was written.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    return yaml.load(text, Loader=yaml.BaseLoader)  # plain text, lists and mappings only
