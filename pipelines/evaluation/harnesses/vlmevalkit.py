"""TinyGPT-V in VLMEvalKit: a model class for its table of models.

from functools import partial
from vlmeval.config import supported_VLM
from pipelines.evaluation.harnesses.vlmevalkit import TinyGPTV

supported_VLM["TinyGPT-V"] = partial(TinyGPTV, checkpoint="DIR")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from vlmeval.vlm.base import BaseModel

from pipelines.evaluation.harnesses.in_process import HarnessQuestion, InProcessModel


class TinyGPTV(BaseModel):
    """Answers VLMEvalKit's messages in process; greedy, the first image of a message."""

    INTERLEAVE = False

    def __init__(self, checkpoint: str, max_new_tokens: int = 64, **options: Any) -> None:
        """Load.

        Args:
            checkpoint: checkpoint or artifact folder.
            max_new_tokens: longest answer.
            options: of ``InProcessModel``.
        """
        super().__init__()
        self.model, self.max_new_tokens = InProcessModel(checkpoint, **options), max_new_tokens

    def generate_inner(self, message: Sequence[dict[str, str]], dataset: str | None = None) -> str:
        """Answer one message: a list of ``{"type": "image" | "text", "value": path or text}``."""
        text, path = self.message_to_promptimg(message, dataset=dataset)
        image = Image.open(path) if path else None
        return self.model.answer([HarnessQuestion(text, image, self.max_new_tokens)])[0]
