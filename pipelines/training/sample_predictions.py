"""Sample predictions: the answers of the model in training to a few rows, held-out ones where there are some."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from PIL.Image import Image

from pipelines.data.loader import BatchMaker
from tinygptv.data.images import normalise_pixels, open_image, resize_pixels
from tinygptv.data.mixture import SampleRef
from tinygptv.data.sample import chooser, render_sample
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.training.compilation import run_eagerly

MAX_SAMPLES = 4
_ROWS_PER_SOURCE = 2
_NEW_TOKENS = 48


@dataclass(frozen=True)
class SampleAnswer:
    """One answer of the model in training.

    Attributes:
        sample: ``source/id``.
        image: what was asked about; None for text only.
        question: instruction, as rendered.
        answer: greedy answer of the model.
        expected: answer of the data.
    """

    sample: str
    image: Image | None
    question: str
    answer: str
    expected: str


def _first_rows(maker: BatchMaker, name: str) -> list[int]:
    """Numbers of the first rows that are held out, or of the first ones."""
    held = maker.plan.held_out.get(name, ())
    found = held if len(held) else range(len(maker.shards[name]))
    return [int(row) for row in found[:_ROWS_PER_SOURCE]]


class SamplePredictor:
    """Answers the same few samples at each call."""

    def __init__(self, maker: BatchMaker) -> None:
        self.maker = maker
        rows = [_first_rows(maker, name) for name in maker.names]
        self.refs = [
            SampleRef(source, found[place], 0)
            for place in range(_ROWS_PER_SOURCE)
            for source, found in enumerate(rows)
            if place < len(found)
        ][:MAX_SAMPLES]

    def predict(self, model: TinyGPTVForConditionalGeneration) -> list[SampleAnswer]:
        """Greedy answers; the model is left in training mode."""
        model.eval()
        try:
            with torch.no_grad(), run_eagerly():
                return [self._predict(model, ref) for ref in self.refs]
        finally:
            model.train()

    def _predict(self, model: TinyGPTVForConditionalGeneration, ref: SampleRef) -> SampleAnswer:
        maker = self.maker
        name = maker.names[ref.source]
        row = maker.shards[name].row(ref.row)
        exchanges = render_sample(row, chooser(maker.mixture.generator(ref)))
        image = None if row.image is None else open_image(row.image)
        layout = maker.encoder.layout
        ids = layout.encode_prompt([replace(exchanges[0], answer=None)])
        input_ids = torch.tensor([ids], device=model.device)
        inputs: dict[str, torch.Tensor] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if image is not None:
            pixels = torch.from_numpy(resize_pixels(image, maker.plan.stage.image_size)).to(model.device)
            inputs["pixel_values"] = normalise_pixels(pixels).unsqueeze(0)
        output = model.generate(
            **inputs, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=maker.tokenizer.pad_token_id
        )
        text = maker.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        return SampleAnswer(
            sample=f"{name}/{row.id}",
            image=image,
            question=exchanges[0].instruction or "",
            answer=layout.template.cut_answer(str(text)),
            expected=exchanges[0].answer or "",
        )
