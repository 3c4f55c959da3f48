"""The training stages as data: what trains, on what, at which size, in which words, for how long, how fast.

Three recipes hold four stages each:

* ``paper``     what the paper says: no LoRA in stage 1, saw-tooth warm-up, one template for training, chat, evaluation;
* ``released``  what the published code and configurations do, for people who hold its checkpoints;
* ``mini``      the paper's stages at the size of the miniature, minutes on two CPU cores.

They differ in data only: no code asks which stage it is in. Sources: arXiv 2312.16862 section 4, the release's YAML
files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tinygptv.bounds import check_number
from tinygptv.data.prompts import TEMPLATES, Template
from tinygptv.data.sample import TextLimits
from tinygptv.training.schedule import Schedule

if TYPE_CHECKING:
    from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

TRAINABLE_PARTS: dict[str, tuple[str, ...]] = {
    "projector": ("projector.",),
    "lora": (".lora_A.", ".lora_B."),
    # Weights only: the release never unfreezes the norms' biases, so those of q and k stay zero.
    "language_norms": (
        "q_layernorm.weight",
        "k_layernorm.weight",
        "input_layernorm.weight",
        "attention_rmsnorm.weight",
        "final_layernorm.weight",
    ),
    # The same norms one by one, for stages that train some of them.
    "qk_norms": ("q_layernorm.weight", "k_layernorm.weight"),
    "input_norms": ("input_layernorm.weight",),
    "attention_norms": ("attention_rmsnorm.weight",),
    "final_norm": ("final_layernorm.weight",),
    "qformer": ("qformer.",),
    "vision_encoder": ("vision_encoder.",),
    "language_model": ("language_model.", "lm_head."),
}
"""Part name -> substrings of the parameter names that belong to it."""


@dataclass(frozen=True)
class StageSource:
    """A data set's share in a stage: relative weight, and samples taken each time it is drawn."""

    name: str
    weight: float
    batch_size: int

    def __post_init__(self) -> None:
        check_number(f"weight of source {self.name!r}", self.weight, 0)
        check_number(f"batch_size of source {self.name!r}", self.batch_size, 1, whole=True)


@dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
        number: 1 to 4.
        title: the paper's name for it.
        trainable: keys of ``TRAINABLE_PARTS``; everything else is frozen.
        sources: the data mix.
        draws_per_step: sources drawn for each step; see ``mixture``.
        image_size: side of the model's input image in pixels.
        template: key of ``prompts.TEMPLATES``.
        limits: sequence lengths in tokens.
        schedule: learning rate per step.
        lora_rank: 0 trains without LoRA adapters.
        lora_alpha: LoRA scale numerator.
        lora_dropout: dropout on the adapters' input.
        weight_decay: AdamW decay of matrices.
        beta2: AdamW's second momentum factor.
        max_grad_norm: clip gradients to this norm; None does not clip, as in the release.
    """

    number: int
    title: str
    trainable: tuple[str, ...]
    sources: tuple[StageSource, ...]
    image_size: int
    template: str
    limits: TextLimits
    schedule: Schedule
    draws_per_step: int = 1
    lora_rank: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    weight_decay: float = 0.05
    beta2: float = 0.999
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        if not self.trainable:
            raise ValueError(f"stage {self.number} has no trainable part: choose some of {sorted(TRAINABLE_PARTS)}.")
        unknown = set(self.trainable) - set(TRAINABLE_PARTS)
        if unknown:
            raise ValueError(
                f"stage {self.number} trains unknown parts {sorted(unknown)}; known: {sorted(TRAINABLE_PARTS)}."
            )
        if not isinstance(self.template, str) or self.template not in TEMPLATES:
            raise ValueError(f"stage {self.number} has template {self.template!r}; known: {sorted(TEMPLATES)}.")
        names = [source.name for source in self.sources]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"stage {self.number} has source {twice[0]!r} twice: give it once, with one weight.")
        if not sum(source.weight for source in self.sources) > 0:
            raise ValueError(f"stage {self.number} has no source with a weight above 0: nothing could be drawn.")
        for name, least in (("draws_per_step", 1), ("image_size", 1), ("lora_rank", 0), ("lora_alpha", 1)):
            check_number(name, getattr(self, name), least, whole=name != "lora_alpha")
        check_number("lora_dropout", self.lora_dropout, 0, 1)
        check_number("weight_decay", self.weight_decay, 0)
        check_number("beta2", self.beta2, 0, 1)
        if self.beta2 == 1:
            raise ValueError("beta2 is 1, with which AdamW never learns how large gradients are; it must be below.")
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm, 0)
            if not self.max_grad_norm:
                raise ValueError("max_grad_norm is 0, which leaves nothing of a gradient; null clips none.")

    @property
    def prompt_template(self) -> Template:
        """The template object."""
        return TEMPLATES[self.template]

    @property
    def max_step_samples(self) -> int:
        """Most samples that one optimizer step can hold."""
        return self.draws_per_step * max(source.batch_size for source in self.sources)


def set_trainable(model: TinyGPTVForConditionalGeneration, parts: tuple[str, ...]) -> dict[str, int]:
    """Freeze everything but the named parts, in place.

    Args:
        model: the model.
        parts: keys of ``TRAINABLE_PARTS``.

    Returns:
        Number of trainable parameters per part.

    Raises:
        ValueError: a named part has no parameters in this model (e.g. LoRA where none was added).
    """
    counts = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        owner = next((part for part in parts if any(mark in name for mark in TRAINABLE_PARTS[part])), None)
        # "language_model" alone would also claim adapters; those train only where "lora" is named.
        if owner == "language_model" and ".lora_" in name:
            owner = "lora" if "lora" in parts else None
        parameter.requires_grad_(owner is not None)
        if owner is not None:
            counts[owner] += parameter.numel()
    empty = [part for part, count in counts.items() if count == 0]
    if empty:
        raise ValueError(
            f"trainable parts {empty} have no parameters in this model: add them, or take them out of the stage."
        )
    return counts


def _sources(batch_size: int | None = None, **weights: float | tuple[float, int]) -> tuple[StageSource, ...]:
    """``name=weight`` with one batch size for all, or ``name=(weight, batch_size)``."""
    pairs = {n: w if isinstance(w, tuple) else (w, batch_size or 1) for n, w in weights.items()}
    return tuple(StageSource(name, weight, size) for name, (weight, size) in pairs.items())


_WEB_PAIRS = _sources(laion=(115, 64), cc_sbu=(14, 64))

_MULTI_TASK = _sources(
    multitask_conversation=(50, 1),
    llava_conversation=(30, 1),
    unnatural_instruction=(10, 1),
    refvg=(40, 3),
    llava_detail=(20, 2),
    llava_reason=(80, 2),
    flickr_grounded_caption=(80, 1),
    flickr_CaptionToPhrase=(80, 1),
    flickr_ObjectToPhrase=(80, 1),
    refcoco=(25, 3),
    refcocop=(25, 3),
    refcocog=(25, 3),
    invrefcoco=(10, 3),
    invrefcocop=(10, 3),
    invrefcocog=(10, 3),
    textcaps_caption=(30, 3),
    coco_vqa=(15, 3),
    ok_vqa=(8, 3),
    aok_vqa=(12, 3),
    gqa=(50, 3),
)

_TRAINED_WITH_LORA = ("projector", "language_norms", "lora")

_RELEASED = (
    Stage(
        number=1,
        title="warm-up",
        trainable=_TRAINED_WITH_LORA,  # by oversight of the release: its stage 1 also trains LoRA
        sources=_WEB_PAIRS,
        image_size=224,
        template="caption",
        limits=TextLimits(32, mask_inner_bos=True),
        schedule=Schedule("warmup_cosine", 1e-4, 8e-5, 1e-6, 1000, steps_per_epoch=5000, epochs=1),
    ),
    Stage(
        number=2,
        title="pre-training",
        trainable=_TRAINED_WITH_LORA,
        sources=_WEB_PAIRS,
        image_size=224,
        template="caption",
        limits=TextLimits(32, mask_inner_bos=True),
        schedule=Schedule("warmup_cosine", 1e-4, 8e-5, 1e-6, 5000, steps_per_epoch=5000, epochs=4),
    ),
    Stage(
        number=3,
        title="human-like learning",
        trainable=_TRAINED_WITH_LORA,
        sources=_sources(cc_sbu_align=(1, 6)),
        image_size=224,
        template="human",
        limits=TextLimits(160, mask_inner_bos=True),
        schedule=Schedule("warmup_cosine", 3e-5, 1e-5, 1e-6, 200, steps_per_epoch=200, epochs=5),
    ),
    Stage(
        number=4,
        title="multi-task learning",
        trainable=_TRAINED_WITH_LORA,
        sources=_MULTI_TASK,
        image_size=448,
        template="inst",
        limits=TextLimits(1024, mask_inner_bos=True),
        schedule=Schedule("warmup_cosine", 1e-5, 8e-5, 1e-6, 1000, steps_per_epoch=1000, epochs=50),
    ),
)

_PAPER = (
    replace(
        _RELEASED[0],
        trainable=("projector", "language_norms"),
        lora_rank=0,
        limits=TextLimits(32),
        schedule=Schedule("sawtooth", 1e-4, 1e-4, 1e-5, 0, steps_per_epoch=1000, epochs=17),
    ),
    replace(_RELEASED[1], limits=TextLimits(32)),
    replace(
        _RELEASED[2],
        # The paper's stage 3 learns from MiniGPT-4's and LLaVA's pairs; the release's configuration names one set.
        sources=_sources(cc_sbu_align=(1, 6), llava_detail=(1, 6)),
        limits=TextLimits(160),
    ),
    replace(_RELEASED[3], template="human", limits=TextLimits(1024)),
)

_MINI_SOURCES = _sources(
    1,
    coco_vqa=30,
    gqa=20,
    refcoco=22,
    invrefcoco=8,
    flickr_grounded_caption=8,
    flickr_ObjectToPhrase=4,
    coco_caption=6,
    llava_conversation=8,
    llava_detail=2,
    unnatural_instruction=2,
)

_MINI = (
    replace(
        _PAPER[0],
        sources=_sources(laion=(115, 32), cc_sbu=(14, 32)),
        image_size=64,
        limits=TextLimits(48),
        schedule=Schedule("sawtooth", 3e-3, 3e-3, 3e-4, 0, steps_per_epoch=50, epochs=3),
        max_grad_norm=1.0,
    ),
    replace(
        _PAPER[1],
        sources=_sources(laion=(115, 32), cc_sbu=(14, 32)),
        image_size=64,
        limits=TextLimits(48),
        schedule=Schedule("warmup_decay", 2e-3, 1e-3, 1e-4, 20, steps_per_epoch=50, epochs=3),
        lora_rank=16,
        lora_dropout=0.0,
        max_grad_norm=1.0,
    ),
    replace(
        _PAPER[2],
        sources=_sources(cc_sbu_align=(1, 32), llava_detail=(1, 32)),
        image_size=64,
        limits=TextLimits(96),
        schedule=Schedule("warmup_decay", 3e-4, 1e-5, 3e-5, 10, steps_per_epoch=20, epochs=3),
        lora_rank=16,
        lora_dropout=0.0,
        max_grad_norm=1.0,
    ),
    replace(
        _PAPER[3],
        sources=_MINI_SOURCES,
        image_size=128,
        limits=TextLimits(128),
        draws_per_step=32,
        schedule=Schedule("warmup_decay", 2e-3, 1e-4, 1e-4, 30, steps_per_epoch=100, epochs=8),
        lora_rank=16,
        lora_dropout=0.0,
        max_grad_norm=1.0,
    ),
)

RECIPES: dict[str, tuple[Stage, ...]] = {"paper": _PAPER, "released": _RELEASED, "mini": _MINI}
"""Recipe name -> its stages, in order."""


def get_recipe(name: str) -> tuple[Stage, ...]:
    """The stages of a recipe, in order.

    Raises:
        ValueError: there is no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}; known recipes: {sorted(RECIPES)}.")
    return RECIPES[name]


def get_stage(recipe: str, number: int) -> Stage:
    """Look a stage up.

    Raises:
        ValueError: there is no such recipe or stage.
    """
    stages = {stage.number: stage for stage in get_recipe(recipe)}
    if number not in stages:
        raise ValueError(f"recipe {recipe!r} has no stage {number}; it has {list(stages)}.")
    return stages[number]
