"""Errors of object storages: passing faults are retried and logged, others become one sentence.

Object storages answer 503 now and then, cut connections, and take long to answer. Each whole-file operation of this
package is therefore tried several times, with growing pauses. A missing bucket, missing credentials or a read-only
bucket stays as it is however often it is asked: that is told at once, with the URI and the fix.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from pipelines.redact import one_line
from pipelines.storage.location import Location

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRIES = 6
FIRST_PAUSE_S = 0.5
"""Doubled at each try: all tries take about a quarter of a minute, beside those of the storage's own client."""

_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|NoSuchBucket|bucket does not exist|Bucket '[^']*' not found|ContainerNotFound")
_NO_ACCESS = re.compile(
    r"ACCESS_DENIED|AccessDenied|Forbidden|INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH|"
    r"SignatureDoesNotMatch|INVALID_CLIENT_TOKEN_ID|EXPIRED_TOKEN|ExpiredToken|[Cc]redentials|HTTP response code 40[13]"
    r"|PermissionDenied|AuthenticationFailed|AuthorizationFailure|account name"
)
_LASTING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class StorageError(OSError):
    """A storage refuses or does not answer: one sentence with the URI and the fix."""


def with_retries(location: Location, action: Callable[[], T]) -> T:
    """Do something with a remote file, again where it fails in a way that may pass; local files get one try.

    Raises:
        FileNotFoundError: as the action raised it, like every other lasting error of a local disk.
        StorageError: the storage refuses, or fails at every try.
    """
    if location.is_local:
        return action()
    for attempt in range(1, TRIES + 1):
        try:
            return action()
        except (*_LASTING, StorageError):
            raise
        except Exception as error:
            if not _is_fault(error) or getattr(error, "errno", None) in _NO_ROOM:
                raise
            sentence = refusal(location, error)
            if sentence:
                raise StorageError(sentence) from error
            if attempt == TRIES:
                raise StorageError(
                    f"{location} failed {TRIES} times, last with: {one_line(error, 300)}. Check the network and the "
                    "storage; the same command resumes."
                ) from error
            pause = FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.7, 1.3)
            logger.warning(
                "%s failed (try %d of %d), again in %.1f s: %s", location, attempt, TRIES, pause, one_line(error, 300)
            )
            time.sleep(pause)
    raise AssertionError("unreachable")


def _is_fault(error: Exception) -> bool:
    """Whether an error is of the disk or the network. Clients that fsspec uses have their own kinds for the latter:
    httpx (Hugging Face), aiohttp (web servers), Azure and paramiko (SFTP)."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"OSError", "TransportError", "ClientError", "AzureError", "SSHException"})


def refusal(location: Location, error: BaseException) -> str:
    """Why an error of a storage will not pass, with the fix; empty where it may pass."""
    text = str(error)
    if _NO_BUCKET.search(text):
        return no_bucket(location)
    if isinstance(error, PermissionError) or _NO_ACCESS.search(text):
        return (
            f"{location} refuses access ({one_line(error, 300)}): give every node credentials that may read and write "
            "there: the machine's instance profile or service account, or the storage's environment variables "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME)."
        )
    return ""


def no_bucket(location: Location) -> str:
    """The sentence for a bucket that is not there."""
    bucket = Location(location.root, "")
    return f"the bucket of {location} does not exist: check the name and the region of {bucket}, or create it."
