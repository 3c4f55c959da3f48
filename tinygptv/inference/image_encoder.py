"""Images -> embeddings, each once: a worker thread encodes them in small batches and keeps the last ones.

Apart from the engine's thread, so that an image of seconds (EVA ViT-g on a CPU) never stops running answers.

Notation: Q query tokens, D language width, R image side.
"""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tinygptv.data.conversation import ChatImage
from tinygptv.inference.graphed_encoder import GraphedEncoder
from tinygptv.inference.watch import WatchedThread
from tinygptv.lru import LRU
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

logger = logging.getLogger(__name__)

CacheKey = tuple[int, int]
"""Salt and number of an image."""


@dataclass(eq=False)
class _Entry:
    """An image that is queued, being encoded, or encoded.

    Attributes:
        waiters: one future per caller. Each caller may cancel its own; none can cancel the work of another.
        embeds: [Q, D] once it is encoded.
    """

    key: CacheKey
    image: ChatImage
    waiters: list[Future[Tensor]] = field(default_factory=list)
    embeds: Tensor | None = None


class ImageEncoder:
    """Encodes images in the background; equal images share one result."""

    def __init__(self, model: TinyGPTVForConditionalGeneration, capacity: int = 256, batch_size: int = 8) -> None:
        """Start the worker.

        Args:
            model: in evaluation mode.
            capacity: images whose embeddings are kept; the least recently used leave first.
            batch_size: most images of one forward.
        """
        self.model = model
        self.batch_size = batch_size
        self._encoder = GraphedEncoder(model)
        self.num_encoded = self.num_reused = 0
        self._entries: LRU[CacheKey, _Entry] = LRU(capacity)
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self.thread = WatchedThread(self._run, "image-encoder")
        self.thread.start()

    @property
    def image_size(self) -> int:
        """Side R that images must have, in pixels."""
        return self.model.config.vision_config.image_size

    def encode(self, image: ChatImage, salt: int = 0) -> Future[Tensor]:
        """Embeddings [Q, D] of an image, now or later.

        Args:
            image: resized for this model.
            salt: callers with different salts share no result, so that none can time whether another sent an image.

        Returns:
            A future of the caller's own; cancelling it leaves other callers of the same image alone.

        Raises:
            ValueError: the image was resized for another model.
            ThreadFailure: the worker has ended.
        """
        self.thread.check_alive()
        side = self.image_size
        if image.pixels.shape != (3, side, side):
            raise ValueError(f"an image of shape {image.pixels.shape} was sent to a model of [3, {side}, {side}].")
        key, future = (salt, image.number), Future[Tensor]()
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = _Entry(key, image)
                self._entries.put(key, entry)
                self._queue.put(entry)
            else:
                self.num_reused += 1
            if entry.embeds is None:
                entry.waiters.append(future)
                return future
        future.set_result(entry.embeds)
        return future

    def close(self) -> None:
        """Stop the worker after what is queued."""
        self._queue.put(None)
        self.thread.join(timeout=30)

    # ------------------------------------------------------------------ worker thread

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            entries = [first]
            while len(entries) < self.batch_size and not self._queue.empty():
                following = self._queue.get()
                if following is None:
                    self._queue.put(None)
                    break
                entries.append(following)
            wanted = [entry for entry in entries if self._is_wanted(entry)]
            if wanted:
                with self.thread.working():
                    self._encode(wanted)

    def _is_wanted(self, entry: _Entry) -> bool:
        """Whether a caller still waits; otherwise the entry is dropped and a later caller queues the image again."""
        with self._lock:
            if not all(waiter.cancelled() for waiter in entry.waiters):
                return True
            self._forget(entry)
            return False

    def _encode(self, entries: list[_Entry]) -> None:
        try:
            embeds = self._forward([entry.image for entry in entries])
        except Exception as error:  # reported to those who wait for these images; the next batch may succeed
            logger.exception("%d images could not be encoded", len(entries))
            for entry in entries:
                with self._lock:
                    self._forget(entry)
                for waiter in entry.waiters:
                    if waiter.set_running_or_notify_cancel():
                        waiter.set_exception(error)
            return
        self.num_encoded += len(entries)
        for entry, image_embeds_QD in zip(entries, embeds, strict=True):
            with self._lock:
                entry.embeds = image_embeds_QD
                waiters, entry.waiters = entry.waiters, []
            for waiter in waiters:
                if waiter.set_running_or_notify_cancel():  # False: its caller has left
                    waiter.set_result(image_embeds_QD)

    def _forget(self, entry: _Entry) -> None:
        if self._entries.get(entry.key) is entry:
            self._entries.pop(entry.key)

    def _forward(self, images: list[ChatImage]) -> list[Tensor]:
        return self._encoder.encode(torch.from_numpy(np.stack([image.pixels for image in images])))
