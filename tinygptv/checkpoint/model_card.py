"""The README.md of a checkpoint folder: what it is, how it was made, how to use it, whose weights are in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinygptv.checkpoint.stage_record import StageRecord

if TYPE_CHECKING:
    from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [tinygpt-v, vision-language]
---
# TinyGPT-V checkpoint

{summary}

| | |
|---|---|
{rows}

## Use

```python
import tinygptv  # registers the classes
from transformers import pipeline

chat = pipeline("image-text-to-text", model="path/of/this/folder")
```

Answers end with `{end_symbol!r}`. Task tags in the instruction choose the kind of answer: `[vqa]`, `[caption]`,
`[refer]`, `[identify]`, `[grounding]`, `[detection]`.

## Licences

The folder contains weights derived from the parts it was started from. At the paper's scale these are EVA ViT-g and
BLIP-2's Q-Former (BSD-3-Clause), Phi-2 (MIT) and MiniGPT-4's projection (BSD-3-Clause); the data sets of the stages
have licences of their own (LLaVA-Instruct is CC BY-NC 4.0). The miniature's weights come with this project under
BSD-3-Clause.
"""


def model_card(model: TinyGPTVForConditionalGeneration, stage: StageRecord) -> str:
    """Markdown for a checkpoint folder.

    Args:
        model: the model that is saved.
        stage: the content of ``stage.json``.
    """
    from tinygptv.data.prompts import TEMPLATES

    total = sum(p.numel() for p in model.parameters())
    vision, text = model.config.vision_config, model.config.text_config
    fields = {
        "parameters": f"{total:,}",
        "image side": f"{vision.image_size} px",
        "query tokens per image": model.config.num_query_tokens,
        "language model": f"{text.num_hidden_layers} layers of width {text.hidden_size}",
        "LoRA rank": model.config.lora_rank or "merged or none",
        "template": model.config.template,
        **{key: value for key, value in stage.items() if isinstance(value, str | int | float)},
    }
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in fields.items())
    number = stage.get("stage")
    summary = (
        f"Made by stage {number} of the recipe `{stage.get('recipe')}`."
        if number
        else "Converted or pretrained weights."
    )
    return _CARD.format(summary=summary, rows=rows, end_symbol=TEMPLATES[model.config.template].end_symbol)
