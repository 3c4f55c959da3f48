"""The command line of a job: ``--config FILE``, ``key=value`` words, ``--help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from pipelines.settings.errors import SettingsError


@dataclass(frozen=True)
class Words:
    """Parsed command line.

    Attributes:
        config: path of a YAML file; None for none.
        overrides: ``key=value`` words.
        help: ``--help`` is among them.
    """

    config: str | None
    overrides: list[str]
    help: bool


def parse_words(fields: Mapping[str, FieldInfo], argv: Sequence[str]) -> Words:
    """Read the words of a command line; a key that is a switch may be written ``--dry-run``.

    Args:
        fields: keys of the job.
        argv: the words.

    Raises:
        SettingsError: an option is unknown.
    """
    flags = [name for name, field in fields.items() if field.annotation is bool]
    parser = _parser("")
    for name in flags:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
    parsed, left = parser.parse_known_intermixed_args(list(argv))
    overrides = list(parsed.overrides)
    for word in left:
        if word.startswith("-"):
            key = word.lstrip("-").partition("=")[0].replace("-", "_")
            example = key if key in fields else "key"
            raise SettingsError(f"{word} is no option: write settings as {example}=VALUE, without dashes.")
        overrides.append(word)
    overrides += [f"{name}=true" for name in flags if getattr(parsed, name)]
    return Words(parsed.config, overrides, parsed.help)


def print_help(
    fields: Mapping[str, FieldInfo], settings: Mapping[str, Any], description: str, config: str | None
) -> None:
    """Print the usage and every key with its value, one line each.

    Args:
        fields: keys of the job.
        settings: their values as they would be used.
        description: what the job does, and its examples.
        config: the configuration file that was read; None for none.
    """
    shown = {name: f"{name}={_value(settings[name])}" for name in fields}
    width = min(32, max(map(len, shown.values())))
    values = f"with the values of {config}" if config else "with their defaults; --config FILE --help shows a file's"
    lines = [f"  {shown[name]:{width}}  {field.description}" for name, field in fields.items()]
    parser = _parser(description, "\n".join([f"keys, {values}:", *lines]))
    parser.print_help(sys.stdout)


def _parser(description: str, epilog: str = "") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this text and exit")
    parser.add_argument("--config", metavar="FILE", help="YAML file, e.g. configs/mini.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the file's values")
    return parser


def _value(value: Any) -> str:
    """A value as it would be written on the command line."""
    if isinstance(value, SecretStr) or (isinstance(value, list) and any(isinstance(v, SecretStr) for v in value)):
        return "..."
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_value(item)}" for key, item in value.items()) + "}"
    return "" if value is None else str(value)
