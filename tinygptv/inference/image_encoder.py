"""Images -> embeddings, each once: a worker thread encodes them in small batches and keeps the last ones.

Apart from the engine's thread, so that an image of seconds (EVA ViT-g on a CPU) never stops running answers.

Notation: Q query tokens, D language width, R image side.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from tinygptv.data.conversation import ChatImage
from tinygptv.data.images import normalise_pixels
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration


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
        self.capacity, self.batch_size = capacity, batch_size
        self.num_encoded = self.num_reused = 0
        self._kept: OrderedDict[int, Future[Tensor]] = OrderedDict()
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[ChatImage, Future[Tensor]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="image-encoder", daemon=True)
        self._thread.start()

    @property
    def image_size(self) -> int:
        """Side R that images must have, in pixels."""
        return self.model.config.vision_config.image_size

    def encode(self, image: ChatImage) -> Future[Tensor]:
        """Embeddings [Q, D] of an image, now or later.

        Raises:
            ValueError: the image was resized for another model.
        """
        side = self.image_size
        if image.pixels.shape != (3, side, side):
            raise ValueError(f"an image of shape {image.pixels.shape} was sent to a model of [3, {side}, {side}].")
        with self._lock:
            future = self._kept.get(image.number)
            if future is not None and not (future.done() and future.exception()):
                self._kept.move_to_end(image.number)
                self.num_reused += 1
                return future
            future = Future()
            self._kept[image.number] = future
            if len(self._kept) > self.capacity:
                self._kept.popitem(last=False)
        self._queue.put((image, future))
        return future

    def close(self) -> None:
        """Stop the worker after what is queued."""
        self._queue.put(None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            jobs = [job]
            while len(jobs) < self.batch_size and not self._queue.empty():
                following = self._queue.get()
                if following is None:
                    self._queue.put(None)
                    break
                jobs.append(following)
            try:
                embeds = self._forward([image for image, _ in jobs])
            except Exception as error:  # whoever waits for these images is told; the worker goes on
                for _, future in jobs:
                    future.set_exception(error)
                continue
            self.num_encoded += len(jobs)
            for (_, future), image_embeds_QD in zip(jobs, embeds, strict=True):
                future.set_result(image_embeds_QD)

    @torch.inference_mode()
    def _forward(self, images: list[ChatImage]) -> list[Tensor]:
        pixel_values = normalise_pixels(np.stack([image.pixels for image in images]))
        embeds = self.model.encode_images(torch.from_numpy(pixel_values).to(self.model.device))
        return list(embeds.clone())
