"""Weights in other layouts, written from a checkpoint or into one, holding one shard in memory at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tinygptv.checkpoint.config_file import read_config
from tinygptv.checkpoint.folders import QUANTIZATION_FILE, CheckpointError, check_inputs, verify_folder, write_folder
from tinygptv.checkpoint.load_model import check_tensors, load_processor
from tinygptv.checkpoint.model_card import model_card
from tinygptv.checkpoint.stage_record import STAGE_FILE, StageRecord
from tinygptv.checkpoint.weight_files import LazyTensor, open_weights
from tinygptv.config import TinyGPTVConfig, TinyGPTVTextConfig
from tinygptv.convert.layouts import interleave_heads, plain_key, release_key, split_phi_tensors
from tinygptv.convert.load import build_fresh
from tinygptv.convert.match import Release
from tinygptv.data.processing import TinyGPTVProcessor
from tinygptv.model.meta import build_on_meta
from tinygptv.training.stages import TRAINABLE_PARTS

logger = logging.getLogger(__name__)

SHARD_BYTES = 1 << 30


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as transformers' sharded safetensors, holding one shard in memory at a time.

    Args:
        folder: where to.
        tensors: (name, value), read as they are written.
        shard_bytes: most bytes of a shard.

    Raises:
        CheckpointError: a shard cannot be written, for example to a full disk.
    """
    waiting: dict[str, Tensor] = {}
    files: list[dict[str, int]] = []
    size = total = 0

    def flush() -> None:
        nonlocal size
        if waiting:
            try:
                save_file(waiting, folder / f"shard-{len(files) + 1}.safetensors", metadata={"format": "pt"})
            except SafetensorError as error:
                raise CheckpointError(f"weights cannot be written in {folder.parent}: {error}.") from error
            files.append(dict.fromkeys(waiting, len(files) + 1))
            waiting.clear()
            size = 0

    for name, tensor in tensors:
        if waiting and size + tensor.nbytes > shard_bytes:
            flush()
            logger.info("%.1f GB written ...", total / 1e9)
        waiting[name] = tensor.contiguous().clone()  # a mapped file must not stay open through its tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        (folder / "shard-1.safetensors").rename(folder / "model.safetensors")
        return
    names = {i: f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)}
    for i, name in names.items():
        (folder / f"shard-{i}.safetensors").rename(folder / name)
    weight_map = {name: names[i] for file in files for name, i in file.items()}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def convert_release(
    release: Release,
    output: Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | None = None,
    template: str = "human",
) -> Path:
    """Write matched release files as a checkpoint folder.

    Args:
        release: from ``match_release``.
        output: folder to write.
        tokenizer: Phi-2's.
        dtype: of the frozen matrices; None stores them as their files hold them, in at most 16 bits
            (``match.in_sixteen_bits``), and names bfloat16 as the dtype to compute in.
        template: key of ``prompts.TEMPLATES`` that the weights were trained with.
    """
    config = release.config
    config.template = template
    # Copies of Phi-2 that were trained to chat have tokens of their own (<|im_end|>) where Phi-2's vocabulary ends.
    config.image_token_id = max(config.image_token_id, *(1 + token for token in tokenizer.get_vocab().values()))
    config.architectures = ["TinyGPTVForConditionalGeneration"]
    config.dtype = dtype or torch.bfloat16

    def fill(staging: Path) -> None:
        write_shards(staging, _all_tensors(release, dtype))
        config.save_pretrained(staging)
        processor = TinyGPTVProcessor.from_config(config, tokenizer)
        processor.save_pretrained(staging)
        stage: StageRecord = {"title": "converted from release files"}
        (staging / STAGE_FILE).write_text(json.dumps(stage, indent=1))
        model = build_on_meta(config)
        processor.set_end_symbol(model.generation_config)
        model.generation_config.save_pretrained(staging)
        (staging / "README.md").write_text(model_card(model, stage))

    return write_folder(output, fill)


def _all_tensors(release: Release, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    yield from release.tensors(dtype)
    yield from build_fresh(release, dtype or torch.bfloat16)


def read_source(checkpoint: Path) -> TinyGPTVConfig:
    """Check the checkpoint that a conversion starts from.

    Raises:
        CheckpointError: it is incomplete, damaged, or a quantized artifact.
    """
    verify_folder(checkpoint, hashes=False)
    if (checkpoint / QUANTIZATION_FILE).is_file():
        raise CheckpointError(
            f"{checkpoint} is a quantized artifact, whose weights are rounded: give the checkpoint that it was made "
            "from."
        )
    config = read_config(checkpoint)
    check_tensors(checkpoint, config)
    return config


def check_file_output(output: Path, inputs: list[Path]) -> None:
    """Refuse an output file before any work: it must be new, in a folder that is there.

    Raises:
        CheckpointError: it is not.
    """
    check_inputs(output, inputs)
    if output.is_dir():
        raise CheckpointError(
            f"output {output} is a folder: give the path of a new file, for example {output}/stage.pth."
        )
    if output.exists():
        raise CheckpointError(f"output {output} exists already: move it, or give the path of a new file.")
    if not output.absolute().parent.is_dir():
        raise CheckpointError(f"output {output} cannot be written: the folder {output.parent} does not exist.")


def write_release_stage(checkpoint: Path, output: Path) -> Path:
    """Write what a stage trains as the release's stage ``.pth``: ``{"model": {...}}`` in its names and row orders.

    Raises:
        CheckpointError: the checkpoint cannot be read or its LoRA adapters are merged, or the output cannot be written.
    """
    check_file_output(output, [checkpoint])
    config = read_source(checkpoint)
    if config.lora_merged:
        raise CheckpointError(
            f"the LoRA adapters of {checkpoint} are merged into its weights, and a stage file of the release holds "
            "adapters: give the checkpoint from before the merge."
        )
    heads, lora = config.text_config.num_attention_heads, bool(config.lora_rank)
    marks = [mark for part in ("projector", "lora", "language_norms") for mark in TRAINABLE_PARTS[part]]
    state: dict[str, Tensor] = {}
    for name, lazy in open_weights(checkpoint).items():
        found = release_key(plain_key(name), lora) if any(mark in name for mark in marks) else None
        if found:
            key, per_head = found
            tensor = lazy.load().float()
            state[key] = (interleave_heads(tensor, heads) if per_head else tensor).clone()
    # The release's filter keeps buffers, and readers of its files may look for this one.
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(512).unsqueeze(0)
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        torch.save({"model": state}, temporary)
        temporary.rename(output)
    except RuntimeError as error:  # torch's own, which does not say that the disk is full
        raise CheckpointError(f"{output} cannot be written: is its disk full? ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return output


def write_split_phi(checkpoint: Path, output: Path, *, merge_lora: bool = False) -> list[str]:
    """Write the language model as plain Phi-2 in the split layout of current transformers.

    Args:
        checkpoint: folder with LoRA adapters merged, or without.
        output: folder to write.
        merge_lora: fold adapters into the weights on the way; the checkpoint stays as it is.

    Returns:
        Names of the norms that TinyGPT-V adds, which plain Phi-2 does not have.

    Raises:
        CheckpointError: the checkpoint cannot be read or holds adapters, or the output would replace something else.
    """
    config = read_source(checkpoint)
    if config.lora_rank and not merge_lora:
        raise CheckpointError(
            f"{checkpoint} holds LoRA adapters, which plain Phi-2 cannot: add --merge-lora to fold them into the "
            "weights (in Python, model.merge_lora())."
        )
    tokenizer = load_processor(checkpoint).tokenizer
    tokenizer.chat_template = None
    weights = {name: lazy for name, lazy in open_weights(checkpoint).items() if _is_language(name)}
    left_out: list[str] = []
    dtypes: dict[str, torch.dtype] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in weights:
            if ".lora_" not in name:
                tensor = _merged(name, weights, config)
                dtypes[name] = tensor.dtype
                theirs = split_phi_tensors(plain_key(name), tensor)
                yield from theirs.items()
                if not theirs:
                    left_out.append(name)

    def fill(staging: Path) -> None:
        write_shards(staging, tensors())
        dtype = dtypes["language_model.embed_tokens.weight"]
        (staging / "config.json").write_text(_plain_config(config.text_config, dtype))
        tokenizer.save_pretrained(staging)

    write_folder(output, fill)
    return left_out


def _plain_config(text: TinyGPTVTextConfig, dtype: torch.dtype) -> str:
    """Phi-2's config.json, with the names that transformers before 5 and others know beside today's."""
    own = ("qk_layernorm", "attention_rmsnorm", "input_layernorm", "attention_rmsnorm_eps", "dtype")
    plain = {key: value for key, value in text.to_dict().items() if key not in own}
    rope = plain["rope_parameters"]
    plain |= {"partial_rotary_factor": rope["partial_rotary_factor"], "rope_theta": rope["rope_theta"]}
    plain |= {"model_type": "phi", "architectures": ["PhiForCausalLM"], "hidden_act": "gelu_new"}
    plain |= {"torch_dtype": str(dtype).removeprefix("torch.")}
    return json.dumps(plain, indent=1, default=str)


def _is_language(name: str) -> bool:
    return name.startswith(("language_model.", "lm_head."))


def _merged(name: str, weights: dict[str, LazyTensor], config: TinyGPTVConfig) -> Tensor:
    """A tensor, with its layer's LoRA adapter added where it has one."""
    tensor = weights[name].load()
    first, second = (name.replace(".base_layer.weight", f".lora_{x}.default.weight") for x in "AB")
    if first == name or first not in weights:
        return tensor
    product = weights[second].load().float() @ weights[first].load().float()
    return (tensor.float() + config.lora_alpha / config.lora_rank * product).to(tensor.dtype)
