"""Reading settings: a YAML file, its section for a job, ``key=value`` overrides, and one sentence for each mistake."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from pipelines.settings.command_line import parse_words, print_help
from pipelines.settings.errors import SettingsError
from pipelines.settings.folders import make_local_folder, refuse_unwritable
from pipelines.settings.near_match import near_match
from pipelines.settings.plain_yaml import load_text_list, load_yaml

ROOT = Path(__file__).resolve().parents[2]
"""The project's folder."""

_JOB_FOLDER = "working_dir_files"
"""Ray unpacks the working directories of submitted jobs below a folder of this name."""


def is_in_job_folder(path: Path) -> bool:
    """Whether an absolute path lies in the working directory of a submitted job, which Ray removes afterwards."""
    return _JOB_FOLDER in path.parts


SECTIONS: dict[str, type[Settings]] = {}
"""Section of a configuration file -> settings of the job that reads it."""


class Settings(BaseModel):
    """Keys that every job understands."""

    model_config = ConfigDict(
        extra="forbid",
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # `name: 2024` in a file is a name
    )
    section: ClassVar[str] = ""

    recipe: str = Field("mini", description="paper, released or mini: which stages (tinygptv.training.stages)")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="everything random follows from it")
    output: str = Field("", description="folder (or URI, where the job says so) for the results")
    tracking_uri: str = Field(
        "", description="MLflow tracking URI; empty is sqlite:///mlflow.db in the working directory; none is off"
    )
    experiment: str = Field("", description="MLflow experiment; empty is tinygptv-<recipe>")
    ray_address: str = Field("", description="Ray cluster to join; empty joins the current one or starts a local one")
    ray_loopback: bool = Field(
        True, description="Ray's ports of a local cluster listen on 127.0.0.1 alone; false: on the network"
    )
    num_cpus: int = Field(0, ge=0, description="logical CPUs of a local cluster; 0 takes the machine's")
    object_store_mb: int = Field(0, ge=0, description="object store of a local cluster in MB; 0 leaves it to Ray")
    quiet: bool = Field(False, description="no progress bars")

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Register the job's section."""
        if cls.section:
            SECTIONS[cls.section] = cls

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_true_as_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = set(_kinds(cls.model_fields[info.field_name or ""].annotation))
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise ValueError("a number is wanted, not true or false")
        return value

    @classmethod
    def load(cls, config: str | Path | None, overrides: Sequence[str] = ()) -> Self:
        """Read a configuration file and apply overrides.

        Args:
            config: YAML file; None takes the defaults.
            overrides: ``key=value``. A key that is text takes its value as it is written, whatever characters it
                holds; lists are written ``[a, b]`` or ``a,b``; ``key.sub=value`` is read as YAML.

        Raises:
            SettingsError: the file is missing or no mapping, a key is unknown, or a value is of the wrong kind.
        """
        values = _read_file(Path(config)) if config else {}
        own = values.get(cls.section) or {}
        if not isinstance(own, dict):
            raise SettingsError(f"{config}: section {cls.section!r} holds {own!r}; it must be a mapping of keys.")
        common = {key: value for key, value in values.items() if key not in SECTIONS}
        unknown = sorted(str(key) for key in set(common) - set(Settings.model_fields))
        if unknown:
            raise SettingsError(_unknown_key(unknown[0], str(config), {*Settings.model_fields, *SECTIONS}))
        merged = {**common, **own}
        locations = {key: str(config) for key in common} | {key: f"{config}, section {cls.section}" for key in own}
        for override in overrides:
            cls._apply_override(merged, override)
            locations[override.partition("=")[0].partition(".")[0]] = "the command line"
        return cls.parse(merged, str(config) if config else "the command line", locations)

    @classmethod
    def parse(cls, values: dict[str, Any], location: str, locations: Mapping[str, str] | None = None) -> Self:
        """Validate a plain mapping.

        Args:
            values: by key.
            location: where they come from, for the error.
            locations: where single keys come from, if from elsewhere.

        Raises:
            SettingsError: a key is unknown, or a value is of the wrong kind.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else ""
            raise SettingsError(cls._describe(first, (locations or {}).get(name, location))) from None

    def given_beside(self, config: str | Path | None) -> dict[str, object]:
        """Keys of every job, but ``output``, whose values are not those of the configuration file.

        A job that runs others, which read the same file, hands them on.
        """
        of_file = self.load(config)
        names = [name for name in Settings.model_fields if name in self.model_fields_set and name != "output"]
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(of_file, name)}

    @classmethod
    def from_command_line(cls, argv: Sequence[str] | None, description: str | None) -> Self:
        """Parse ``--config FILE [key=value ...]``; a mistake ends the program with one sentence on stderr.

        ``--help`` lists the keys with the values that the configuration and the overrides beside it give them.
        """
        try:
            words = parse_words(cls.model_fields, sys.argv[1:] if argv is None else argv)
            settings = cls.load(words.config, words.overrides)
        except SettingsError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        if words.help:
            values = {name: getattr(settings, name) for name in cls.model_fields}
            print_help(cls.model_fields, values, description or "", words.config)
            raise SystemExit(0)
        return settings

    def output_location(self, default: str) -> str:
        """The output folder: an absolute path, or a URI as it is written.

        Raises:
            SettingsError: it would lie in the folder of a submitted job, which Ray removes afterwards, or on the hub;
                or it cannot be written.
        """
        given = self.output.removeprefix("file://") or default
        if given.startswith("hf://"):
            raise SettingsError(
                f"output={given} is on the hub, where each file would be a commit: give a folder or a bucket, and "
                "upload a finished checkpoint with `python -m tinygptv.hub push FOLDER org/name`."
            )
        if "://" in given:
            return given.rstrip("/")
        path = Path(given).expanduser()
        if not path.is_absolute() and is_in_job_folder(Path.cwd()):
            raise SettingsError(
                f"output={self.output or default} is relative, and Ray removes the working directory of a submitted "
                "job after it: give an absolute path that stays, e.g. output=/data/run1, or a URI, e.g. s3://bucket/run1."
            )
        path = path.absolute()
        refuse_unwritable("output", path)
        return str(path)

    def output_dir(self, default: str) -> Path:
        """The output folder on this machine as an absolute path, made where it is missing.

        Raises:
            SettingsError: it is a URI, or would lie in the folder of a submitted job.
        """
        location = self.output_location(default)
        if "://" in location:
            raise SettingsError(f"output={location} is a URI: this job writes on this machine's disk; give a folder.")
        path = Path(location)
        make_local_folder(path, "output", "Give another output=.")
        return path

    @classmethod
    def _apply_override(cls, values: dict[str, Any], override: str) -> None:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise SettingsError(f"cannot read {override!r}: write settings as key=value.")
        if key.partition(".")[0] not in cls.model_fields:
            raise SettingsError(cls._unknown_override(key, override))
        *parents, last = key.split(".")
        field = None if parents else cls.model_fields.get(key)
        try:
            value = _read_text(text, list(_kinds(field.annotation))) if field else load_yaml(text) if text else ""
        except yaml.YAMLError as error:
            raise SettingsError(f"cannot read the value of {override!r}: {' '.join(str(error).split())}.") from error
        for parent in parents:
            if values.setdefault(parent, {}) is None:
                values[parent] = {}
            values = values[parent]
            if not isinstance(values, dict):
                raise SettingsError(f"cannot set {key!r}: {parent!r} is a plain value, not a group of settings.")
        values[last] = value

    @classmethod
    def _unknown_override(cls, key: str, override: str) -> str:
        section, _, rest = key.partition(".")
        if section == cls.section and rest.partition(".")[0] in cls.model_fields:
            return f"the command line: {override!r} names the section; write {override.partition('.')[2]!r}."
        return _unknown_key(section if rest else key, "the command line", set(cls.model_fields))

    @classmethod
    def _describe(cls, error: ErrorDetails, location: str) -> str:
        """One sentence for a value that does not fit; values of secret keys are not shown."""
        name = str(error["loc"][0]) if error["loc"] else ""
        key = ".".join([name, *(str(part) for part in error["loc"][1:] if isinstance(part, int))])
        if error["type"] == "extra_forbidden":
            return _unknown_key(name, location, set(cls.model_fields))
        is_secret = name in cls.model_fields and SecretStr in _kinds(cls.model_fields[name].annotation)
        value = "..." if is_secret else repr(error["input"])
        return f"{location}: {key}={value} is not usable: {error['msg'].removeprefix('Value error, ')}."


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that an annotation names: ``list[str] | None`` -> list, str, NoneType; literals give their types."""
    origin = get_origin(annotation)
    if origin is Literal:
        yield from {type(value) for value in get_args(annotation)}
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from _kinds(part)
    elif origin is not None:
        yield origin
        for part in get_args(annotation):
            yield from _kinds(part)
    else:
        yield annotation


def _read_text(text: str, kinds: Iterable[Any]) -> Any:
    """The value of a command-line setting: text stays text; numbers and booleans are read by pydantic."""
    if dict in kinds:
        return load_yaml(text) if text else {}
    if type(None) in kinds and text in ("", "null"):
        return None
    if list in kinds:
        if text.lstrip().startswith("["):
            return load_text_list(text)
        if not _takes_plain_text(kinds):
            return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _takes_plain_text(kinds: Iterable[Any]) -> bool:
    """Whether plain text is allowed beside the list: ``str | list[str]``, not ``list[str]``."""
    return list(kinds).count(str) > 1


def shipped_configs() -> Path:
    """The folder of the shipped configurations: of the source tree, or of an installed package."""
    tree = ROOT / "configs"
    return tree if tree.is_dir() else Path(__file__).resolve().parents[1] / "configs"


def _read_file(path: Path) -> dict[str, Any]:
    shipped = shipped_configs() / path.name
    if not path.is_file() and path.parts in ((path.name,), ("configs", path.name)) and shipped.is_file():
        path = shipped  # `--config configs/paper.yaml` in any folder
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise SettingsError(f"configuration {path} {what}; the shipped ones are in {shipped_configs()}.")
    try:
        values = load_yaml(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"configuration {path} is no valid YAML: {error}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"configuration {path} holds a {type(values).__name__}; it must be a mapping of keys.")
    return values


def _unknown_key(key: str, location: str, known: set[str]) -> str:
    return f"{location}: unknown key {key!r}; {near_match(key, sorted(known))}"
