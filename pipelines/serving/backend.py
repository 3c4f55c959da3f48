"""The model behind the API: what an ingress asks of it, and the one that answers in its own process.

Only plain values cross this border (dicts, ``ChatMessage``), because with Ray Serve it lies between two processes, and
the ingress does not load torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.settings import ServeSettings
from tinygptv.data.conversation import ChatMessage, image_number

if TYPE_CHECKING:
    from tinygptv.inference.engine import Delta, Request
    from tinygptv.inference.sampling import TokenLogprobs

SMALL_MODEL_PARAMETERS = 100_000_000
"""Below this, matrices are too small to be worth two threads, and threads that wait for each other cost more."""


@dataclass(frozen=True)
class ChatJob:
    """One request for the model.

    Attributes:
        messages: user and assistant in turn.
        sampling: fields of ``SamplingParams``.
        interval_s: shortest time between two deltas of a stream, in seconds.
    """

    messages: tuple[ChatMessage, ...]
    sampling: dict[str, Any]
    interval_s: float = 0.0

    @property
    def conversation(self) -> str:
        """What the turns of one conversation have in common: its first picture, or its first words."""
        numbers = [image.number for message in self.messages for image in message.images]
        return str(numbers[0] if numbers else image_number(self.messages[0].text.encode()))


@dataclass(frozen=True)
class ModelInfo:
    """What an ingress needs to know of the model."""

    image_size: int
    context_length: int
    created: int


class Backend(Protocol):
    """A model, near or far.

    Items of an answer are dicts: first ``{"prompt_tokens"}``, then ``{"text", "num_tokens", "cached_tokens",
    "logprobs", "finish_reason"}``; or, at any point and last, ``{"error", "status"}``, with ``"stale_info"`` where the
    pictures were resized for another model than the one that is there now.
    """

    async def describe(self) -> ModelInfo:
        """What the model is."""

    def stream(self, job: ChatJob) -> AsyncIterator[dict[str, Any]]:
        """The answer as it grows; leaving the iterator early frees the model's slot."""

    async def complete(self, job: ChatJob) -> list[dict[str, Any]]:
        """The whole answer: the same items, text in one."""

    async def stats(self) -> list[dict[str, Any]]:
        """Counters of each replica."""


class ModelBackend:
    """The model in this process; with Ray Serve, one replica."""

    def __init__(self, settings: ServeSettings) -> None:
        """Load the artifact and start the engine.

        Raises:
            ValueError: the artifact is missing or does not load.
        """
        import torch

        from pipelines.serving.artifact import resolve_artifact
        from tinygptv.inference.assistant import Assistant
        from tinygptv.inference.loading import load_for_inference

        device = "cuda" if settings.num_gpus and torch.cuda.is_available() else "cpu"
        model, processor = load_for_inference(resolve_artifact(settings), device)
        small = sum(p.numel() for p in model.parameters()) < SMALL_MODEL_PARAMETERS
        torch.set_num_threads(settings.threads or (1 if small else os.cpu_count() or 1))
        self.assistant = Assistant(
            model,
            processor,
            max_batch_size=settings.max_batch_size,
            context_length=settings.context_length,
            prefill_tokens=settings.prefill_tokens,
            kv_cache_dtype=settings.kv_cache_dtype,
            kept_images=settings.kept_images,
        )
        self.stuck_after_s = settings.stuck_after_s
        self.token_bytes = self.assistant.engine.token_bytes
        self.name = f"{os.getpid()}"
        self.created = int(time.time())

    async def describe(self) -> ModelInfo:
        """What the model is; fails where the model cannot answer."""
        await self.check_health()
        return ModelInfo(self.assistant.images.image_size, self.assistant.engine.context_length, self.created)

    async def stream(self, job: ChatJob) -> AsyncIterator[dict[str, Any]]:
        """The answer as it grows."""
        request = await self._prepare(job)
        if isinstance(request, dict):
            yield request
            return
        yield {"prompt_tokens": len(request.ids)}
        answer = self.assistant.stream(request, job.interval_s)
        try:
            async for delta in answer:
                yield self._item(delta)
        finally:
            await answer.aclose()

    async def complete(self, job: ChatJob) -> list[dict[str, Any]]:
        """The whole answer in two items."""
        request = await self._prepare(job)
        if isinstance(request, dict):
            return [request]
        items = [self._item(delta) async for delta in self.assistant.stream(request, float("inf"))]
        return [{"prompt_tokens": len(request.ids)}, *items]

    async def stats(self) -> list[dict[str, Any]]:
        """Counters of this replica."""
        images = self.assistant.images
        return [
            {
                "replica": self.name,
                **asdict(self.assistant.loop.stats),
                "images_encoded": images.num_encoded,
                "images_reused": images.num_reused,
                "slots": self.assistant.engine.decoder.num_slots,
            }
        ]

    async def check_health(self) -> None:
        """Raises where a thread that answers depend on has ended or is stuck; Serve then starts another replica."""
        self.assistant.check_health(self.stuck_after_s)

    async def _prepare(self, job: ChatJob) -> Request | dict[str, Any]:
        from tinygptv.inference.sampling import SamplingParams

        side = self.assistant.images.image_size
        if any(image.pixels.shape[1] != side for message in job.messages for image in message.images):
            return {"error": f"the model now takes images of {side} pixels.", "status": 503, "stale_info": True}
        try:
            params = SamplingParams(**job.sampling)
            request = await self.assistant.prepare(job.messages, params)
        except ValueError as error:
            return {"error": str(error), "status": 400}
        return request

    def _item(self, delta: Delta) -> dict[str, Any]:
        if delta.finish_reason in ("error", "cancelled"):
            return {"error": delta.error or "the answer was cancelled.", "status": 500}
        return {
            "text": delta.text,
            "num_tokens": len(delta.token_ids),
            "cached_tokens": delta.num_reused,
            "logprobs": [self._logprobs(entry) for entry in delta.logprobs],
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, entry: TokenLogprobs) -> dict[str, Any]:
        alternatives = [self._token(token, logprob) for token, logprob in entry.alternatives]
        return {**self._token(entry.token_id, entry.logprob), "top_logprobs": alternatives}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self.token_bytes[token_id]
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}
