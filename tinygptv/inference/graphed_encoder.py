"""Images -> embeddings on a GPU: one CUDA graph per number of images, pixels normalised on the device.

EVA ViT-g and the Q-Former launch some 1,000 kernels for an image; a graph launches them at once.

Notation: N images, R image side, Q query tokens, D language width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tinygptv.data.images import IMAGE_MEAN, IMAGE_STD
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
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
        self._mean, self._std = mean, std

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> list[Tensor]:
        """Embeddings [Q, D] of each of up to ``SIZES[-1]`` images, ready when the call returns.

        Args:
            pixels: uint8 [N, 3, R, R] in the host's memory.
        """
        if self._stream is None:
            return list(self._forward(pixels).clone())
        with torch.cuda.stream(self._stream):
            size = next(size for size in SIZES if size >= len(pixels))
            padded = torch.cat([pixels, pixels[:1].expand(size - len(pixels), -1, -1, -1)])
            embeds = self._encoder(padded)(padded)[: len(pixels)].clone()
            embeds.record_stream(torch.cuda.default_stream(self.device))
        self._stream.synchronize()
        return list(embeds)

    def _forward(self, pixels: Tensor) -> Tensor:
        return self.model.encode_images((pixels.to(self.device).float() / 255.0 - self._mean) / self._std)

    def _encoder(self, pixels: Tensor) -> Callable[[Tensor], Tensor]:
        """The graph for so many images, captured at first use."""
        if not self.use_graphs:
            return self._forward
        if len(pixels) not in self._graphs:
            self._graphs[len(pixels)] = self._capture(pixels)
        return self._graphs[len(pixels)]

    def _capture(self, pixels: Tensor) -> Callable[[Tensor], Tensor]:
        held = pixels.to(self.device)
        graph = capture_graph(lambda: self._forward(held), self._pool)

        def replay(pixels: Tensor) -> Tensor:
            held.copy_(pixels.pin_memory(), non_blocking=True)
            return graph()

        return replay
