"""Settings of a job: where and how large. The science of the stages is in ``tinygptv.stages``.

A configuration file has common keys at the top and one section per job; command-line ``key=value`` pairs override both.
Unknown keys are errors. Every field is documented by its description, and ``--help`` prints them.

    recipe: mini
    seed: 0
    train:
      num_workers: 2
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

ROOT = Path(__file__).resolve().parents[1]


class SettingsError(ValueError):
    """A user's mistake in a configuration: one sentence that names the value, the place and the mend."""


class Settings(BaseModel):
    """Keys that every job understands."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())
    section: ClassVar[str] = ""

    recipe: str = Field("mini", description="paper, released or mini: which stages (tinygptv.stages)")
    seed: int = Field(0, ge=0, description="everything random follows from it")
    output: str = Field("", description="folder (or URI, where the job says so) for the results")
    tracking_uri: str = Field("", description="MLflow tracking URI; empty is sqlite:///<root>/mlflow.db; 'none' is off")
    experiment: str = Field("", description="MLflow experiment; empty is tinygptv-<recipe>")
    ray_address: str = Field("", description="Ray cluster to join; empty joins the current one or starts a local one")
    num_cpus: int = Field(0, ge=0, description="logical CPUs of a local cluster; 0 takes the machine's")
    object_store_mb: int = Field(0, ge=0, description="object store of a local cluster in MB; 0 leaves it to Ray")
    quiet: bool = Field(False, description="no progress bars")

    @classmethod
    def load(cls, config: str | Path | None, overrides: Sequence[str] = ()) -> Self:
        """Read a configuration file and apply overrides.

        Args:
            config: YAML file; None takes the defaults.
            overrides: ``key=value`` or ``key.sub=value``; values are read as YAML.

        Raises:
            SettingsError: the file is missing or no mapping, a key is unknown, or a value is of the wrong kind.
        """
        values = _read_yaml(Path(config)) if config else {}
        sections = {name for name in values if isinstance(values[name], dict) and name in _section_names()}
        own = values.get(cls.section, {}) if cls.section in sections else {}
        flat = {key: value for key, value in values.items() if key not in sections}
        unknown = set(flat) - set(Settings.model_fields)
        if unknown:
            raise SettingsError(_unknown_key(sorted(unknown)[0], str(config), {*Settings.model_fields, *_section_names()}))
        merged = {**flat, **own}
        for override in overrides:
            _apply_override(merged, override)
        return cls.parse(merged, str(config) if config else "the command line")

    @classmethod
    def parse(cls, values: dict[str, Any], place: str) -> Self:
        """Validate a plain mapping."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                raise SettingsError(_unknown_key(key, place, set(cls.model_fields))) from error
            raise SettingsError(f"{place}: {key}={first['input']!r} is not usable: {first['msg']}.") from error

    @classmethod
    def from_command_line(cls, argv: Sequence[str] | None, description: str) -> Self:
        """Parse ``--config FILE [key=value ...]``; a mistake ends the program with one sentence on stderr."""
        lines = [f"  {name:22} {field.description} [{field.default!r}]" for name, field in cls.model_fields.items()]
        parser = argparse.ArgumentParser(
            description=description,
            epilog="keys:\n" + "\n".join(lines),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--config", help="YAML file, e.g. configs/mini.yaml")
        flags = [name for name, field in cls.model_fields.items() if field.annotation is bool]
        for name in flags:
            parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=argparse.SUPPRESS)
        parser.add_argument("overrides", nargs="*", metavar="key=value")
        parsed = parser.parse_intermixed_args(argv)
        overrides = parsed.overrides + [f"{name}=true" for name in flags if getattr(parsed, name)]
        try:
            return cls.load(parsed.config, overrides)
        except SettingsError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error

    def output_dir(self, default: str) -> Path:
        """The result folder as an absolute path, made where it is missing."""
        path = Path(self.output or default).expanduser()
        path = path if path.is_absolute() else ROOT_OR_CWD() / path
        path.mkdir(parents=True, exist_ok=True)
        return path


def ROOT_OR_CWD() -> Path:
    """Where relative output paths start."""
    return Path.cwd()


def _section_names() -> set[str]:
    return {subclass.section for subclass in _subclasses(Settings) if subclass.section}


def _subclasses(cls: type[Settings]) -> list[type[Settings]]:
    return [cls, *(deep for sub in cls.__subclasses__() for deep in _subclasses(sub))]


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SettingsError(f"configuration {path} does not exist; the shipped ones are in {ROOT / 'configs'}.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise SettingsError(f"configuration {path} is no valid YAML: {error}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"configuration {path} holds a {type(values).__name__}; it must be a mapping of keys.")
    return values


def _unknown_key(key: str, place: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}."
    return f"{place}: unknown key {key!r}; {hint}"


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SettingsError(f"cannot read {override!r}: write settings as key=value.")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise SettingsError(f"cannot read the value of {override!r}: {error}.") from error
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise SettingsError(f"cannot set {key!r}: {parent!r} is a plain value, not a group of settings.")
    values[last] = value
