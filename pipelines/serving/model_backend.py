"""The model in this process behind the API; with Ray Serve, one replica."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import TYPE_CHECKING

from pipelines.serving.backend import (
    ChatJob,
    Failure,
    Item,
    ModelInfo,
    Piece,
    PromptRead,
    ReplicaStats,
    TokenProbability,
)
from pipelines.settings import ServeSettings

if TYPE_CHECKING:
    from tinygptv.inference.request import Delta, Request
    from tinygptv.inference.sampling import TokenLogprobs

SMALL_MODEL_PARAMETERS = 100_000_000
"""Below this, matrices are too small to be worth two threads, and threads that wait for each other cost more."""


class ModelBackend:
    """``Backend`` over an ``Assistant``."""

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
        self.created = int(time.time())

    async def describe(self) -> ModelInfo:
        """Metadata of the model."""
        scope = self.assistant.model.config.scope
        return ModelInfo(self.assistant.images.image_size, self.assistant.context_length, self.created, scope)

    async def stream(self, job: ChatJob) -> AsyncGenerator[Item, None]:
        """The answer as it grows."""
        request = await self._prepare(job)
        if isinstance(request, Failure):
            yield request
            return
        yield PromptRead(len(request.ids))
        async with aclosing(self._pieces(request, job.interval_s)) as pieces:
            async for piece in pieces:
                yield piece

    async def complete(self, job: ChatJob) -> list[Item]:
        """The whole answer in two items."""
        request = await self._prepare(job)
        if isinstance(request, Failure):
            return [request]
        return [PromptRead(len(request.ids)), *[piece async for piece in self._pieces(request, float("inf"))]]

    async def _pieces(self, request: Request, interval_s: float) -> AsyncGenerator[Item, None]:
        from tinygptv.inference.watch import ThreadFailure

        try:
            async with aclosing(self.assistant.stream(request, interval_s)) as deltas:
                async for delta in deltas:
                    yield self._item(delta)
        except ThreadFailure as error:
            yield Failure(str(error), "unavailable")

    async def stats(self) -> list[ReplicaStats]:
        """Counters of this replica."""
        images = self.assistant.images
        values = {
            **asdict(self.assistant.stats),
            "images_encoded": images.num_encoded,
            "images_reused": images.num_reused,
            "slots": self.assistant.max_batch_size,
        }
        return [ReplicaStats(str(os.getpid()), platform.node(), values)]

    async def check_health(self) -> None:
        """Raises where a thread that answers depend on has ended or is stuck; Serve then starts another replica."""
        self.assistant.check_health(self.stuck_after_s)

    async def _prepare(self, job: ChatJob) -> Request | Failure:
        from tinygptv.inference.request import PromptTooLong
        from tinygptv.inference.sampling import SamplingParams
        from tinygptv.inference.watch import ThreadFailure

        side = self.assistant.images.image_size
        if any(image.pixels.shape[1] != side for message in job.messages for image in message.images):
            return Failure(f"the model now takes images of {side} pixels; try again.", "stale_image")
        try:
            return await self.assistant.prepare(job.messages, SamplingParams(**job.sampling), job.salt)
        except PromptTooLong as error:
            return Failure(str(error), "too_long")
        except ValueError as error:
            return Failure(str(error), "request")
        except ThreadFailure as error:
            return Failure(str(error), "unavailable")

    def _item(self, delta: Delta) -> Item:
        if delta.finish_reason in ("error", "cancelled"):
            return Failure(delta.error or "the answer was cancelled.")
        return Piece(
            delta.text,
            len(delta.token_ids),
            delta.num_reused,
            tuple(self._with_alternatives(entry) for entry in delta.logprobs),
            "length" if delta.finish_reason == "length" else "stop" if delta.finish_reason else None,
        )

    def _with_alternatives(self, entry: TokenLogprobs) -> TokenProbability:
        alternatives = tuple(self._probability(token, logprob) for token, logprob in entry.alternatives)
        return self._probability(entry.token_id, entry.logprob, alternatives)

    def _probability(
        self, token_id: int, logprob: float, alternatives: tuple[TokenProbability, ...] | None = None
    ) -> TokenProbability:
        data = self.assistant.token_bytes[token_id]
        return TokenProbability(data.decode("utf-8", "replace"), logprob, data, alternatives)
