"""``generate`` of transformers, with images and with end symbols of several tokens.

Images are encoded once, before the first step, and merged into the prompt's embeddings in that step alone: beams,
cached steps and candidate decoding (assistant model, prompt lookup) never see pixels again.

An answer ends at its template's end symbol (``###``, a newline), which a model may write as one token or as several.
Single tokens that hold the symbol are ``generation_config.eos_token_id``; the pieces of which it can also be put
together are ``generation_config.end_pieces``. ``TinyGPTVProcessor.set_end_symbol`` fills in both when a checkpoint is
saved.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import LongTensor, Tensor
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin, StoppingCriteria, StoppingCriteriaList

IMAGE_INPUTS = ("pixel_values", "query_features", "image_embeds")
"""Arguments of ``forward`` that hold images, one row each, in the order of their placeholders."""


class EndSymbolCriteria(StoppingCriteria):
    """Stops a row when its new tokens spell the end symbol, however it is cut into tokens.

    Attributes:
        end_symbol: the text.
        pieces: token id -> text, of every token that can be a part of it.
    """

    def __init__(self, end_symbol: str, pieces: dict[int, str]) -> None:
        self.end_symbol = end_symbol
        self.pieces = pieces
        self.next_position: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Rows [B] that end in a piece which completes the end symbol."""
        length = input_ids.shape[1]
        if self.next_position is None:
            self.start = self.next_position = length - kwargs.get("new_token_length", 1)
        first = max(self.start, self.next_position - len(self.end_symbol) + 1)
        self.next_position = length
        texts = ("".join(self.pieces.get(token, "\0") for token in row) for row in input_ids[:, first:].tolist())
        return torch.tensor([self.end_symbol in text for text in texts], device=input_ids.device)


class ImageGenerationMixin(GenerationMixin):
    """``generate`` for a model whose ``forward`` takes the arguments ``IMAGE_INPUTS``."""

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """``generate`` of transformers (greedy, sampling, beams, assistant models, streamers), with images.

        Args:
            inputs: [B, S] ids (also as ``input_ids=``); batches of unequal prompts are padded on the left.
            args: passed on.
            kwargs: passed on. Images come as ``pixel_values`` [N, 3, R, R], or as ``query_features`` [N, Q, F], or as
                ``image_embeds`` [N, Q, D], in batch order.

        Returns:
            Ids [B, S + new], as transformers does for a decoder that is given ids.
        """
        if inputs is not None:
            kwargs["input_ids"] = inputs
        kwargs = {name: value for name, value in kwargs.items() if name not in IMAGE_INPUTS or value is not None}
        cache = kwargs.get("past_key_values")
        # An assistant model encodes the same pixels its own way, so they stay pixels for it; what the cache holds
        # already is not encoded again.
        if kwargs.get("assistant_model") is None and (cache is None or not cache.get_seq_length()):
            if "pixel_values" in kwargs:
                kwargs["image_embeds"] = self.encode_images(kwargs.pop("pixel_values"))
            elif "query_features" in kwargs:
                kwargs["image_embeds"] = self.projector(kwargs.pop("query_features"))
        criteria = self._end_criteria(kwargs.get("generation_config"))
        if criteria:
            kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), criteria])
        return super().generate(*args, **kwargs)

    def _end_criteria(self, generation_config: Any) -> EndSymbolCriteria | None:
        for settings in (generation_config, self.generation_config):
            pieces = getattr(settings, "end_pieces", None)
            if pieces:
                return EndSymbolCriteria(settings.end_symbol, {int(token): text for token, text in pieces.items()})
        return None

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one forward pass: images go in with the tokens that they belong to, and no other.

        Args:
            input_ids: [B, S] all ids so far.
            next_sequence_length: ids of the end that this pass computes; None for all.
            past_key_values: cache that holds the ids before those.
            attention_mask: [B, S], 1 for real positions.
            inputs_embeds: [B, S, D] an assembled prompt, read in the first pass instead of ids.
            is_first_iteration: the pass that reads the prompt.
            kwargs: the other arguments of ``forward``.
        """
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
        model_inputs = super().prepare_inputs_for_generation(
            cast(LongTensor, input_ids),
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=cast(LongTensor | None, attention_mask),
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        ids = model_inputs.get("input_ids")
        if ids is None:
            return model_inputs
        if is_first_iteration or not kwargs.get("use_cache", True):
            for name, value in images.items():
                model_inputs["input_ids"], shown = self._shown_images(input_ids, ids, value)
                if len(shown):
                    model_inputs[name] = shown
        else:
            # Candidates that are copied out of the prompt may hold image positions; no image can follow the prompt.
            pad = self.config.text_config.pad_token_id or 0
            model_inputs["input_ids"] = ids.masked_fill(ids == self.config.image_token_id, pad)
        return model_inputs

    def _shown_images(self, all_ids: Tensor, ids: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The images whose positions are among ``ids``, the last columns of ``all_ids``.

        Returns:
            ``ids``, where image positions that a candidate copied out of the prompt are padding; and the images.
        """
        token, num_queries = self.config.image_token_id, self.config.num_query_tokens
        all_counts, counts = ((x == token).sum(1) for x in (all_ids, ids))
        if len(ids) == 1:
            allowed = len(images) * num_queries - (all_counts - counts)
            is_image = ids == token
            ids = ids.masked_fill(is_image & (is_image.cumsum(1) > allowed), self.config.text_config.pad_token_id or 0)
            all_counts, counts = all_counts.clamp(max=len(images) * num_queries), counts.minimum(allowed)
        if int(counts.sum()) == len(images) * num_queries:
            return ids, images
        rows = self._images_per_row(all_counts, images)
        shown = [row[len(row) - int(count) // num_queries :] for row, count in zip(rows, counts, strict=True)]
        return ids, torch.cat(shown)

    def _images_per_row(self, counts: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        per_row = (counts // self.config.num_query_tokens).tolist()
        if sum(per_row) != len(images):
            raise ValueError(
                f"the prompts have positions for {sum(per_row)} images but {len(images)} were given: each <ImageHere> "
                "needs exactly one image."
            )
        return images.split(per_row)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[LongTensor, dict[str, Any]]:
        """Repeat each row for its beams or samples, and with it the images of that row."""
        images = {name: model_kwargs.pop(name) for name in IMAGE_INPUTS if name in model_kwargs}
        if expand_size > 1 and input_ids is not None:
            counts = (input_ids == self.config.image_token_id).sum(1)
            images = {
                name: torch.cat([row for row in self._images_per_row(counts, value) for _ in range(expand_size)])
                for name, value in images.items()
            }
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **images}
