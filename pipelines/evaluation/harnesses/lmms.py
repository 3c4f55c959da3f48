"""TinyGPT-V in lmms-eval, as the model ``tinygptv`` (entry point group ``lmms_eval.models``).

python -m lmms_eval --model tinygptv --model_args checkpoint=DIR,threads=2 --tasks pope --batch_size 64
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from pipelines.evaluation.harnesses.in_process import HarnessQuestion, InProcessModel

MANIFEST = ModelManifest("tinygptv", simple_class_path=f"{__name__}.TinyGPTV")
"""Entry point through which lmms-eval finds the class."""

_MAX_NEW_TOKENS = 64


class TinyGPTV(lmms):
    """Answers lmms-eval's requests in process; greedy, one image per question."""

    is_simple = True

    def __init__(
        self,
        checkpoint: str,
        device: str = "cpu",
        batch_size: int | str = 64,
        max_batch_size: int | None = None,
        threads: int = 0,
        tag: str = "[vqa] ",
    ) -> None:
        """Load the model; arguments as in ``--model_args``, the first of them is required."""
        super().__init__()
        self.model = InProcessModel(
            str(checkpoint), device=device or "cpu", batch_size=int(batch_size), threads=int(threads), tag=tag
        )

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers to requests of ``(context, settings, image of a document, document, task, split)``."""
        questions = []
        for context, settings, to_visual, document, task, split in (request.args for request in requests):
            until = settings.get("until") or ()
            questions.append(
                HarnessQuestion(
                    context,
                    self._image(to_visual, document, task, split),
                    int(settings.get("max_new_tokens", _MAX_NEW_TOKENS)),
                    (until,) if isinstance(until, str) else tuple(until),
                )
            )
        return self.model.answer(questions)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's continuation, and whether the greedy answer is the same."""
        questions, continuations = [], []
        for context, target, to_visual, document, task, split in (request.args for request in requests):
            questions.append(HarnessQuestion(context, self._image(to_visual, document, task, split)))
            continuations.append(target if isinstance(target, str) else target(self.task_dict[task][split][document]))
        return self.model.log_likelihoods(questions, continuations)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises NotImplementedError: a question of several rounds goes through the endpoint."""
        raise NotImplementedError("tinygptv answers single questions; for several rounds use lmms-eval's openai model.")

    def _image(self, to_visual: Any, document: Any, task: str, split: str) -> Any:
        visuals = to_visual(self.task_dict[task][split][document]) if to_visual else None
        visuals = visuals or []
        if len(visuals) > 1:
            raise ValueError(f"task {task}, document {document}, has {len(visuals)} images: tinygptv takes one.")
        return visuals[0] if visuals else None
