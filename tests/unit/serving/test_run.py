"""Before the service starts: warnings and refusals that need no cluster."""

from __future__ import annotations

import logging

import pytest

from pipelines.serving.run import check_settings
from pipelines.settings import ServeSettings, SettingsError
from tests.serving_model import save_checkpoint


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return str(save_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.mark.security
@pytest.mark.parametrize(
    ("host", "keys", "warns"),
    [
        ("127.0.0.1", [], False),
        ("localhost", [], False),
        ("0.0.0.0", [], True),
        ("10.0.0.5", [], True),
        ("::", [], True),
        ("0.0.0.0", ["a-key"], False),
    ],
)
def test_listening_for_others_without_keys_gives_a_warning(artifact, caplog, monkeypatch, host, keys, warns):
    caplog.set_level(logging.WARNING)
    check_settings(ServeSettings(artifact=artifact, host=host, api_keys=keys))
    assert ("no API keys" in caplog.text) == warns
    assert "a-key" not in caplog.text
    monkeypatch.setenv("TINYGPTV_API_KEYS", "from-the-environment")
    caplog.clear()
    check_settings(ServeSettings(artifact=artifact, host=host))
    assert not caplog.records


@pytest.mark.security
def test_a_missing_key_file_stops_the_start(artifact, tmp_path):
    with pytest.raises(SettingsError, match="api_keys_file"):
        check_settings(ServeSettings(artifact=artifact, api_keys_file=str(tmp_path / "keys")))


def test_a_missing_artifact_is_named():
    with pytest.raises(SettingsError, match="no checkpoint folder"):
        check_settings(ServeSettings(artifact="/nowhere"))
