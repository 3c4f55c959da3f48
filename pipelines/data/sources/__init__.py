"""Data sets as data: which files, read how, for which task.

A new data set is one line here where its files are of a known family; see docs/how-to-add-a-dataset.md. Where each data
set is from, and how its files are laid out: docs/datasets.md.
"""

from __future__ import annotations

from pipelines.data.sources import entries
from pipelines.data.sources.annotations import AnnotationReader
from pipelines.data.sources.base import Source, SourceInput
from pipelines.data.sources.delimited import DelimitedReader
from pipelines.data.sources.images import COCO, ImageLayout, below
from pipelines.data.sources.own import JsonRowsReader, TableReader
from pipelines.data.sources.referring import RefCocoReader, VisualGenomeReader
from pipelines.data.sources.tar import TarReader
from pipelines.settings import PrepareDataSettings, SettingsError
from pipelines.settings.near_match import near_match
from tinygptv.data.prompts import INSTRUCTIONS

_REFCOCO = RefCocoReader("refcoco", "unc")
_REFCOCO_PLUS = RefCocoReader("refcoco+", "unc")
_REFCOCOG = RefCocoReader("refcocog", "umd")

_ALIGN = ImageLayout(("image", "images"), below("image"))
_FLICKR = ImageLayout(
    ("flickr30k-images", "flickr30k_images", "images", "flickr30k/images", "flickr30k/flickr30k-images"),
    below("flickr30k-images", "flickr30k_images", "images"),
)
_TEXTCAPS = ImageLayout(
    ("train_images", "images/train_images", "textvqa/train_images", "TextVQA/train_images", "textcaps/train_images"),
    below("train_images"),
)
_GQA = ImageLayout(("images", "gqa/images", "GQA/images"), below("images"))
_OCRVQA = ImageLayout(
    ("images", "ocr_vqa/images", "ocrvqa/images", "OCR-VQA/images", "OCRVQA/images"), entries.ocrvqa_names
)

SOURCES: dict[str, Source] = {
    # stages 1 and 2: image and caption from the web
    "laion": Source("pair", TarReader(), web=True),
    "cc_sbu": Source("pair", TarReader(), web=True),
    # stage 3
    "cc_sbu_align": Source("align", AnnotationReader(entries.align, ("filter_cap.json",), "annotations", _ALIGN)),
    # stage 4: conversations
    "llava_conversation": Source(
        "conversation", AnnotationReader(entries.llava_conversation, ("conversation_58k.json",), images=COCO)
    ),
    "llava_detail": Source("instruct", AnnotationReader(entries.llava_single, ("detail_23k.json",), images=COCO)),
    "llava_reason": Source(
        "instruct", AnnotationReader(entries.llava_single, ("complex_reasoning_77k.json",), images=COCO)
    ),
    "multitask_conversation": Source(
        "conversation", AnnotationReader(entries.llava_conversation, ("multitask_conversation.json",), images=COCO)
    ),
    "unnatural_instruction": Source(
        "text",
        AnnotationReader(
            entries.unnatural, ("filtered_unnatural_instruction.json", "{full,core}_data.{jsonl,jsonl.gz,json}")
        ),
    ),
    # stage 4: boxes
    "refcoco": Source("refer", _REFCOCO),
    "refcocop": Source("refer", _REFCOCO_PLUS),
    "refcocog": Source("refer", _REFCOCOG),
    "invrefcoco": Source("identify", _REFCOCO),
    "invrefcocop": Source("identify", _REFCOCO_PLUS),
    "invrefcocog": Source("identify", _REFCOCOG),
    "refvg": Source("refer", VisualGenomeReader()),
    "flickr_grounded_caption": Source(
        "grounding", AnnotationReader(entries.grounded_caption, ("groundedcaption.json",), images=_FLICKR)
    ),
    "flickr_CaptionToPhrase": Source(
        "detection", AnnotationReader(entries.caption_to_phrase, ("captiontobbox.json",), images=_FLICKR)
    ),
    "flickr_ObjectToPhrase": Source(
        "detection", AnnotationReader(entries.object_to_phrase, ("phrasetobbox.json",), images=_FLICKR)
    ),
    # stage 4: captions and questions
    "coco_caption": Source(
        "caption",
        AnnotationReader(
            entries.coco_caption,
            ("coco_karpathy_train.json", "captions_train2014.json", "captions_train2017.json"),
            "annotations",
            COCO,
        ),
    ),
    "textcaps_caption": Source(
        "caption", AnnotationReader(entries.textcaps, ("TextCaps_0.1_train.json",), "data", _TEXTCAPS)
    ),
    "coco_vqa": Source(
        "vqa",
        AnnotationReader(
            entries.vqa("answer"),
            ("vqa_{train,val}.json", "v2_OpenEnded_mscoco_train2014_questions.json"),
            images=COCO,
        ),
    ),
    "ok_vqa": Source(
        "vqa",
        AnnotationReader(
            entries.vqa("answer"), ("okvqa_train.json", "OpenEnded_mscoco_train2014_questions.json"), images=COCO
        ),
    ),
    "aok_vqa": Source("vqa", AnnotationReader(entries.vqa("direct_answers"), ("aokvqa_v1p0_train.json",), images=COCO)),
    "gqa": Source(
        "vqa",
        AnnotationReader(entries.vqa("answer"), ("train_balanced_questions.json",), images=_GQA),
    ),
    "ocrvqa": Source("vqa", AnnotationReader(entries.ocrvqa, ("dataset.json",), images=_OCRVQA)),
    # one's own data
    "webdataset": Source(
        "",
        TarReader(
            ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tiff", "tif", "jpe", "jfif", "mpo", "apng"), ("json", "txt")
        ),
        web=True,
    ),
    "jsonl": Source("", JsonRowsReader()),
    "csv": Source("", DelimitedReader()),
    "hf": Source("", TableReader()),
    "parquet": Source("", TableReader()),
}
"""Data set name -> how it is read."""


def locate(settings: PrepareDataSettings) -> tuple[Source, SourceInput]:
    """The source that the settings name, and its input.

    Raises:
        SettingsError: there is no such source, or a key does not fit it.
    """
    name = settings.source
    if name not in SOURCES:
        raise SettingsError(f"source={name!r} is no known data set; {near_match(name, SOURCES)}")
    source = SOURCES[name]
    if settings.task and source.task:
        raise SettingsError(f"task={settings.task!r} is only for own data; source={name} has the task {source.task!r}.")
    if settings.task and settings.task not in INSTRUCTIONS:
        raise SettingsError(f"task={settings.task!r} is unknown; known: {', '.join(INSTRUCTIONS)}.")
    if settings.split != "train" and source.task:
        raise SettingsError(f"split={settings.split!r} is only for own data; source={name} reads what is for training.")
    task = settings.task or source.task
    return source, SourceInput(name, settings.input, settings.images, settings.name or name, task, settings.split)
