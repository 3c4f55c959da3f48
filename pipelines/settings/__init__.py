"""Settings of the jobs: where and how large. The science of the stages is in ``tinygptv.training.stages``.

A configuration file has common keys at the top and one section per job; command-line ``key=value`` pairs override both.
Unknown keys are errors. Every field is documented by its description, and ``--help`` prints them.

    recipe: mini
    seed: 0
    train:
      num_workers: 2
"""

from pipelines.settings.base import ROOT, SECTIONS, Settings
from pipelines.settings.errors import SettingsError
from pipelines.settings.fetch import FetchSettings, RecipeSettings, ReleasedSettings
from pipelines.settings.jobs import (
    AblateSettings,
    CacheFeaturesSettings,
    DemoSettings,
    MiniatureSettings,
    PlanMemorySettings,
    PrepareDataSettings,
    QuantizeSettings,
    ScoreSettings,
    TrainSettings,
)
from pipelines.settings.serve import AnswerSettings, BatchSettings, ServeSettings

__all__ = [
    "ROOT",
    "SECTIONS",
    "AblateSettings",
    "AnswerSettings",
    "BatchSettings",
    "CacheFeaturesSettings",
    "DemoSettings",
    "FetchSettings",
    "MiniatureSettings",
    "PlanMemorySettings",
    "PrepareDataSettings",
    "QuantizeSettings",
    "RecipeSettings",
    "ReleasedSettings",
    "ScoreSettings",
    "ServeSettings",
    "Settings",
    "SettingsError",
    "TrainSettings",
]
