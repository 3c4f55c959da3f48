"""Processor: images and chat turns to model inputs, the transformers way.

``TinyGPTVProcessor`` owns the tokenizer, the image side and the chat template of a checkpoint. Text is laid out exactly
as in training (``sample.SampleEncoder``): same template, same BOS, pieces around an image tokenised on their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ProcessorMixin

from tinygptv.config import TinyGPTVConfig
from tinygptv.data.images import normalise_pixels, open_image, stack_pixels, to_rgb
from tinygptv.data.prompts import IMAGE_PLACEHOLDER, TEMPLATES
from tinygptv.data.sample import SampleEncoder, TextLimits


class TinyGPTVImageProcessor(BaseImageProcessor):
    """Resize to R x R (bicubic, aspect ratio not kept), scale to 0..1, normalise with CLIP's statistics."""

    model_input_names = ["pixel_values"]

    def __init__(self, image_size: int = 224, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Make ``pixel_values``.

        Args:
            images: one image or a (nested) list: PIL images, arrays [H, W, 3] or [3, H, W], or encoded bytes.
            kwargs: ``return_tensors`` (``"pt"`` or ``"np"``); others are ignored.

        Returns:
            ``pixel_values`` float32 [N, 3, R, R].
        """
        flat = [images] if isinstance(images, bytes) else images
        if not (isinstance(flat, list) and flat and isinstance(flat[0], bytes)):
            flat = make_flat_list_of_images(cast(Any, flat))
        pixels = stack_pixels([_as_pil(image) for image in flat], self.image_size)
        return BatchFeature({"pixel_values": normalise_pixels(pixels)}, tensor_type=kwargs.get("return_tensors"))


def _as_pil(image: Any) -> Image.Image:
    if isinstance(image, bytes):
        return open_image(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8:
        array = np.clip(array * 255.0 if array.max(initial=0.0) <= 1.0 else array, 0, 255).astype(np.uint8)
    return to_rgb(Image.fromarray(array.squeeze()))


class TinyGPTVProcessor(ProcessorMixin):
    """Tokenizer and image processor of a checkpoint.

    Attributes:
        num_query_tokens: positions that one ``<ImageHere>`` takes (Q).
        image_token_id: id that fills them.
        template: key of ``prompts.TEMPLATES``.
    """

    def __init__(
        self,
        image_processor: TinyGPTVImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        num_query_tokens: int = 32,
        image_token_id: int = 50295,
        template: str = "human",
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_query_tokens = num_query_tokens
        self.image_token_id = image_token_id
        self.template = template
        self.image_token = IMAGE_PLACEHOLDER
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"  # for those who pad by the tokenizer's word, as transformers' pipelines do
        super().__init__(image_processor, tokenizer, chat_template=chat_template or TEMPLATES[template].chat_template)

    @classmethod
    def from_config(cls, config: TinyGPTVConfig, tokenizer: PreTrainedTokenizerBase) -> TinyGPTVProcessor:
        """The processor that fits a model configuration."""
        return cls(
            TinyGPTVImageProcessor(config.vision_config.image_size),
            tokenizer,
            num_query_tokens=config.num_query_tokens,
            image_token_id=config.image_token_id,
            template=config.template,
        )

    @property
    def end_symbol(self) -> str:
        """Text at which an answer ends."""
        return TEMPLATES[self.template].end_symbol

    def set_end_symbol(self, generation_config: GenerationConfig) -> None:
        """Let ``generate`` stop at the template's end symbol, whether it comes as one token or in pieces, in place.

        Args:
            generation_config: the model's; gets ``eos_token_id``, ``pad_token_id``, ``end_symbol`` and ``end_pieces``.
        """
        symbol = self.end_symbol
        letters = set("".join(self.tokenizer.tokenize(symbol)))
        written = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        tokens = [token for token, text in enumerate(written) if letters & set(text or "")]
        texts = {token: self.tokenizer.decode([token]) for token in tokens}
        whole = [token for token, text in texts.items() if symbol in text]
        generation_config._from_model_config = False  # else transformers forgets what it does not know itself
        generation_config.eos_token_id = sorted({self.tokenizer.eos_token_id, *whole})
        generation_config.pad_token_id = self.tokenizer.pad_token_id
        generation_config.end_symbol = symbol
        generation_config.end_pieces = {
            token: text for token, text in texts.items() if symbol not in text and _can_be_piece(text, symbol)
        }

    def encoder(self, limits: TextLimits | None = None) -> SampleEncoder:
        """The sequence layout of this checkpoint's template."""
        return SampleEncoder(
            self.tokenizer,
            TEMPLATES[self.template],
            limits or TextLimits(self.tokenizer.model_max_length),
            image_token_id=self.image_token_id,
            num_query_tokens=self.num_query_tokens,
        )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Make model inputs from ready prompts (see ``apply_chat_template`` for turns).

        Args:
            images: images of all prompts in order, flat or nested; None for text only.
            text: one prompt or several, with ``<ImageHere>`` for each image.
            kwargs: ``padding_side`` (default left, as generation needs), ``return_tensors`` (default ``"pt"``).

        Returns:
            ``input_ids`` and ``attention_mask`` [B, S]; ``pixel_values`` [N, 3, R, R] where images were given.

        Raises:
            ValueError: the prompts hold another number of ``<ImageHere>`` than there are images.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        encoder = self.encoder()
        rows = [encoder.encode_text(one, one.count(IMAGE_PLACEHOLDER)) for one in texts]
        data: dict[str, Any] = dict(self.pad(rows, kwargs.get("padding_side", "left"))) if rows else {}
        num_placeholders = sum(one.count(IMAGE_PLACEHOLDER) for one in texts)
        num_images = 0
        if images is not None:
            data.update(self.image_processor(images, return_tensors="np"))
            num_images = len(data["pixel_values"])
        if texts and num_images != num_placeholders:
            raise ValueError(
                f"the text has {num_placeholders} {IMAGE_PLACEHOLDER} but {num_images} images were given: "
                "write one placeholder per image."
            )
        return BatchFeature(data, tensor_type=kwargs.get("return_tensors", "pt"))

    def pad(self, rows: Sequence[Sequence[int]], side: str = "left") -> dict[str, np.ndarray]:
        """Pad rows of ids to one length; the mask is 0 on padding."""
        length = max(len(row) for row in rows)
        input_ids = np.full((len(rows), length), self.tokenizer.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for i, row in enumerate(rows):
            place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            input_ids[i, place] = row
            attention_mask[i, place] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def decode_answer(self, token_ids: Sequence[int] | torch.Tensor) -> str:
        """Text of generated ids, cut at the end symbol."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text.split(self.end_symbol)[0].strip()


def _can_be_piece(text: str, symbol: str) -> bool:
    """Whether a symbol can be put together with this text: inside of it, at its start or at its end."""
    cuts = range(1, len(symbol))
    return text != "" and (
        text in symbol
        or any(text.endswith(symbol[:cut]) for cut in cuts)
        or any(text.startswith(symbol[cut:]) for cut in cuts)
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer folder, with ``<|endoftext|>`` as BOS, EOS and PAD where the folder names none (Phi-2's do not).

    Raises:
        ValueError: the folder holds no tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer in {path}: it needs tokenizer.json, or vocab.json and merges.txt.") from error
    for role in ("bos_token", "eos_token", "pad_token"):
        if getattr(tokenizer, role) is None:
            setattr(tokenizer, role, "<|endoftext|>")
    return tokenizer


AutoImageProcessor.register(
    TinyGPTVConfig,
    slow_image_processor_class=TinyGPTVImageProcessor,
    fast_image_processor_class=TinyGPTVImageProcessor,
)
AutoProcessor.register(TinyGPTVConfig, TinyGPTVProcessor)
