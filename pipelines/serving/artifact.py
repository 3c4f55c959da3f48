"""Which folder is served: a path, ``models:/name@alias`` of MLflow's registry, or the shipped model."""

from __future__ import annotations

from pathlib import Path

from pipelines.settings import AnswerSettings


def resolve_artifact(settings: AnswerSettings) -> Path:
    """The folder that ``settings.artifact`` names.

    Raises:
        ValueError: there is no such folder, registered model, or shipped model.
    """
    name = settings.artifact
    if name.startswith("models:/"):
        # mlflow takes seconds to import, and few people serve from a registry.
        from pipelines.tracking.registry import download_registered_model

        return Path(download_registered_model(name, settings.tracking_uri))
    if not name:
        from tinygptv.miniature.backbones import shipped_model

        return shipped_model()
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"artifact {name!r} is no checkpoint folder (config.json is missing): give artifact=DIR of a trained stage."
        )
    return folder.absolute()
