"""Which folder is served: a path or URI, ``models:/name@alias`` of MLflow, ``hf://org/name``, or the shipped one."""

from __future__ import annotations

from pathlib import Path

from pipelines.node_cache import local_checkpoint
from pipelines.settings import AnswerSettings
from pipelines.storage import absolute, is_local
from tinygptv.checkpoint.folders import MANIFEST, verify_folder


def resolve_artifact(settings: AnswerSettings) -> Path:
    """The folder that ``settings.artifact`` names.

    Raises:
        ValueError: there is no such folder, registered model, or shipped model, or a file of the folder is cut off.
        StorageError: the storage refuses, or fails at every try.
    """
    name = settings.artifact
    if name.startswith("models:/"):
        # mlflow takes seconds to import, and few people serve from a registry.
        from pipelines.tracking.registry import download_registered_model

        return Path(download_registered_model(name, settings.tracking_uri))
    if not name:
        from tinygptv.miniature.backbones import shipped_model

        return shipped_model()
    if not is_local(name):
        return local_checkpoint(name)
    folder = Path(absolute(name))
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"artifact {name!r} is no checkpoint folder (config.json is missing): give artifact=DIR of a trained stage."
        )
    if (folder / MANIFEST).is_file():
        verify_folder(folder, hashes=False)  # hashes are checked where it is loaded
    return folder


def check_artifact(settings: AnswerSettings) -> str:
    """Look for the model before anything is started.

    Returns:
        ``settings.artifact`` as replicas on any machine need it: every node fetches what lies elsewhere by itself.

    Raises:
        ValueError: there is no such folder, registered model, or shipped model.
        StorageError: the storage refuses, or fails at every try.
    """
    name = settings.artifact
    if name and not name.startswith("models:/") and not is_local(name):
        local_checkpoint(name, weights=False)
        return name
    return str(resolve_artifact(settings))
