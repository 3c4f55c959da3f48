"""Answer a file of requests, in the form of OpenAI's batch API, without a server; a killed run continues.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], ...}}
    {"custom_id": "b", "method": "POST", "url": "/v1/responses", "body": {"input": "...", ...}}

Each request passes the API as over HTTP: same bounds, tasks, boxes, errors. Images may be paths, relative to the file.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import httpx

from pipelines import storage
from pipelines.fingerprint import Fingerprint, checkpoint_digest, claim
from pipelines.json_files import write_json
from pipelines.progress import Bar, poll
from pipelines.serving.api import CHAT, RESPONSES, build_api
from pipelines.serving.artifact import resolve_artifact
from pipelines.serving.backend import Backend
from pipelines.serving.batch_images import with_files
from pipelines.serving.model_backend import ModelBackend
from pipelines.serving.protocol import ChatRequest
from pipelines.serving.responses import ResponsesRequest
from pipelines.settings import AnswerSettings, BatchSettings, ServeSettings, SettingsError
from tinygptv.json_object import JsonObject

logger = logging.getLogger(__name__)

ANSWERS, RESULT = "answers.jsonl", "result.json"
_PUBLISH_S = 30.0  # how often the answers so far go to an output in a bucket
TRIES = 5
CONVERSATIONS = {CHAT: ChatRequest.CONVERSATION, RESPONSES: ResponsesRequest.CONVERSATION}
"""Path of the API -> the field in which its requests have the conversation."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
CHANGES_ANSWERS = ("context_length", "default_task", "kv_cache_dtype", "max_tokens", "temperature")
"""Settings that the same request gets another answer with."""


@dataclass(frozen=True)
class BatchRequest:
    """A line of the input.

    Attributes:
        id: ``custom_id``, or ``line-<number>``.
        digest: SHA-256 of the line; an answer belongs to it.
        start: where the line begins in the file, in bytes.
        size: of the line, in bytes.
        error: why the line is no request; empty where it is one.
    """

    id: str
    digest: str
    start: int
    size: int
    error: str = ""


class BatchResponse(TypedDict):
    """Response to a request: ``body`` is that of the API."""

    status_code: int
    request_id: str
    body: JsonObject


class BatchAnswer(TypedDict):
    """A line of ``answers.jsonl``, in the shape of OpenAI's batch output.

    Attributes:
        id: of the answer.
        custom_id: of the request.
        request_sha256: of the request's line.
        response: of the API.
        error: None; what goes wrong stands in the response.
    """

    id: str
    custom_id: str
    request_sha256: str
    response: BatchResponse
    error: None


@dataclass(frozen=True)
class BatchResult:
    """Result of a run: requests of the file, how many of them have an answer, and where; also ``result.json``."""

    requests: int
    answered: int
    failed: int
    earlier: int
    seconds: float
    answers: str
    result: str


def run_batch(settings: BatchSettings, backend: Backend | None = None) -> BatchResult:
    """Answer what has no answer yet.

    Args:
        settings: the model, the input and the output folder.
        backend: a model that is loaded already.

    Returns:
        Counts; answers are in ``answers.jsonl`` of the output folder, in the order in which they were finished.

    Raises:
        SettingsError: the input is missing, or the output has answers of another model or other settings, or another
            run is writing there.
    """
    started = time.perf_counter()
    source = storage.Location.parse(settings.input)
    storage.check_access(source)
    if not settings.input or storage.num_bytes(source) < 0:
        raise SettingsError(f"input={settings.input!r} is no file: give a JSON Lines file of requests.")
    try:
        artifact = resolve_artifact(settings)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    work = storage.WorkFolder(settings.output_location("outputs/batch"))
    storage.check_access(work.location, writes=True)
    fingerprint = Fingerprint.of(
        "batch",
        artifact=checkpoint_digest(artifact),
        settings={name: getattr(settings, name) for name in CHANGES_ANSWERS},
    )
    answers = work.path / ANSWERS
    with storage.alone(work.uri()), _local_file(source) as path:
        claim(work.uri(), fingerprint, [ANSWERS, RESULT], overwrite=settings.overwrite, inputs=[source.uri])
        work.fetch(ANSWERS)
        requests = list(read_requests(path))
        _refuse_no_requests(settings.input, requests)
        done = finished_answers(answers)
        waiting = [request for request in requests if not _is_finished(request, done)]
        if waiting:
            with poll(lambda: work.publish(ANSWERS), every_s=_PUBLISH_S):
                files = RequestFiles(path, source.parent)
                asyncio.run(_answer_all(settings, backend or _load(settings, artifact), waiting, answers, files))
    statuses = finished_answers(answers)
    answered = sum(statuses.get((request.id, request.digest)) == 200 for request in requests)
    result = BatchResult(
        requests=len(requests),
        answered=answered,
        failed=len(requests) - answered,
        earlier=len(requests) - len(waiting),
        seconds=round(time.perf_counter() - started, 1),
        answers=work.uri(ANSWERS),
        result=work.uri(RESULT),
    )
    write_json(work.uri(RESULT), asdict(result))
    return result


def _refuse_no_requests(name: str, requests: Sequence[BatchRequest]) -> None:
    """Raise where a file holds nothing that could be answered: it is the wrong file."""
    if not requests:
        raise SettingsError(f"input={name} has no lines: give a JSON Lines file of requests.")
    if all(request.error for request in requests):
        raise SettingsError(
            f"input={name} holds no request among its {len(requests)} lines: {requests[0].error} Give a JSON Lines "
            "file of requests."
        )


@contextmanager
def _local_file(source: storage.Location) -> Iterator[Path]:
    """A file on this machine's disk: itself, or a copy while the block runs."""
    if source.is_local:
        yield Path(source.path)
        return
    with tempfile.TemporaryDirectory(prefix="requests-") as folder:
        storage.download(source, Path(folder, source.name))
        yield Path(folder, source.name)


@dataclass(frozen=True)
class RequestFiles:
    """Where requests are read from.

    Attributes:
        requests: the file on this machine's disk.
        images: folder that paths of images are relative to.
    """

    requests: Path
    images: storage.Location


def read_requests(path: Path) -> Iterator[BatchRequest]:
    """Requests of a file; a line that is none becomes one with an error.

    Raises:
        SettingsError: two lines have the same ``custom_id``.
    """
    seen: dict[str, int] = {}
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                identity, error = f"line-{number}", ""
                try:
                    data = _parse(line)
                    identity = str(data.get("custom_id", identity))
                    _request_of(data)
                except ValueError as caught:
                    error = f"line {number} {caught}."
                if (first := seen.setdefault(identity, number)) != number:
                    raise SettingsError(f"{path}: lines {first} and {number} have the same custom_id {identity!r}.")
                yield BatchRequest(identity, hashlib.sha256(line.strip()).hexdigest(), start, len(line), error)
            start += len(line)


def _parse(line: bytes) -> JsonObject:
    """The object of a line.

    Raises:
        ValueError: the line has none.
    """
    try:
        data = json.loads(line.decode("utf-8-sig"), parse_float=_finite, parse_constant=_finite)
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("is nested too deep") from None
    if not isinstance(data, dict):
        raise ValueError(f"is a {type(data).__name__}, not an object")
    if _SURROGATE.search(line):
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair, which is no character") from None
    return data


def _finite(text: str) -> float:
    """A number; those that Python reads and cannot send (NaN, 1e999) are a ValueError."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


def _request_of(data: JsonObject) -> tuple[str, JsonObject]:
    """The path of the API that a line is for, and the request's body, which may be wrapped.

    Raises:
        ValueError: it has none.
    """
    body = data.get("body", data)
    path = "/v1/" + str(data.get("url", CHAT)).removeprefix("/v1").strip("/")  # Azure's have no /v1
    if not isinstance(body, dict) or CONVERSATIONS.get(path) not in body:
        raise ValueError(f"is no request for {' or '.join(CONVERSATIONS)}")
    return path, {key: value for key, value in body.items() if key not in ("custom_id", "method", "url")}


def finished_answers(path: Path) -> dict[tuple[str, str], int]:
    """Status of the last answer by id and digest. Lines that are no answers, cut off or damaged, leave the file."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    statuses, whole = {}, []
    for line in lines:
        with suppress(ValueError, LookupError, TypeError):
            row = json.loads(line if line.endswith(b"\n") else b"")
            statuses[row["custom_id"], row["request_sha256"]] = int(row["response"]["status_code"])
            whole.append(line)
    if num_damaged := len(lines) - len(whole):
        logger.warning("%s: %d damaged lines are removed; their requests are asked again.", path, num_damaged)
        storage.write_atomically(str(path), b"".join(whole))
    return statuses


def _is_finished(request: BatchRequest, statuses: Mapping[tuple[str, str], int]) -> bool:
    """Whether a request has its answer. A refusal is none: a file may be there by now, or a bound be wider; only a line
    that is no request stays refused."""
    status = statuses.get((request.id, request.digest))
    return status == 200 or (status is not None and bool(request.error))


def _load(settings: AnswerSettings, artifact: Path) -> ModelBackend:
    return ModelBackend(_serve_settings(settings, artifact=str(artifact)))


def _serve_settings(settings: AnswerSettings, **changes: Any) -> ServeSettings:
    """The API's settings: one client that may have as many requests in flight as are useful."""
    shared = {name: getattr(settings, name) for name in AnswerSettings.model_fields}
    return ServeSettings(**{**shared, "max_queue": settings.max_batch_size, **changes})


async def _answer_all(
    settings: BatchSettings, backend: Backend, requests: list[BatchRequest], answers: Path, files: RequestFiles
) -> None:
    app = build_api(_serve_settings(settings), backend, digests=())
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    waiting, num_done, num_failed = iter(requests), 0, 0
    with storage.disk_full_as_error(answers), answers.open("a") as file, Bar("answering", quiet=settings.quiet) as bar:
        async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client:

            async def work() -> None:
                nonlocal num_done, num_failed
                for request in waiting:
                    row = await _answer(client, request, settings.model_name, files)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                    num_done += 1
                    num_failed += row["response"]["status_code"] != 200
                    bar.update(num_done, len(requests), f"{num_failed} failed" if num_failed else "")

            # The first error is the run's, whose end cancels the others; a group of tasks would wrap it.
            await asyncio.gather(*(work() for _ in range(min(2 * settings.max_batch_size, len(requests)))))


async def _answer(client: httpx.AsyncClient, request: BatchRequest, model: str, files: RequestFiles) -> BatchAnswer:
    status, content = 400, _error_body(request.error)
    if not request.error:
        try:
            with files.requests.open("rb") as file:
                file.seek(request.start)
                path, body = _request_of(_parse(file.read(request.size)))
            body = {**body, CONVERSATIONS[path]: with_files(body[CONVERSATIONS[path]], files.images)}
            status, content = await _post(client, path, {"model": model, **body, "stream": False})
        except RecursionError:
            content = _error_body("the request is nested too deep.")
        except OSError as error:
            named = f"{error.filename} cannot be read: {error.strerror}."  # errors of a storage are sentences
            content = _error_body(named if error.filename else f"an image cannot be read: {error}")
    return {
        "id": f"batch_req_{request.digest[:24]}",
        "custom_id": request.id,
        "request_sha256": request.digest,
        "response": {"status_code": status, "request_id": request.digest[:24], "body": content},
        "error": None,
    }


async def _post(client: httpx.AsyncClient, path: str, body: JsonObject) -> tuple[int, JsonObject]:
    for attempt in range(1, TRIES + 1):
        response = await client.post(path, json=body)
        if response.status_code not in (429, 503) or attempt == TRIES:
            break
        await asyncio.sleep(float(response.headers.get("retry-after", 1)))
    return response.status_code, response.json()


def _error_body(message: str) -> JsonObject:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_request"}}
