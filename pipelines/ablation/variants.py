"""Variants of an ablation: what is switched off or changed, and the checkpoint that a variant starts from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError

from pipelines.fingerprint import checkpoint_digest
from pipelines.node_cache import local_checkpoint
from pipelines.settings import SettingsError, TrainSettings
from pipelines.settings.near_match import near_match
from pipelines.settings.plain_yaml import load_yaml
from pipelines.training.job import apply_stage_settings, refuse_trained_parts
from tinygptv.checkpoint.checkpoint import read_stage, save_checkpoint
from tinygptv.checkpoint.folders import CheckpointError, verify_folder
from tinygptv.checkpoint.stage_record import StageRecord
from tinygptv.config import TinyGPTVConfig
from tinygptv.training.stages import Stage


@dataclass(frozen=True)
class Variant:
    """One row of an ablation.

    Attributes:
        name: as in ``variants=[NAME]``; also a folder name.
        title: name in the report.
        config: dotted fields of the model's configuration to change; weights that it then does not use are dropped.
        stage: fields of every stage to change; those of ``schedule``, ``limits`` and ``sources`` may be some of them.
        train: keys of the train section to change.
        without: trainable parts that no stage trains.
        instead: trainable parts instead of others.
    """

    name: str
    title: str
    config: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    instead: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def stage_changes(self, stage: Stage) -> dict[str, Any]:
        """``stage.*`` settings of this variant in one stage."""
        parts: list[str] = []
        for part in stage.trainable:
            if part not in self.without:
                parts += self.instead.get(part, (part,))
        changed = {"trainable": parts} if tuple(parts) != stage.trainable else {}
        return {**changed, **self.stage}


_OTHER_NORMS = ("qk_norms", "attention_norms", "final_norm")

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("full", "full"),
        Variant("no_lora", "without LoRA", stage={"lora_rank": 0}, without=("lora",)),
        Variant(
            "frozen_input_norm",
            "input norm kept, not trained",
            instead={"language_norms": _OTHER_NORMS},
        ),
        Variant("no_input_norm", "without input norm", config={"text_config.input_layernorm": False}),
        Variant("no_rms_norm", "without RMSNorm", config={"text_config.attention_rmsnorm": False}),
        Variant("no_qk_norm", "without QK norm", config={"text_config.qk_layernorm": False}),
    )
}
"""The rows of the paper's Table 3; its missing input norm is read in both ways (docs/ablations.md)."""


_NEXT_CHANGE = re.compile(r",(?=[^,=\[\]{}]*=)")
"""The comma before ``key=``; others belong to a value."""


def find_variant(text: str) -> Variant:
    """A variant by name, or from changes: ``key=value[,key=value]``, keys ``config.*``, ``stage.*`` or ``train.*``.

    Raises:
        SettingsError: there is no such variant, or a change cannot be read.
    """
    if text in VARIANTS:
        return VARIANTS[text]
    if "=" not in text:
        raise SettingsError(
            f"variant {text!r} is unknown; {near_match(text, VARIANTS)} A change is written like stage.lora_rank=4."
        )
    changes: dict[str, dict[str, Any]] = {"config": {}, "stage": {}, "train": {}}
    for change in _NEXT_CHANGE.split(text):
        key, _, value = change.partition("=")
        group, _, name = key.strip().partition(".")
        if group not in changes or not name:
            raise SettingsError(f"variant {text!r}: {key.strip()!r} must begin with config., stage. or train.")
        parents: list[str] = []
        if group == "stage":  # the configuration is set by dotted keys, and the train section has none
            *parents, name = name.split(".")
        try:
            found = load_yaml(value)
        except yaml.YAMLError as error:
            raise SettingsError(f"variant {text!r}: {change.strip()!r} is no YAML: {_one_line(error)}.") from error
        for parent in reversed(parents):
            name, found = parent, {name: found}
        changes[group] = with_changes(changes[group], {name: found})
    safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in text)
    return Variant(safe, text, config=changes["config"], stage=changes["stage"], train=changes["train"])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def with_changes(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings with some of their values replaced."""
    both = [key for key in changes if isinstance(changes[key], dict) and isinstance(values.get(key), dict)]
    return {**values, **changes, **{key: with_changes(values[key], changes[key]) for key in both}}


def write_start(variant: Variant, init_from: str, folder: Path) -> Path:
    """The checkpoint that a variant starts from: the given one with the variant's changes of the configuration.

    Args:
        variant: what to change.
        init_from: checkpoint folder.
        folder: output folder; a start that was made from the same checkpoint and changes is kept.

    Returns:
        ``init_from`` itself where nothing changes.

    Raises:
        SettingsError: the configuration has no such field.
    """
    given = local_checkpoint(init_from)
    if not variant.config:
        return given
    metadata: StageRecord = {
        "title": f"start of the ablation {variant.title}",
        "init_from": init_from,
        "init_digest": checkpoint_digest(given),
        "changes": variant.config,
    }
    try:
        verify_folder(folder, hashes=False)
        if read_stage(folder) == json.loads(json.dumps(metadata)):
            return folder
    except CheckpointError:
        pass  # missing or incomplete: it is written below
    from tinygptv.data.processing import TinyGPTVProcessor
    from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

    config = change_config(TinyGPTVConfig.from_pretrained(given), variant.config)
    model = TinyGPTVForConditionalGeneration.from_pretrained(given, config=config, local_files_only=True)
    return save_checkpoint(folder, model, TinyGPTVProcessor.from_pretrained(given, local_files_only=True), metadata)


def change_config(config: TinyGPTVConfig, changes: dict[str, Any]) -> TinyGPTVConfig:
    """Set dotted fields of a configuration, in place.

    Raises:
        SettingsError: there is no such field, or it does not take the value.
    """
    for key, value in changes.items():
        *parents, last = key.split(".")
        section: Any = config
        for name in parents:
            section = getattr(section, name, None)
        if section is None or not hasattr(section, last):
            raise SettingsError(f"config.{key} is no field of the model's configuration.")
        try:
            setattr(section, last, value)
        except StrictDataclassError as error:
            raise SettingsError(f"config.{key}={value!r} is not usable: {_one_line(error)}.") from error
    return config


def with_precision(variant: Variant, precision: str) -> Variant:
    """The variant at another precision, under a name of its own.

    Raises:
        SettingsError: it changes the precision itself.
    """
    if "precision" in variant.train:
        raise SettingsError(
            f"variant {variant.title!r}: a precision has a table of its own; give it in precisions=[..]."
        )
    name = variant.name if precision == "fp32" else f"{variant.name}-{precision}"
    return replace(variant, name=name, train={**variant.train, "precision": precision})


def refuse_unusable(variant: Variant, stages: Sequence[Stage], train: Mapping[str, object]) -> None:
    """Raise where a change of a variant cannot be made, before anything is trained.

    Args:
        variant: with its precision.
        stages: with the changes that all variants share.
        train: keys of the train section that all variants share.

    Raises:
        SettingsError: the configuration, a stage or the train section has no such field, or not this value; or it
            changes or trains the encoder of cached features.
    """
    change_config(TinyGPTVConfig(), variant.config)
    settings = TrainSettings.parse({**train, **variant.train}, f"variant {variant.title!r} of the ablation")
    for stage in stages:
        refuse_trained_parts(settings, apply_stage_settings(stage, variant.stage_changes(stage)))
    for key in variant.config:
        if settings.features == "cached" and key.startswith(("vision_config.", "qformer_config.")):
            raise SettingsError(
                f"variant {variant.title!r}: cached features are those of the unchanged encoder, so config.{key} would "
                "change nothing that is trained: give features=inline."
            )
