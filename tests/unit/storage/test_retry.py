"""Faults of a remote storage: those that pass are tried again with growing pauses, the others told at once."""

from __future__ import annotations

import errno

import httpx
import pytest

from pipelines.storage import Location, StorageError, retry
from pipelines.storage.retry import TRIES, refusal, with_retries

REMOTE = Location("s3://bucket", "folder/file")


@pytest.fixture
def pauses(monkeypatch):
    found = []
    monkeypatch.setattr(retry.time, "sleep", found.append)
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: 1.0)
    return found


def failing(times, error):
    """An action that fails so many times, and counts its calls."""
    calls = []

    def action():
        calls.append(len(calls) + 1)
        if len(calls) <= times:
            raise error
        return "done"

    return action, calls


def test_a_fault_that_passes_is_tried_again_after_doubled_pauses(pauses, caplog):
    action, calls = failing(4, OSError("connection reset"))
    assert with_retries(REMOTE, action) == "done"
    assert len(calls) == 5 and pauses == [0.5, 1.0, 2.0, 4.0]
    assert caplog.messages == [
        f"s3://bucket/folder/file failed (try {n} of 6), again in {pause} s: connection reset"
        for n, pause in enumerate(pauses, 1)
    ]


def test_faults_of_other_clients_are_tried_again_and_mistakes_are_not(pauses):
    action, calls = failing(2, httpx.ReadTimeout("too slow"))
    assert with_retries(REMOTE, action) == "done" and len(calls) == 3
    for error in (ValueError("a mistake"), httpx.InvalidURL("a mistake")):
        action, calls = failing(2, error)
        with pytest.raises(type(error), match="a mistake"):
            with_retries(REMOTE, action)
        assert len(calls) == 1


def test_a_fault_that_stays_is_told_after_the_last_try(pauses):
    action, calls = failing(99, OSError("connection\n reset by s3://me:secret@host " + "x" * 300))
    with pytest.raises(StorageError) as caught:
        with_retries(REMOTE, action)
    last = "connection reset by s3://***@host " + "x" * 300
    assert str(caught.value) == (
        f"s3://bucket/folder/file failed 6 times, last with: {last[:300]}. Check the network and the storage; the same "
        "command resumes."
    )
    assert len(calls) == TRIES == 6 and len(pauses) == 5


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("gone"),
        IsADirectoryError("a folder"),
        NotADirectoryError("a file"),
        FileExistsError("there"),
        StorageError("told already"),
        OSError(errno.ENOSPC, "no space left"),
        OSError(errno.EDQUOT, "quota"),
    ],
)
def test_lasting_errors_are_raised_as_they_are_at_the_first_try(pauses, error):
    action, calls = failing(9, error)
    with pytest.raises(type(error)) as caught:
        with_retries(REMOTE, action)
    assert caught.value is error and len(calls) == 1 and not pauses


def test_a_local_disk_gets_one_try(pauses):
    action, calls = failing(9, OSError("broken"))
    with pytest.raises(OSError, match="broken"):
        with_retries(Location("", "/data/file"), action)
    assert len(calls) == 1 and not pauses


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError("When reading: NoSuchBucket"), "the bucket of s3://bucket/folder/file does not exist: check the name"),
        (OSError("AWS Error ACCESS_DENIED during PutObject"), "s3://bucket/folder/file refuses access"),
        (OSError("HTTP response code 403"), "refuses access"),
        (PermissionError("no"), "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_a_refusal_names_the_fix_at_the_first_try(pauses, error, sentence):
    action, calls = failing(9, error)
    with pytest.raises(StorageError) as caught:
        with_retries(REMOTE, action)
    assert sentence in str(caught.value) == refusal(REMOTE, error) and len(calls) == 1


@pytest.mark.parametrize(
    "text",
    [
        "AWS Error ACCESS_DENIED during PutObject operation: Access Denied",
        "An error occurred (AccessDenied) when calling the PutObject operation",
        "Forbidden",
        "AWS Error INVALID_ACCESS_KEY_ID",
        "An error occurred (InvalidAccessKeyId)",
        "AWS Error SIGNATURE_DOES_NOT_MATCH",
        "An error occurred (SignatureDoesNotMatch)",
        "AWS Error INVALID_CLIENT_TOKEN_ID",
        "AWS Error EXPIRED_TOKEN",
        "An error occurred (ExpiredToken)",
        "Unable to locate credentials",
        "Your default Credentials were not found",
        "HTTP response code 401",
        "HTTP response code 403",
        "google::cloud::Status(PermissionDenied: no)",
        "AuthenticationFailed",
        "AuthorizationFailure",
        "Must provide either a connection_string or account name",
    ],
)
def test_every_storages_words_for_no_access_are_known(text):
    assert refusal(REMOTE, OSError(text)) == (
        f"s3://bucket/folder/file refuses access ({text}): give every node credentials that may read and write there: "
        "the machine's instance profile or service account, or the storage's environment variables (AWS_ACCESS_KEY_ID "
        "and AWS_SECRET_ACCESS_KEY; GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME)."
    )


@pytest.mark.parametrize(
    "text",
    [
        "AWS Error NO_SUCH_BUCKET during HeadBucket operation",
        "NoSuchBucket",
        "The specified bucket does not exist.",
        "Bucket 'data' not found",
        "ErrorCode: ContainerNotFound",
    ],
)
def test_every_storages_words_for_no_bucket_are_known(text):
    assert refusal(REMOTE, OSError(text)) == retry.no_bucket(REMOTE)
    assert refusal(REMOTE, PermissionError(text)) == retry.no_bucket(REMOTE)


def test_other_errors_are_no_refusal():
    assert refusal(REMOTE, OSError("timeout")) == "" == refusal(REMOTE, OSError("HTTP response code 503"))


def test_a_missing_bucket_is_named_without_the_path():
    sentence = retry.no_bucket(Location("s3://bucket?region=x", "folder/file"))
    assert sentence == (
        "the bucket of s3://bucket/folder/file?region=x does not exist: check the name and the region of "
        "s3://bucket?region=x, or create it."
    )


def test_pauses_vary_so_that_many_nodes_do_not_ask_at_once(monkeypatch):
    pauses, bounds = [], []
    monkeypatch.setattr(retry.time, "sleep", pauses.append)
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: bounds.append((low, high)) or low)
    action, _ = failing(2, OSError("reset"))
    with_retries(REMOTE, action)
    assert bounds == [(0.7, 1.3)] * 2 and pauses == [0.35, 0.7]
