"""``stage.json`` of a checkpoint folder: what made the model."""

from __future__ import annotations

from typing import Any, TypedDict

STAGE_FILE = "stage.json"


class StageRecord(TypedDict, total=False):
    """Content of ``stage.json``. A stage, the pretraining of backbones and the start of an ablation write the keys that
    they know; a converted model may have none.

    Attributes:
        title: for people.
        recipe: name of the recipe.
        stage: number of the stage.
        steps: optimizer steps of the stage that the weights were trained for.
        seed: of the run.
        init_from: folder or URI of the checkpoint that it started from, without passwords.
        init_digest: short hash of that checkpoint's content, of an ablation's start.
        tracking_parent: the tracker's run that the stages of one training nest under.
        changes: fields of the configuration that an ablation changed, by dotted name.
        vision_steps: pretraining steps of the vision backbone.
        language_steps: the same of the language backbone.
        scores: of the pretrained backbones on held-out scenes.
    """

    title: str
    recipe: str
    stage: int
    steps: int
    seed: int
    init_from: str
    init_digest: str
    tracking_parent: str
    changes: dict[str, Any]
    vision_steps: int
    language_steps: int
    scores: dict[str, float]
