"""One optimizer step: forward and backward over micro-batches, one all-reduce, one update. torch only, no Ray.

The loss is a sum of token losses divided once by the number of supervised tokens of the whole step, over all
micro-batches and workers: how a step is cut into pieces changes its result by rounding only.
All gradients live in one flat buffer, so a step has one all-reduce, one norm and one reset.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tinygptv.config import TinyGPTVConfig
from tinygptv.data.collate import MicroBatch
from tinygptv.data.flatten import FlatBatch, flatten
from tinygptv.data.images import normalise_pixels
from tinygptv.kernels.training_functions import HAS_TRITON
from tinygptv.model.head_loss import Scorer, score_logits
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.model.varlen_attention import runs_flash_attention
from tinygptv.training.compilation import Compile, compile_layers, compiled_scorer, run_eagerly, wants_compilation
from tinygptv.training.fp16_emulation import emulate_half_range
from tinygptv.training.stages import TRAINABLE_PARTS

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp16_range": torch.float32}
"""Precision -> dtype of the matrices; ``fp16_range`` computes in float32 and rounds to fp16 (``fp16_emulation``)."""

FUSED_LAYERS = HAS_TRITON
"""Whether language layers are computed with fused kernels where that is possible."""

MOST_PATCHES = 64 * 257
"""Patch tokens that the encoder reads at a time: 64 images of 224 px, 16 of 448."""


def images_at_a_time(config: TinyGPTVConfig) -> int:
    """Images that are encoded together: enough to fill a GPU, and so few that they take no memory to speak of."""
    return max(1, MOST_PATCHES // (config.vision_config.num_patches + 1))


def set_dtypes(model: TinyGPTVForConditionalGeneration, device: torch.device, encoder_precision: str) -> None:
    """Bring a loaded model to the dtypes of training, in place: what trains is float32.

    On a GPU the frozen encoder and Q-Former take the dtype that they are computed in, so that they need no autocast. On
    CPUs they stay as loaded.

    Args:
        model: with the stage's trainable parts set.
        device: where it will train.
        encoder_precision: key of ``PRECISIONS``.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for part in (model.vision_encoder, model.qformer):
        if device.type == "cuda" and not any(p.requires_grad for p in part.parameters()):
            part.to(PRECISIONS[encoder_precision])


def is_flat(model: TinyGPTVForConditionalGeneration, precision: str) -> bool:
    """Whether batches are computed without padding: in 16 bits, on cards where attention has a kernel for it."""
    if PRECISIONS[precision] not in (torch.bfloat16, torch.float16) or not runs_flash_attention(model.device):
        return False
    return model.language_model.config._attn_implementation == "sdpa"


def is_fused(model: TinyGPTVForConditionalGeneration, precision: str) -> bool:
    """Whether flat batches are computed with the fused kernels of ``kernels.training_functions``."""
    return FUSED_LAYERS and is_flat(model, precision)


@dataclass
class StepResult:
    """Report of a step; tensors stay on the device until somebody reads them.

    Attributes:
        loss: mean token loss of the whole step, float64 scalar.
        source_loss_sums: [sources] sums of token losses, over all workers.
        source_tokens: [sources] supervised tokens, over all workers.
        grad_norm: norm of the whole gradient before clipping.
        skipped: 1 where the update was left out: the gradient was not finite, or the loss was rejected.
        rejected: bool scalar, what ``reject`` said of the loss.
        reduce_s: seconds the host spent in the all-reduce; on a GPU, in launching it.
    """

    loss: Tensor
    source_loss_sums: Tensor
    source_tokens: Tensor
    grad_norm: Tensor
    skipped: Tensor
    rejected: Tensor
    reduce_s: float


class TrainStep:
    """Runs optimizer steps on one worker; all workers of a process group run it together."""

    def __init__(
        self,
        model: TinyGPTVForConditionalGeneration,
        optimizer: torch.optim.Optimizer,
        *,
        num_sources: int,
        precision: str = "fp32",
        encoder_precision: str | None = None,
        max_grad_norm: float | None = None,
        reject: Callable[[Tensor], Tensor] | None = None,
        flat: bool | None = None,
        fused: bool | None = None,
        compile: Compile = "off",
    ) -> None:
        """Prepare the gradient buffer.

        Args:
            model: with the stage's trainable parts set.
            optimizer: over its trainable parameters.
            num_sources: data sets of the stage, for the loss per source.
            precision: ``fp32``, ``bf16`` (autocast), ``fp16`` (autocast and a GradScaler), or ``fp16_range``, which
                emulates the latter where no GPU is.
            encoder_precision: ``fp32``, ``bf16`` or ``fp16`` for images that are encoded in the step; None: as above.
            max_grad_norm: clip to this norm; None does not.
            reject: says on the device whether the step of a loss must be left out (loss -> bool scalar); all workers
                see the same loss, so all say the same.
            flat: compute batches without their padding (``data.flatten``); None: as ``is_flat``.
            fused: compute flat batches with fused kernels (``model.fused_layer``); None: as ``is_fused``.
            compile: ``on`` compiles the model's layers in place (``compilation``), ``auto`` does on CUDA; the first
                step then takes longer.

        Raises:
            ValueError: the precision is unknown.
        """
        for name in (precision, encoder_precision or precision):
            if name not in PRECISIONS:
                raise ValueError(f"precision is {name!r}; choose one of {sorted(PRECISIONS)}.")
        self.model = model
        self.optimizer = optimizer
        self.num_sources = num_sources
        self.max_grad_norm = max_grad_norm
        self.reject = reject
        self.device = model.device
        self.autocast_dtype = PRECISIONS[precision]
        self.encoder_dtype = PRECISIONS[encoder_precision or precision]
        self.flat = flat if flat is not None else is_flat(model, precision)
        self.fused = fused if fused is not None else is_fused(model, precision)
        self.compiled = wants_compilation(compile, self.device)
        if self.compiled:
            compile_layers(model)
        self.scorer = self._scorer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision.startswith("fp16"))
        if precision == "fp16_range":
            emulate_half_range(model)
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.gradient = torch.zeros(sum(p.numel() for _, p in self.named), device=self.device)
        self._sums = torch.zeros(2, num_sources, dtype=torch.float64, device=self.device)
        self._clipped_by = torch.ones((), device=self.device)
        self.scaler.scale(self._clipped_by)  # it takes its scale at the first use, and a worker's share may be empty
        self._attach_gradients()

    def _scorer(self) -> Scorer | None:
        """Loss function that keeps no logits, on CUDA with a frozen language head; None elsewhere."""
        if self.device.type != "cuda" or any(p.requires_grad for p in self.model.lm_head.parameters()):
            return None
        return compiled_scorer() if self.compiled else score_logits

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """Inside, every module of the language model is called one by one: for hooks that look at them."""
        scorer, fused = self.scorer, self.fused
        self.scorer, self.fused = None, False
        try:
            with run_eagerly():
                yield
        finally:
            self.scorer, self.fused = scorer, fused

    def _attach_gradients(self) -> None:
        start = 0
        for _, parameter in self.named:
            parameter.grad = self.gradient[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def run(self, batches: Sequence[MicroBatch], learning_rate: float) -> StepResult:
        """Do one step.

        Args:
            batches: this worker's share of the step; may be empty.
            learning_rate: for all parameter groups.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.gradient.zero_()
        self._sums.zero_()
        num_tokens = self._global_count(sum(len(batch.supervised_ids) for batch in batches))
        for batch in batches:
            self._accumulate(batch, num_tokens)
        started = time.perf_counter()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.gradient)
            dist.all_reduce(self._sums)
        return self._update(num_tokens, time.perf_counter() - started)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Token losses [M] of a micro-batch."""
        query_features = self._query_features(batch)
        flat = flatten(batch, self.model.config.image_token_id) if self.flat else None
        if flat is not None:
            return self._flat_losses(flat, query_features)
        with self.autocast():
            inputs_embeds = self.model.embed(self._to_device(batch.input_ids), query_features=query_features)
            return self.model.token_losses(
                inputs_embeds,
                self._to_device(batch.supervised_positions),
                self._to_device(batch.supervised_ids),
                attention_mask=None if batch.attention_mask is None else self._to_device(batch.attention_mask),
                position_ids=None if batch.position_ids is None else self._to_device(batch.position_ids),
                scorer=self.scorer,
            )

    def _flat_losses(self, flat: FlatBatch, query_features: Tensor | None) -> Tensor:
        ids, positions, image_positions, supervised_positions, supervised_ids, cu_seqlens = self._send(
            flat.input_ids,
            flat.position_ids,
            flat.image_positions,
            flat.supervised_positions,
            flat.supervised_ids,
            flat.cu_seqlens,
        )
        with self.autocast():
            inputs_embeds = self.model.embed(
                ids.unsqueeze(0), query_features=query_features, image_positions=image_positions
            )
            if not inputs_embeds.requires_grad:
                inputs_embeds.requires_grad_()  # text alone: the first layer's graph is that of the others
            return self.model.token_losses(
                inputs_embeds,
                supervised_positions,
                supervised_ids,
                position_ids=positions.unsqueeze(0),
                scorer=self.scorer,
                fused=self.fused,
                cu_seq_lens_q=cu_seqlens.int(),
                max_length_q=flat.max_length,
            )

    def _query_features(self, batch: MicroBatch) -> Tensor | None:
        """Cached query features, or those of the batch's images, encoded now."""
        if batch.query_features is not None:
            return self._to_device(batch.query_features)
        return None if batch.pixels is None else self.encode(batch.pixels)

    def encode(self, pixels: np.ndarray) -> Tensor:
        """Query features [N, Q, F] of uint8 images [N, 3, R, R], in the precision of the encoder."""
        # Weights that are 16-bit already need no autocast, whose float32 norms cost a tenth of the encoder's time.
        weights = self.model.qformer.query_tokens.dtype
        size = images_at_a_time(cast(TinyGPTVConfig, self.model.config))
        images = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        with self._autocast(self.encoder_dtype if self.encoder_dtype != weights else torch.float32):
            features = [self.model.encode_query_features(self.pixel_values(part)) for part in images]
        return features[0] if len(features) == 1 else torch.cat(features)

    def autocast(self) -> torch.autocast:
        """Computation in the precision of the training."""
        return self._autocast(self.autocast_dtype)

    def _autocast(self, dtype: torch.dtype) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def _accumulate(self, batch: MicroBatch, num_tokens: Tensor) -> None:
        losses = self.forward(batch)
        self.scaler.scale(losses.sum() / num_tokens).backward()
        sources = self._to_device(batch.supervised_sources)
        self._sums[0].index_add_(0, sources, losses.detach().double())
        self._sums[1].index_add_(0, sources, torch.ones_like(losses, dtype=torch.float64))

    def _update(self, num_tokens: Tensor, reduce_s: float) -> StepResult:
        loss = self._sums[0].sum() / num_tokens
        rejected = self.reject(loss) if self.reject else torch.zeros((), dtype=torch.bool, device=self.device)
        if self.scaler.is_enabled():  # it looks at the gradient alone
            self.gradient.add_(torch.where(rejected, torch.inf, 0.0))
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.linalg.vector_norm(self.gradient)
        skipped = (~torch.isfinite(grad_norm) | rejected).float()
        if self.max_grad_norm is not None:
            self._clipped_by = (self.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
            self.gradient.mul_(self._clipped_by)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.device.type == "cpu":
            if not skipped:
                self.optimizer.step()
        else:
            # The fused optimizer skips the update on the device: no wait for the host.
            self.optimizer.found_inf = skipped
            self.optimizer.grad_scale = None
            self.optimizer.step()
        return StepResult(
            loss=loss,
            source_loss_sums=self._sums[0].clone(),
            source_tokens=self._sums[1].clone(),
            grad_norm=grad_norm,
            skipped=skipped,
            rejected=rejected,
            reduce_s=reduce_s,
        )

    def part_norms(self) -> dict[str, float]:
        """Gradient norm of each trainable part, and per language layer, before clipping; reads the device."""
        squares: dict[str, Tensor] = {}
        for name, parameter in self.named:
            part = next(p for p, marks in TRAINABLE_PARTS.items() if any(mark in name for mark in marks))
            keys = [part]
            if ".layers." in name:
                keys.append(f"{part}/layer_{int(name.split('.layers.')[1].split('.')[0]):02d}")
            assert parameter.grad is not None, "it is a view of the gradient buffer"
            square = parameter.grad.square().sum()
            for key in keys:
                squares[key] = squares[key] + square if key in squares else square
        norms = (torch.stack(list(squares.values())).sqrt() / self._clipped_by).tolist()
        return dict(zip(squares, norms, strict=True))

    def _global_count(self, local: int) -> Tensor:
        """Supervised tokens of the step over all workers, at least 1; stays on the device."""
        count = torch.full((), float(local), dtype=torch.float64, device=self.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(count)
        return count.clamp(min=1.0)

    def pixel_values(self, pixels: np.ndarray) -> Tensor:
        """Normalised float images on the device, from uint8 [N, 3, R, R]."""
        return normalise_pixels(self._to_device(pixels))

    def _send(self, *arrays: np.ndarray) -> tuple[Tensor, ...]:
        """Integer arrays on the device, in one transfer."""
        return self._to_device(np.concatenate(arrays)).split([len(array) for array in arrays])

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.as_tensor(array)
        if self.device.type == "cuda" and not tensor.is_cuda:
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)
