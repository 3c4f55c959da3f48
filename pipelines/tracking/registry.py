"""MLflow's model registry: artifacts by name and alias."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tracking.base import default_uri
from pipelines.tracking.client import open_client

if TYPE_CHECKING:
    from pipelines.settings import Settings


def register_model(
    settings: Settings, run_id: str, folder: Path, name: str, alias: str, tags: Mapping[str, str] | None = None
) -> int:
    """Put an artifact folder into the model registry.

    Args:
        settings: ``tracking_uri``, as for ``open_tracker``.
        run_id: the run that made it; the folder is uploaded there.
        folder: the artifact.
        name: registered model; made where it is missing.
        alias: moved to the new version.
        tags: of the new version.

    Returns:
        The version's number; ``models:/<name>@<alias>`` names it from now on.
    """
    from mlflow.exceptions import MlflowException

    client = open_client(settings.tracking_uri or default_uri(Path.cwd()))
    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name)
    client.log_artifacts(run_id, str(folder), "model")
    source = f"{client.get_run(run_id).info.artifact_uri}/model"
    version = client.create_model_version(name, source, run_id=run_id, tags=dict(tags or {})).version
    client.set_registered_model_alias(name, alias, version)
    return int(version)


def download_registered_model(uri: str, tracking_uri: str = "") -> Path:
    """The folder of a registered artifact; where the registry keeps it on this machine, the very folder.

    Args:
        uri: ``models:/<name>@<alias>`` or ``models:/<name>/<version>``.
        tracking_uri: MLflow's; empty is SQLite in the working directory.

    Raises:
        ValueError: the registry cannot be reached, or has no such version.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    server = tracking_uri or default_uri(Path.cwd())
    client = open_client(server)
    name, at, alias = uri.removeprefix("models:/").partition("@")
    try:
        if at:
            version = client.get_model_version_by_alias(name, alias).version
        else:
            name, _, version = name.rpartition("/")
        source = client.get_model_version_download_uri(name, str(version))
        return Path(download_artifacts(artifact_uri=source, tracking_uri=server))
    except MlflowException as error:
        raise ValueError(f"MLflow at {server} has no {uri}: {error.message}") from error
