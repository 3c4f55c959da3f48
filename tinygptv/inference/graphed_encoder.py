"""Images -> embeddings on a GPU: one CUDA graph per number of images.

EVA ViT-g and the Q-Former launch some 1,000 kernels for an image; a graph launches them at once.

Notation: N images, R image side, Q query tokens, D language width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tinygptv.data.images import normalise_pixels
from tinygptv.inference.cuda_graphs import capture_graph
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

SIZES = (1, 2, 4, 8)
"""Numbers of images for which there is a graph."""


class GraphedEncoder:
    """Encodes images on a stream of its own; one thread uses it."""

    def __init__(self, model: TinyGPTVForConditionalGeneration, *, use_graphs: bool | None = None) -> None:
        """Prepare.

        Args:
            model: in evaluation mode.
            use_graphs: None: where the model is on a GPU.
        """
        self.model, self.device = model, model.device
        self.use_graphs = self.device.type == "cuda" if use_graphs is None else use_graphs
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._graphs: dict[int, Callable[[Tensor], Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.use_graphs else None

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> list[Tensor]:
        """Embeddings [Q, D] of each of up to ``SIZES[-1]`` images, ready when the call returns.

        Args:
            pixels: uint8 [N, 3, R, R] in the host's memory.
        """
        if self._stream is None:
            return list(self.model.encode_images(normalise_pixels(pixels)).clone())
        with torch.cuda.stream(self._stream):
            size = next(size for size in SIZES if size >= len(pixels))
            padded = torch.cat([pixels, pixels[:1].expand(size - len(pixels), -1, -1, -1)])
            pixel_values = normalise_pixels(padded.pin_memory().to(self.device, non_blocking=True))
            embeds = self._encoder(pixel_values)(pixel_values)[: len(pixels)].clone()
            embeds.record_stream(torch.cuda.default_stream(self.device))
        self._stream.synchronize()
        return list(embeds)

    def _encoder(self, pixel_values: Tensor) -> Callable[[Tensor], Tensor]:
        """The graph for so many images, captured at first use."""
        if not self.use_graphs:
            return self.model.encode_images
        if len(pixel_values) not in self._graphs:
            self._graphs[len(pixel_values)] = self._capture(pixel_values.clone())
        return self._graphs[len(pixel_values)]

    def _capture(self, held: Tensor) -> Callable[[Tensor], Tensor]:
        graph = capture_graph(lambda: self.model.encode_images(held), self._pool)

        def replay(pixel_values: Tensor) -> Tensor:
            held.copy_(pixel_values)
            return graph()

        return replay
