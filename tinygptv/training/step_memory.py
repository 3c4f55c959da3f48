"""Bytes of one training step's activations and work areas, counted operation by operation.

What autograd keeps for the backward pass is a sum over the operations of ``language_model``, in bytes per token; tests
hold it against the tensors that autograd, and the compiler's partition of a layer, really save. What lives for a moment
only is counted from the largest buffers of the phases of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinygptv.config import TinyGPTVConfig, TinyGPTVTextConfig
from tinygptv.data.flatten import SEQUENCES_MULTIPLE
from tinygptv.model.head_loss import CHUNK_ROWS


@dataclass(frozen=True)
class Computation:
    """Parameters of a step that decide its memory.

    Attributes:
        precision: key of ``train_step.PRECISIONS``; the 16-bit ones keep what trains in float32.
        features: ``inline`` encodes images in each step, ``cached`` does not (the encoder stays loaded).
        compiled: language layers are compiled: less is kept.
        fused: layers of batches without padding are computed with fused kernels (``model.fused_layer``): still less.
        gradient_checkpointing: language layers are computed again in the backward pass.
        on_gpu: as on a GPU: no logits kept where the language head is frozen.
        flat: batches are computed without padding where a GPU does that, in 16 bits (``train_step.is_flat``).
        frozen_weights: ``full``, or the format of the frozen matrices of the language layers.
    """

    precision: str = "bf16"
    features: str = "inline"
    compiled: bool = True
    fused: bool = False
    gradient_checkpointing: bool = False
    on_gpu: bool = True
    flat: bool = True
    frozen_weights: str = "full"

    @property
    def has_no_padding(self) -> bool:
        """Whether sequences lie one after the other, without padding and masks."""
        return self.flat and self.half and self.on_gpu

    @property
    def half(self) -> bool:
        """Whether matrices are 16-bit."""
        return self.precision in ("bf16", "fp16")

    def __str__(self) -> str:
        checkpointing = "with" if self.gradient_checkpointing else "without"
        compiled = "compiled" if self.compiled else "not compiled"
        frozen = "" if self.frozen_weights == "full" else f", frozen weights {self.frozen_weights}"
        return (
            f"{self.precision}{frozen}, features {self.features}, layers {compiled}, "
            f"{checkpointing} gradient checkpointing"
        )


@dataclass(frozen=True)
class BatchSize:
    """Size of one forward pass.

    Attributes:
        samples: sequences.
        tokens: of all sequences together, padding included where there is any.
        positions: supervised tokens.
        images: number of images.
    """

    samples: int
    tokens: int
    positions: int
    images: int


def layer_activation_bytes(
    text: TinyGPTVTextConfig, lora_rank: int, lora_dropout: float, *, half: bool, compiled: bool, fused: bool = False
) -> int:
    """Activations that one language layer keeps for its backward pass, in bytes per token, with fused attention.

    Frozen linear layers keep nothing: the gradient of their input needs their weight alone. A compiled layer computes
    float32 copies and normalised values again, a fused one masks of dropout and means of heads, too.

    Args:
        text: sizes, and which norms there are.
        lora_rank: 0 without adapters.
        lora_dropout: dropout on the adapters' input; keeps a mask and the input.
        half: 16-bit matrices under autocast; else float32.
        compiled: as the compiler's partition of the layer saves.
        fused: as the operations of ``kernels.training_functions`` save.
    """
    width, heads, element = text.hidden_size, text.num_attention_heads, 2 if half else 4
    total = 4 * width  # the residual
    total += 3 * width * element + width * element + 4 * heads  # fused q, k, v; attention's output and its sums
    total += text.intermediate_size * element  # the activation function's input
    if text.input_layernorm:
        total += 8
    if text.qk_layernorm:
        total += 2 * width * element  # q and k after rotation
        total += 0 if fused else 16 * heads  # mean and deviation of each head
        total += 8 * width if half and not compiled and not fused else 0  # float32 copies
    else:
        total += 2 * width * element
    if text.attention_rmsnorm:
        total += 4
        total += width * element if compiled or fused else 8 * width
    if text.resid_pdrop and not fused:
        total += 2 * width  # a byte per element and branch
    if lora_rank:
        total += 2 * lora_rank * element + width * element  # both narrow activations; the input of q, k and v
        if lora_dropout:
            total += width * element  # the other adapter's input
            total += 0 if fused else 2 * width  # masks
    return total


def layer_workspace_bytes(text: TinyGPTVTextConfig) -> int:
    """Peak of one layer's backward pass beyond what was kept, in bytes per token.

    The residual's gradient before and after it, and both gradients around the MLP's activation function.
    """
    return 8 * text.hidden_size + 2 * 2 * text.intermediate_size


def attention_workspace_bytes(text: TinyGPTVTextConfig, batch: BatchSize) -> int:
    """FlashAttention's float32 sums of query gradients: 128 rows more for each sequence, heads of 32, 64, 96, 128."""
    sequences = -(-(batch.samples + 1) // SEQUENCES_MULTIPLE) * SEQUENCES_MULTIPLE
    head = -(-(text.hidden_size // text.num_attention_heads) // 32) * 32
    return 4 * (batch.tokens + 128 * sequences) * text.num_attention_heads * (head + 1)


def mask_bytes(batch: BatchSize, element: int) -> int:
    """The mask that attention in padded batches keeps for its backward pass, one number for each pair of positions."""
    return -(-(batch.tokens**2) // batch.samples) * element


def head_workspace_bytes(
    text: TinyGPTVTextConfig, positions: int, computation: Computation, *, head_trains: bool
) -> int:
    """Logits, probabilities and their gradient: of a few rows on a GPU with a frozen head, else of all positions."""
    hidden = positions * text.hidden_size * 6  # supervised rows in float32, their gradient in 16 bits
    if computation.on_gpu and not head_trains:
        per_logit = 8 if computation.compiled else 14
        return hidden + min(positions, CHUNK_ROWS) * text.vocab_size * per_logit
    return hidden + positions * text.vocab_size * (12 if computation.half else 8)


def encoder_workspace_bytes(config: TinyGPTVConfig, element: int) -> int:
    """Peak memory of encoding an image without gradients; an estimate.

    The residual, a normalised copy (autocast: float32 and again cast), and the MLP before and after its activation.
    """
    vision = config.vision_config
    per_patch = element * (2 * vision.hidden_size + 2 * vision.intermediate_size) + 4 * vision.hidden_size
    return (vision.num_patches + 1) * per_patch + 2 * 4 * 3 * vision.image_size**2
