"""A model that answers conversations with images: tokenizer, image encoder and engine put together.

assistant = Assistant.load("outputs/stage4")
message = ChatMessage("user", "[vqa] what colour is the ball?", (assistant.open(image_bytes),))
for delta in assistant.iterate([message]):
    print(delta.text, end="", flush=True)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinygptv.data.conversation import ChatImage, ChatMessage, encode_conversation
from tinygptv.data.processing import TinyGPTVProcessor
from tinygptv.inference.engine import Engine
from tinygptv.inference.engine_thread import EngineLoop
from tinygptv.inference.image_encoder import ImageEncoder
from tinygptv.inference.loading import load_for_inference
from tinygptv.inference.request import Delta, EngineStats, PromptTooLong, Request
from tinygptv.inference.sampling import SamplingParams
from tinygptv.inference.text_stream import TokenBytes
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

MAX_CHARACTERS_PER_TOKEN = 128
"""No text is longer than this times its tokens (the length of Phi-2's longest token); a bound before tokenizing."""


class Assistant:
    """Answers many conversations at once."""

    def __init__(
        self,
        model: TinyGPTVForConditionalGeneration,
        processor: TinyGPTVProcessor,
        *,
        max_batch_size: int = 16,
        context_length: int = 0,
        prefill_tokens: int = 128,
        kv_cache_dtype: str = "auto",
        kept_images: int = 256,
    ) -> None:
        """Start the engine and the image encoder.

        Args:
            model: in evaluation mode.
            processor: its processor.
            max_batch_size: answers generated together.
            context_length: most tokens of prompt and answer; 0 takes the model's, at most 2,048.
            prefill_tokens: most prompt tokens read in a step while answers are being written.
            kv_cache_dtype: ``auto``, or ``bfloat16`` for half the memory on a CPU.
            kept_images: images whose embeddings are kept for later turns.
        """
        self.model, self.processor = model, processor
        self.max_batch_size = max_batch_size
        self.images = ImageEncoder(model, kept_images)
        self.engine = Engine(
            model,
            processor.tokenizer,
            max_batch_size=max_batch_size,
            context_length=context_length,
            prefill_tokens=prefill_tokens,
            kv_cache_dtype=kv_cache_dtype,
            stop=(processor.end_symbol,),
        )
        self.loop = EngineLoop(self.engine)
        # One thread: a fast tokenizer refuses concurrent use.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizing")
        self._layout = processor.layout()

    @classmethod
    def load(cls, path: str | Path, device: str = "auto", **options: Any) -> Assistant:
        """Load a checkpoint or artifact folder.

        Args:
            path: of the folder.
            device: ``cpu``, ``cuda``, or ``auto``: a CUDA card where there is one.
            options: those of the constructor.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model, processor = load_for_inference(path, device)
        return cls(model, processor, **options)

    def close(self) -> None:
        """Stop all threads."""
        self.loop.close()
        self.images.close()
        self._tokenizing.shutdown(wait=False)

    def check_health(self, stuck_after_s: float) -> None:
        """Raise where a thread that answers depend on has ended or is stuck.

        Args:
            stuck_after_s: longest time of one step or one batch of images, in seconds.

        Raises:
            ThreadFailure: the thread's name and what is wrong with it.
        """
        self.loop.thread.check(stuck_after_s)
        self.images.thread.check(stuck_after_s)

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer."""
        return self.engine.context_length

    @property
    def stats(self) -> EngineStats:
        """The engine's counters."""
        return self.engine.stats

    @property
    def token_bytes(self) -> TokenBytes:
        """The bytes of every token."""
        return self.engine.token_bytes

    def open(self, data: bytes) -> ChatImage:
        """Decode an image for this model.

        Raises:
            ValueError: the bytes are no image in a known format.
        """
        return ChatImage.from_bytes(data, self.images.image_size)

    # ------------------------------------------------------------------ answers

    async def prepare(
        self, messages: Sequence[ChatMessage[ChatImage]], params: SamplingParams, salt: int = 0
    ) -> Request:
        """Encode a conversation, off the event loop.

        Args:
            messages: user and assistant in turn; an answer at the end is continued.
            params: how to answer.
            salt: requests share encoded images and prompts only where this number is equal.

        Raises:
            PromptTooLong: the conversation leaves no room for an answer.
            ValueError: roles do not alternate, an image has another size, or ``params`` name an unknown token.
            ThreadFailure: the image encoder has ended.
        """
        run = asyncio.get_running_loop().run_in_executor
        ids, images, pending = await run(self._tokenizing, self._encode, messages, salt)
        embeds = await asyncio.gather(*(asyncio.wrap_future(future) for future in pending))
        return await run(self._tokenizing, self._build, messages, ids, images, embeds, params, salt)

    def stream(self, request: Request, interval_s: float = 0.0) -> AsyncGenerator[Delta, None]:
        """Answer a prepared request (``EngineLoop.stream``)."""
        return self.loop.stream(request, interval_s)

    def iterate(
        self, messages: Sequence[ChatMessage[ChatImage]], params: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """Answer a conversation, for code without asyncio; raises as ``prepare`` does."""
        ids, images, pending = self._tokenizing.submit(self._encode, messages).result()
        embeds = [future.result() for future in pending]
        return self.loop.iterate(self._build(messages, ids, images, embeds, params or SamplingParams()))

    def answer(self, messages: Sequence[ChatMessage[ChatImage]], params: SamplingParams | None = None) -> str:
        """The whole answer to a conversation.

        Raises:
            RuntimeError: the model could not compute it.
        """
        text = ""
        for delta in self.iterate(messages, params):
            text += delta.text
            if delta.finish_reason == "error":
                raise RuntimeError(delta.error)
        return text

    def _encode(
        self, messages: Sequence[ChatMessage[ChatImage]], salt: int = 0
    ) -> tuple[np.ndarray, list[ChatImage], list[Future[Tensor]]]:
        self._check_bounds(messages)
        ids, images = encode_conversation(messages, self._layout)
        self.engine.check_length(len(ids))  # before an image is encoded for nothing
        return ids, images, [self.images.encode(image, salt) for image in images]

    def _check_bounds(self, messages: Sequence[ChatMessage[ChatImage]]) -> None:
        """Refuse what cannot fit, before tokenizing it: each message takes a token at least."""
        context = self.engine.context_length
        if len(messages) > context:
            raise PromptTooLong(f"the conversation has {len(messages)} messages: the context is {context} tokens.")
        num_characters = sum(len(message.text) for message in messages)
        if num_characters > MAX_CHARACTERS_PER_TOKEN * context:
            raise PromptTooLong(
                f"the conversation has {num_characters} characters: far more than the context of {context} tokens."
            )

    @torch.inference_mode()
    def _build(
        self,
        messages: Sequence[ChatMessage[ChatImage]],
        ids: np.ndarray,
        images: Sequence[ChatImage],
        embeds: Sequence[Tensor],
        params: SamplingParams,
        salt: int = 0,
    ) -> Request:
        device = self.engine.device
        inputs_embeds = self.model.embed(
            torch.from_numpy(ids).to(device).unsqueeze(0), image_embeds=torch.stack(list(embeds)) if embeds else None
        )
        named = ids.copy()
        is_image = ids == self.processor.image_token_id
        named[is_image] = np.repeat([image.number for image in images], self.processor.num_query_tokens)
        request = Request(named, inputs_embeds[0], params, salt, continues=messages[-1].role == "assistant")
        self.engine.check(request)
        return request
