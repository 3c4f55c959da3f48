"""Before the service starts: warnings and refusals that need no cluster."""

from __future__ import annotations

import logging
import shutil
import socket
from contextlib import closing
from unittest.mock import MagicMock

import pytest

from pipelines.serving.run import ENVIRONMENT, _claim_port, _reason, _url, check_settings, serving
from pipelines.settings import ServeSettings, SettingsError
from tests.serving_model import save_checkpoint
from tinygptv.checkpoint.folders import write_manifest


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return str(save_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def test_serves_own_processes_are_guarded_and_given_the_time_that_they_need():
    assert ENVIRONMENT == {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipelines.serving.connections:guard_connections",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    }


@pytest.mark.security
@pytest.mark.parametrize(
    ("host", "keys", "warns"),
    [
        ("127.0.0.1", [], False),
        ("localhost", [], False),
        ("::1", [], False),
        ("0.0.0.0", [], True),
        ("10.0.0.5", [], True),
        ("::", [], True),
        ("0.0.0.0", ["a-key"], False),
    ],
)
def test_listening_for_others_without_keys_gives_a_warning(artifact, caplog, monkeypatch, host, keys, warns):
    caplog.set_level(logging.WARNING)
    check_settings(ServeSettings(artifact=artifact, host=host, api_keys=keys))
    assert (f"host={host} is open to other machines and there are no API keys: set TIN" in caplog.text) == warns
    assert warns or not caplog.records
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


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        (None, "http://127.0.0.1:8000"),
        ("node.example", "http://node.example:8000"),
    ],
)
def test_the_address_can_be_opened(host, url):
    assert _url(host, 8000) == url


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "failed\n  ValueError: first\nRuntimeError: the model is damaged\nsee the logs\n",
            "RuntimeError: the model is damaged",
        ),
        ("ValueError: why\nsee: the page of Errors\n", "ValueError: why"),
        ("one\n two \n", "two"),
        ("", "RuntimeError"),
    ],
)
def test_the_reason_is_the_last_line_that_names_an_error(text, reason):
    assert _reason(RuntimeError(text)) == reason


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_an_address_of_either_kind_is_tried_as_a_server_would(monkeypatch, host, family):
    probe = MagicMock()
    probe.getsockname.return_value = (host, "4321")
    monkeypatch.setattr(socket, "socket", lambda *kind: probe if kind == (family, socket.SOCK_STREAM) else None)
    assert _claim_port(host, 0) == 4321
    probe.bind.assert_called_once_with((host, 0))
    probe.close.assert_called_once_with()


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1 port {port}: .*; choose another port="):
            _claim_port("127.0.0.1", port)
    assert _claim_port("127.0.0.1", 0) > 0


@pytest.mark.parametrize(
    ("host", "fix"), [("127.0.0.1", "port"), ("192.0.2.1", "host"), ("no-such-host.invalid", "host")]
)
def test_an_address_that_cannot_be_listened_on_is_told_before_ray_starts(artifact, monkeypatch, host, fix):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("pipelines.serving.run.start_ray", lambda _: pytest.fail("Ray was started"))
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        message = rf"cannot listen on {host} port {port}: .*; choose another {fix}=\."
        with (
            pytest.raises(SettingsError, match=message),
            serving(ServeSettings(artifact=artifact, host=host, port=port)),
        ):
            pass


def test_an_artifact_that_is_cut_off_is_told_before_ray_starts(artifact, tmp_path):
    shutil.copytree(artifact, tmp_path / "model")
    write_manifest(tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"short")
    with pytest.raises(SettingsError, match=r"model\.safetensors is cut off \(5 bytes; its manifest says"):
        check_settings(ServeSettings(artifact=str(tmp_path / "model")))
