"""Processor: images and chat turns to model inputs, the transformers way.

``TinyGPTVProcessor`` owns the tokenizer, the image side and the template of a checkpoint. Prompts are laid out by
``prompt_layout``, as in training.

Notation: B prompts, S sequence, N images, R image side.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin

from tinygptv.config import TinyGPTVConfig
from tinygptv.data.chat_messages import load_images, read_messages
from tinygptv.data.chat_template import jinja_template
from tinygptv.data.conversation import ChatMessage, conversation_exchanges, join_messages
from tinygptv.data.images import load_image, normalise_pixels, stack_pixels
from tinygptv.data.prompt_layout import Exchange, PromptLayout, TurnIds
from tinygptv.data.prompts import IMAGE_PLACEHOLDER, TEMPLATES


class TinyGPTVImageProcessor(BaseImageProcessor):
    """Resize to R x R (bicubic, aspect ratio not kept), scale to 0..1, normalise with CLIP's statistics."""

    model_input_names = ["pixel_values"]

    def __init__(self, image_size: int = 224, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Make ``pixel_values``.

        Args:
            images: one image or a (nested) list of them, each in any form that ``images.load_image`` takes.
            kwargs: ``return_tensors`` (``"pt"`` or ``"np"``); others are ignored.

        Returns:
            ``pixel_values`` float32 [N, 3, R, R].

        Raises:
            ValueError: something is no image.
        """
        pixels = stack_pixels([load_image(image) for image in flatten_images(images)], self.image_size)
        return BatchFeature({"pixel_values": normalise_pixels(pixels)}, tensor_type=kwargs.get("return_tensors"))


def flatten_images(images: Any) -> list[Any]:
    """One image, an array of several, or lists of these in lists -> a flat list."""
    if isinstance(images, list | tuple):
        return [image for item in images for image in flatten_images(item)]
    if not isinstance(images, str | bytes | os.PathLike | Image.Image) and np.ndim(images) > 3:
        return [image for item in images for image in flatten_images(item)]
    return [] if images is None else [images]


class TinyGPTVProcessor(ProcessorMixin):
    """Tokenizer and image processor of a checkpoint.

    Attributes:
        num_query_tokens: positions that one ``<ImageHere>`` takes (Q).
        image_token_id: id that fills them.
        template: key of ``prompts.TEMPLATES``; ``chat_template`` is written from it, whatever a folder holds.
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
        complete_special_tokens(tokenizer)
        tokenizer.padding_side = "left"  # for those who pad by the tokenizer's word, as transformers' pipelines do
        super().__init__(image_processor, tokenizer, chat_template=jinja_template(TEMPLATES[template]))

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

    @staticmethod
    def _is_own(chat_template: Any) -> bool:
        return any(chat_template == jinja_template(template) for template in TEMPLATES.values())

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does; the Jinja template follows ``template``."""
        if self._is_own(self.chat_template):
            self.chat_template = jinja_template(TEMPLATES[self.template])
        return super().save_pretrained(*args, **kwargs)

    @property
    def end_symbol(self) -> str:
        """Text at which an answer ends."""
        return TEMPLATES[self.template].end_symbol

    def layout(self, template: str | None = None) -> PromptLayout:
        """The prompt layout of this checkpoint's template, or of another one.

        Args:
            template: key of ``prompts.TEMPLATES``.
        """
        return PromptLayout(
            self.tokenizer,
            TEMPLATES[template or self.template],
            image_token_id=self.image_token_id,
            num_query_tokens=self.num_query_tokens,
        )

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

    # ------------------------------------------------------------------ inputs

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Make model inputs from prompts.

        Args:
            images: images of all prompts in order, flat or one list per prompt; None for text only.
            text: one prompt or several. A prompt that ``apply_chat_template`` wrote, or that holds ``<ImageHere>`` for
                each image, is taken as it is. Plain words that come with images are asked as one question about them.
            kwargs: ``padding_side`` (default left, as generation needs), ``return_tensors`` (default ``"pt"``); others
                are ignored.

        Returns:
            ``input_ids`` and ``attention_mask`` [B, S]; ``pixel_values`` [N, 3, R, R] where images were given.

        Raises:
            ValueError: the prompts hold another number of ``<ImageHere>`` than there are images.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        flat = flatten_images(images)
        layout = self.layout()
        if texts and flat and not any(IMAGE_PLACEHOLDER in one for one in texts):
            counts = _images_per_text(images, len(flat), len(texts))
            texts = [layout.add_images(one, count) for one, count in zip(texts, counts, strict=True)]
        num_placeholders = sum(one.count(IMAGE_PLACEHOLDER) for one in texts)
        if texts and len(flat) != num_placeholders:
            raise ValueError(
                f"the text has {num_placeholders} {IMAGE_PLACEHOLDER} but {len(flat)} images were given: "
                "write one placeholder per image, or none at all."
            )
        rows = [layout.encode_rendered(one) for one in texts]
        return self._features(rows, flat, kwargs.get("padding_side", "left"), kwargs.get("return_tensors", "pt"))

    def _features(self, rows: Sequence[Sequence[int]], images: Sequence[Any], side: str, tensors: Any) -> BatchFeature:
        data: dict[str, Any] = dict(self.pad(rows, side)) if rows else {}
        if images:
            data.update(self.image_processor(list(images), return_tensors="np"))
        return BatchFeature(data, tensor_type=tensors)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        return_tensors: str | None = "pt",
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Lay out a conversation, or a list of conversations, as the model was trained on it.

        System messages go before the first question, neighbouring messages of one role become one, and what looks like
        a special token in a message becomes ordinary words (``conversation.join_messages``, ``prompt_layout``).

        Args:
            conversation: messages as ``chat_messages.read_messages`` takes them, or a list of such lists.
            chat_template: a Jinja template of one's own; the rest is then as in transformers.
            tokenize: give ids; False gives text with ``<ImageHere>`` for each image.
            return_dict: with ``tokenize``, give ``input_ids``, ``attention_mask`` and ``pixel_values``, not ids alone.
            add_generation_prompt: after an answer, ask for another one by an empty question. (After a question the
                prompt is the same without: the words that call for an answer belong to the question's wrapping.)
            continue_final_message: leave the last answer open, for the model to continue.
            return_assistant_tokens_mask: with ``return_dict``, also give ``assistant_masks`` [B, S]: 1 on the tokens of
                answers and their end symbols.
            return_tensors: ``"pt"`` or ``"np"``.
            processor_kwargs: ``images`` for image parts that name none; ``padding_side``.
            kwargs: as ``processor_kwargs``; others are ignored.

        Returns:
            Text (one per conversation), or ids [B, S], or the model's inputs.

        Raises:
            ValueError: a message is malformed, roles do not fit, or an image cannot be loaded.
        """
        if chat_template is not None or not self._is_own(self.chat_template):
            return super().apply_chat_template(
                list(conversation),
                chat_template,
                tokenize=tokenize,
                return_dict=return_dict,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                return_tensors=return_tensors,
                processor_kwargs=dict(processor_kwargs or {}),
                **kwargs,
            )
        is_batch = bool(conversation) and isinstance(conversation[0], list | tuple)
        conversations = [join_messages(read_messages(c)) for c in (conversation if is_batch else [conversation])]
        turns = [_turns(messages, add_generation_prompt, continue_final_message) for messages in conversations]
        layout = self.layout()
        if not tokenize:
            texts = [layout.render(exchanges) for exchanges in turns]
            return texts if is_batch else texts[0]
        options = {**kwargs, **(processor_kwargs or {})}
        images: list[Image.Image] = []
        if return_dict:
            images = load_images([m for c in conversations for m in c], flatten_images(options.get("images")))
        rows = [layout.encode_prompt(exchanges) for exchanges in turns]
        side = options.get("padding_side", "left")
        features = self._features(rows, images, side, return_tensors)
        if return_assistant_tokens_mask:
            masks = [_answer_mask(layout.encode_turns(exchanges)) for exchanges in turns]
            padded = self.pad(masks, side, fill=0)["input_ids"]
            features.update(BatchFeature({"assistant_masks": padded}, tensor_type=return_tensors))
        return features if return_dict else features["input_ids"]

    def pad(self, rows: Sequence[Sequence[int]], side: str = "left", fill: int | None = None) -> dict[str, np.ndarray]:
        """Pad rows of ids to one length, with the tokenizer's padding or another id; the mask is 0 on padding."""
        length = max(len(row) for row in rows)
        input_ids = np.full((len(rows), length), self.tokenizer.pad_token_id if fill is None else fill, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for i, row in enumerate(rows):
            columns = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            input_ids[i, columns] = row
            attention_mask[i, columns] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    # ------------------------------------------------------------------ answers

    def decode_answer(self, token_ids: Sequence[int] | torch.Tensor) -> str:
        """Text of generated ids (without the prompt's), cut at the end symbol."""
        return TEMPLATES[self.template].cut_answer(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer's ``decode``, without the end symbol at the end of an answer."""
        text = self.tokenizer.decode(*args, **kwargs)
        return self._without_end(text) if isinstance(text, str) else [self._without_end(one) for one in text]

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's ``batch_decode``, without the end symbol at the end of an answer."""
        return [self._without_end(text) for text in self.tokenizer.batch_decode(*args, **kwargs)]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Texts of generated ids [B, S], as transformers' pipelines ask for them; no end symbol at the end."""
        texts: list[str] = self.decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return texts

    def _without_end(self, text: str) -> str:
        end = self.end_symbol
        special = "|".join(re.escape(token) for token in self.tokenizer.all_special_tokens)
        # The last token may hold more than the symbol ("####"), and padding may follow it.
        return re.sub(rf"{re.escape(end)}{re.escape(end[-1])}*\s*((?:{special})*)\Z", r"\1", text)


def _turns(
    messages: Sequence[ChatMessage[Any]], add_generation_prompt: bool, continue_final_message: bool
) -> list[Exchange]:
    """Exchanges of one conversation, which ends as the caller says."""
    exchanges = conversation_exchanges(messages)
    has_answer = exchanges[-1].answer is not None
    if continue_final_message and (add_generation_prompt or not has_answer):
        raise ValueError("continue_final_message needs a last message of the assistant, without add_generation_prompt.")
    if continue_final_message:
        exchanges[-1] = replace(exchanges[-1], is_complete=False)
    if add_generation_prompt and has_answer:
        exchanges.append(Exchange(""))
    return exchanges


def _answer_mask(turns: Sequence[TurnIds]) -> list[int]:
    """1 on the tokens of answers, 0 on the others."""
    return [m for t in turns for m in [0] * (len(t.bos) + len(t.question)) + [1] * len(t.answer or ())]


def _images_per_text(images: Any, num_images: int, num_texts: int) -> list[int]:
    """Images of each plain prompt: all of one, one each, or as the lists say."""
    if num_texts == 1:
        return [num_images]
    if isinstance(images, list | tuple) and len(images) == num_texts:
        return [len(flatten_images(own)) for own in images]
    if num_images == num_texts:
        return [1] * num_texts
    raise ValueError(f"{num_images} images were given for {num_texts} texts: give a list of images per text.")


def _can_be_piece(text: str, symbol: str) -> bool:
    """Whether a symbol can be put together with this text: inside of it, at its start or at its end."""
    cuts = range(1, len(symbol))
    return text != "" and (
        text in symbol
        or any(text.endswith(symbol[:cut]) for cut in cuts)
        or any(text.startswith(symbol[cut:]) for cut in cuts)
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer folder; where it names no BOS, EOS or PAD (Phi-2's names none), ``<|endoftext|>`` is all three.

    Raises:
        ValueError: the folder holds no tokenizer, or one without these tokens.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare exceptions on damaged files
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"the tokenizer in {path} needs code of its own (auto_map), which is never run."
            ) from error
        raise ValueError(
            f"no tokenizer in {path}, or a damaged one: it needs tokenizer.json, or vocab.json and merges.txt."
        ) from error
    try:
        complete_special_tokens(tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tokenizer


def complete_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Fill in BOS, EOS and PAD where a tokenizer names none, in place; in the release all three are one token.

    Raises:
        ValueError: the tokenizer has no token that could be one of them.
    """
    fallback = tokenizer.eos_token or tokenizer.bos_token or "<|endoftext|>"
    for role in ("bos_token", "eos_token", "pad_token"):
        token = getattr(tokenizer, role) or fallback
        if token not in tokenizer.get_vocab():
            raise ValueError(
                f"the tokenizer names {getattr(tokenizer, role)!r} as {role}, and {token!r} is not in its vocabulary: "
                f"set {role} in tokenizer_config.json."
            )
        if getattr(tokenizer, role) is None:
            setattr(tokenizer, role, token)


AutoImageProcessor.register(
    TinyGPTVConfig,
    slow_image_processor_class=TinyGPTVImageProcessor,
    fast_image_processor_class=TinyGPTVImageProcessor,
)
AutoProcessor.register(TinyGPTVConfig, TinyGPTVProcessor)
