"""Artifacts: a model with low-bit weights in a folder that is ready to serve, and loads in seconds.

    model-00000.safetensors ..    low-bit weights, scales, and what stays in 16 or 32 bits
    config.json, tokenizer, ...   as in a checkpoint
    quantization.json             method, format and size of every part, measured drift
    manifest.json                 names, sizes and hashes of the others

Writing takes the full model apart one layer at a time. Reading never builds it: the model's frame is made on the meta
device, and each layer is put in with its final weights. What is stored as float32 stays float32 (norms, projector, LoRA
adapters); what is stored as float16 takes the dtype that suits the device. See docs/quantization.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models.eva import EvaBlock
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from tinygptv.checkpoint.config_file import read_config
from tinygptv.checkpoint.folders import QUANTIZATION_FILE, CheckpointError, check_weight_file, verify_folder
from tinygptv.checkpoint.load_model import load_processor
from tinygptv.data.processing import TinyGPTVProcessor
from tinygptv.model.meta import build_on_meta
from tinygptv.model.tinygptv import FLOAT32_NAMES, TinyGPTVForConditionalGeneration
from tinygptv.quantization.encoder_block import HostEncoderBlock
from tinygptv.quantization.host_memory import returning_memory
from tinygptv.quantization.linear_cpu import HalfEmbedding, Int8EncoderLinear
from tinygptv.quantization.linear_packed import from_int4, from_int8, from_llm_int8, from_nf4
from tinygptv.quantization.metadata import FORMAT_VERSION, ArtifactMetadata, PartRecord, read_metadata, write_metadata

SHARD_BYTES = 2**28
"""Size of a file: loading has few of them mapped at a time, and their pages count as used memory."""

EMBEDDING = "language_model.embed_tokens"


class LowBitLinear(Protocol):
    """Interface of a format's class."""

    @classmethod
    def pack(cls, linear: nn.Linear, device: str | torch.device) -> dict[str, Tensor]:
        """Round a layer's weights: what a file holds of it."""

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype) -> nn.Module:
        """Build a layer from what ``pack`` returned."""


FORMATS = {
    "int8": "tinygptv.quantization.linear_cpu.Int8Linear",
    "int4": "tinygptv.quantization.linear_cpu.Int4Linear",
    "nf4": "tinygptv.quantization.linear_bnb.NF4Linear",
    "llm_int8": "tinygptv.quantization.linear_bnb.LLMInt8Linear",
}
"""Format of a part's linear layers -> the class that computes with it. Other formats: ``half`` and ``full``."""

PACKED = {"int8": from_int8, "int4": from_int4, "nf4": from_nf4, "llm_int8": from_llm_int8}
"""The same formats on a GPU, where one layer computes with all of them."""


@dataclass(frozen=True)
class Method:
    """Format of each part: keys of ``FORMATS``, ``half`` (float16) or ``full`` (float32)."""

    language_model: str
    lm_head: str
    vision_encoder: str
    qformer: str
    projector: str = "full"


METHODS = {
    "nf4": Method("nf4", "half", "half", "half"),
    "int4": Method("int4", "half", "half", "half"),
    "int8": Method("int8", "half", "half", "half"),
    "cpu": Method("int8", "int8", "int8", "int8"),
    "cpu4": Method("int4", "int8", "int8", "int8"),
}


# ---------------------------------------------------------------------- writing


def write_artifact(
    folder: Path,
    model: TinyGPTVForConditionalGeneration,
    processor: TinyGPTVProcessor,
    method: str,
    device: str | torch.device = "cpu",
    *,
    encoder: str = "",
) -> ArtifactMetadata:
    """Write everything but the manifest into a folder that exists; the model is left as it is.

    Args:
        folder: where to.
        model: full precision; LoRA adapters that were not merged are kept, in float32.
        processor: goes with it.
        method: key of ``METHODS``.
        device: where NF4 weights are rounded; bitsandbytes is much faster on CUDA.
        encoder: ``half`` or ``int8`` for the vision encoder and the Q-Former; empty takes the method's own.

    Returns:
        What stands in ``quantization.json``.

    Raises:
        ValueError: the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; there are: {', '.join(METHODS)}.")
    formats = _formats(METHODS[method], encoder)
    sizes: dict[str, PartRecord] = {
        part: {"format": name, "parameters": 0, "bytes": 0} for part, name in formats.items()
    }
    for name, parameter in model.named_parameters():
        sizes[name.partition(".")[0]]["parameters"] += parameter.numel()
    for number, tensors in enumerate(_shards(_packed_modules(model, formats, device))):
        for name, tensor in tensors.items():
            sizes[name.partition(".")[0]]["bytes"] += tensor.nbytes
        save_file(tensors, folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
    model.config.template = processor.template
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    metadata: ArtifactMetadata = {
        "format_version": FORMAT_VERSION,
        "method": method,
        "parts": sizes,
        "bytes": sum(part["bytes"] for part in sizes.values()),
        "lora": "kept" if model.config.lora_rank else "merged",
    }
    write_metadata(folder, metadata)
    return metadata


def _formats(method: Method, encoder: str) -> dict[str, str]:
    """Format of every part, with another one for the image encoder where asked for."""
    formats = dict(vars(method))
    if encoder:
        formats["vision_encoder"] = formats["qformer"] = "half" if encoder == "half" else "int8"
    return formats


def _packed_modules(
    model: nn.Module, formats: dict[str, str], device: str | torch.device
) -> Iterator[dict[str, Tensor]]:
    """Stored tensors of one module after another, by full name, on the CPU."""
    for prefix, module in model.named_modules():
        if is_packed(prefix, module, formats):
            with torch.inference_mode():
                packed = format_class(formats[prefix.partition(".")[0]]).pack(cast(nn.Linear, module), device)
            stored = {f"{prefix}.{name}": _in_memory(tensor) for name, tensor in packed.items()}
        else:
            own = module.named_parameters(prefix, recurse=False)
            stored = {name: _in_memory(_rounded(name, parameter, formats)) for name, parameter in own}
        if stored:
            yield stored


def is_packed(name: str, module: nn.Module, formats: dict[str, str]) -> bool:
    """Whether a module is a linear layer whose weights are stored in low bits; LoRA adapters are not."""
    return type(module) is nn.Linear and "lora_" not in name and formats.get(name.partition(".")[0]) in FORMATS


def _rounded(name: str, tensor: Tensor, formats: dict[str, str]) -> Tensor:
    """A parameter of a module that is not packed: float16 in a part of format ``half``, else float32."""
    if not name.startswith(EMBEDDING) and formats[name.partition(".")[0]] != "half":
        return tensor.float()
    tensor = tensor.half()
    if not tensor.isfinite().all():
        raise ValueError(f"{name} has values beyond float16's range: it cannot be stored in half precision.")
    return tensor


def _in_memory(tensor: Tensor) -> Tensor:
    """A tensor with memory of its own on the CPU, as safetensors wants it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _shards(modules: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Join modules to files of about ``SHARD_BYTES``; no module is divided."""
    shard: dict[str, Tensor] = {}
    for tensors in modules:
        shard.update(tensors)
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def format_class(name: str) -> type[LowBitLinear]:
    """The class of a format.

    Args:
        name: key of ``FORMATS``.

    Raises:
        ValueError: it needs a library that is not installed.
    """
    module, _, class_name = FORMATS[name].rpartition(".")
    try:
        return getattr(import_module(module), class_name)
    except ImportError as error:
        raise ValueError(f"weights of format {name} need {error.name}, which is not installed.") from error


# ---------------------------------------------------------------------- reading


def is_artifact(folder: str | Path) -> bool:
    """Whether a folder holds low-bit weights."""
    return (Path(folder) / QUANTIZATION_FILE).is_file()


def load_artifact(
    folder: str | Path, device: str | torch.device = "cpu", *, verify: bool = True
) -> tuple[TinyGPTVForConditionalGeneration, TinyGPTVProcessor, ArtifactMetadata]:
    """Load what ``write_artifact`` wrote, without building the full model.

    Args:
        folder: artifact folder.
        device: where the model computes; every artifact loads on a CPU and on a GPU.
        verify: compare every file's size and hash with the manifest first.

    Returns:
        Model (evaluation mode, frozen), processor, and what ``quantization.json`` says.

    Raises:
        CheckpointError: the artifact is incomplete, damaged, or of another version.
    """
    folder, device = Path(folder), torch.device(device)
    if verify:
        verify_folder(folder)
    metadata = read_metadata(folder)
    formats = {part: entry["format"] for part, entry in metadata["parts"].items()}
    config = read_config(folder)
    model = build_on_meta(config)
    with returning_memory() if device.type == "cpu" else nullcontext():
        _fill(model, _StoredTensors(folder), formats, device)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval().requires_grad_(False), load_processor(folder), metadata


class _StoredTensors:
    """The tensors of an artifact's files, by module; read when they are asked for.

    A file stays mapped until its last tensor is taken.
    """

    def __init__(self, folder: Path) -> None:
        self._modules: dict[str, dict[str, tuple[safe_open, str]]] = {}
        self.folder = folder
        for path in sorted(folder.glob("model-*.safetensors")):
            check_weight_file(path)
            try:
                opened = safe_open(path, framework="pt")
            except Exception as error:  # safetensors has an error type of its own for each kind of damage
                raise CheckpointError(f"{path} is no complete safetensors file: {error}.") from error
            for name in opened.keys():  # noqa: SIM118
                module, leaf = _split(name)
                self._modules.setdefault(module, {})[leaf] = (opened, name)

    def take(self, module: str) -> dict[str, Tensor]:
        """Tensors of one module, copied out of the file, by name within the module."""
        entries = self._modules.pop(module, {})
        return {leaf: opened.get_tensor(name).clone() for leaf, (opened, name) in entries.items()}

    @property
    def left(self) -> list[str]:
        """Modules that nobody took."""
        return sorted(self._modules)


def _split(name: str) -> tuple[str, str]:
    """``a.b.weight.absmax`` -> ``a.b`` and ``weight.absmax``: statistics of a weight belong to its module."""
    module, _, leaf = name.rpartition(".")
    head, marker, statistics = name.partition(".weight.")
    return (head, f"weight.{statistics}") if marker else (module, leaf)


def _fill(
    model: TinyGPTVForConditionalGeneration, tensors: _StoredTensors, formats: dict[str, str], device: torch.device
) -> None:
    """Give every module of a model on the meta device its weights, in place."""
    dtype = compute_dtype(device)
    modules = list(model.named_modules())

    def restored(name: str) -> nn.Module:
        stored = tensors.take(name)
        if not stored:
            raise CheckpointError(f"{tensors.folder} lacks the weights of {name}: export the artifact again.")
        part = name.partition(".")[0]
        form = formats[part]
        if device.type != "cpu":
            return PACKED[form](stored, device, dtype)
        kind = Int8EncoderLinear if (part, form) == ("vision_encoder", "int8") else format_class(form)
        return kind.restore(stored, device, dtype)

    # Kernels for CPUs want weights in an order of their own, which one thread makes slowly.
    with ThreadPoolExecutor(os.cpu_count() if device.type == "cpu" else 1) as pool:
        layers = {name: pool.submit(restored, name) for name, module in modules if is_packed(name, module, formats)}
        for name, module in modules:
            if name in layers:
                model.set_submodule(name, layers[name].result())
                continue
            is_embedding = name == EMBEDDING and device.type == "cpu"
            owner = _halve_embedding(model, cast(nn.Embedding, module)) if is_embedding else module
            for leaf, tensor in tensors.take(name).items():
                _check_shape(tensors.folder, f"{name}.{leaf}", tensor, getattr(module, leaf, None))
                is_full = FLOAT32_NAMES.match(f"{name}.{leaf}") or (device.type == "cpu" and not is_embedding)
                target = torch.float32 if is_full else torch.float16 if is_embedding else dtype
                setattr(owner, leaf, nn.Parameter(tensor.to(device, target), requires_grad=False))
    if tensors.left:
        raise CheckpointError(
            f"{tensors.folder} holds weights of {tensors.left[0]}, which its config.json does not have."
        )
    _fill_buffers(model, device)
    missing = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if missing:
        raise CheckpointError(f"{tensors.folder} lacks {missing[0]}: export the artifact again.")


def _check_shape(folder: Path, name: str, tensor: Tensor, needed: Any) -> None:
    if isinstance(needed, Tensor) and needed.shape != tensor.shape:
        raise CheckpointError(
            f"{name} in {folder} has the shape {list(tensor.shape)}, but its config.json needs {list(needed.shape)}."
        )


def _halve_embedding(model: TinyGPTVForConditionalGeneration, embedding: nn.Embedding) -> nn.Module:
    """Put an embedding into the model that keeps 16 bits per number: its rows are only looked up."""
    halved = HalfEmbedding(embedding.num_embeddings, embedding.embedding_dim, device="meta")
    model.set_input_embeddings(halved)
    return halved


def _fill_buffers(model: TinyGPTVForConditionalGeneration, device: torch.device) -> None:
    """Compute what no file holds, and let timm use packed weights."""
    model.language_model.rotary_emb = PhiRotaryEmbedding(model.config.text_config).to(device)
    blocks = model.vision_encoder.vit.blocks
    for index, block in enumerate(blocks):
        attention = block.attn
        attention.k_bias = torch.zeros_like(cast(Tensor, attention.v_bias))
        attention.qkv_bias_separate = type(attention.qkv) is not nn.Linear
        if HostEncoderBlock.fits(block):
            blocks[index] = HostEncoderBlock(cast(EvaBlock, block))


def compute_dtype(device: torch.device) -> torch.dtype:
    """Dtype of activations: float32 on a CPU; on CUDA bfloat16 where the GPU has it, else float16."""
    if device.type == "cpu":
        return torch.float32
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16
