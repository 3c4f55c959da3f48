"""Pretrains the miniature's language model and its tokenizer: the world's language, as text.

A document speaks of a scene whose description stands between the image marks as *packed text*: one position per grid
cell, whose embedding is the sum of the words of the object in it (box numbers turned by a fixed rotation per corner, so
that their order is not lost) plus a little noise. That needs no image and no projector, but teaches the model to read
several facts from one vector, which is what image embeddings will be. That much a large language model brings along;
one of two million parameters must be taught.

Notation: B documents, S sequence, Q cells, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tinygptv.config import TinyGPTVConfig
from tinygptv.data.collate import LoadedSample, MicroBatch, collate
from tinygptv.data.prompt_layout import PromptLayout
from tinygptv.data.prompts import TEMPLATES
from tinygptv.data.sample import SampleEncoder, TextLimits
from tinygptv.miniature.documents import LANGUAGE_MIX, LOOKUP_MIX, Document, make_document
from tinygptv.miniature.pretrain_vision import cell_index
from tinygptv.miniature.scenes import CELLS, Scene, generator, make_scene
from tinygptv.miniature.tiny import BOS
from tinygptv.miniature.words import box_text
from tinygptv.model.language_model import LanguageModel

PACKED_NOISE = 0.15
BUCKETS = 8
LOOKUP_WEIGHT = 4.0
POSITIONS_MULTIPLE = 256
EVALUATED_KINDS = ("listing", "vqa", "refer", "identify", "caption", "grounding", "conversation")
_LIMITS = TextLimits(max_text_tokens=256)


def train_tokenizer(seed: int, vocab_size: int, num_documents: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE of GPT-2's form, trained on the world's documents; BOS = EOS = PAD = id 0.

    Args:
        seed: of the documents.
        vocab_size: most tokens.
        num_documents: documents to learn merges from.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=20,
        show_progress=False,
    )
    numbers = (f"{{<{n}><{n}><{n}><{n}>}}" for n in range(101) for _ in range(max(20, num_documents // 100)))
    tokenizer.train_from_iterator(chain(numbers, _pieces(seed, num_documents)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS, model_max_length=512
    )


def _pieces(seed: int, num_documents: int) -> Iterator[str]:
    """Texts as they are tokenised: questions, answers and end symbols apart, so that no merge swallows the last."""
    for index in range(num_documents):
        scene = make_scene(seed, "train", index)
        document = make_document(scene, generator(scene.key, "tokenizer"))
        for exchange, (question, _) in zip(document.exchanges, document.turns(), strict=True):
            yield from question.split("###")
            yield exchange.answer or ""
            yield "###"


class PackedText:
    """Sums of word embeddings: one vector per grid cell."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int) -> None:
        self.tokenizer = tokenizer
        generator_ = torch.Generator().manual_seed(0)
        turns = [torch.linalg.qr(torch.randn(width, width, generator=generator_))[0] for _ in range(4)]
        self.rotations = torch.stack(turns)  # [4, D, D]

    def word_id(self, word: str) -> int:
        """The one token of a word inside a sentence.

        Raises:
            ValueError: the tokenizer cuts the word into pieces.
        """
        ids = self.tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"the miniature's tokenizer cuts {word!r} into {len(ids)} tokens; it must be one.")
        return ids[0]

    def ids(self, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        """Word ids [Q, 4] and box-number ids [Q, 4] of a scene; -1 in empty cells."""
        words = np.full((CELLS * CELLS, 4), -1, dtype=np.int64)
        numbers = np.full((CELLS * CELLS, 4), -1, dtype=np.int64)
        for item in scene.objects:
            cell = cell_index(scene, item)
            words[cell] = [self.word_id(f" {word}") for word in item.attributes]
            corners = box_text(scene, item).strip("{<>}").split("><")
            numbers[cell] = [self.word_id(corner) for corner in corners]
        return words, numbers

    def embed(self, embedding: nn.Embedding, words: Tensor, numbers: Tensor, noise: Tensor) -> Tensor:
        """Packed vectors [B, Q, D] from ids [B, Q, 4] each and noise [B, Q, D] of unit size."""
        full = (words[..., :1] >= 0).float()
        summed = embedding(words.clamp(min=0)).sum(-2)
        turned = torch.einsum("bqrd,rde->bqe", embedding(numbers.clamp(min=0)), self.rotations)
        packed = (summed + turned) * full
        scale = embedding.weight.detach().square().mean().sqrt() * 8**0.5
        return packed + PACKED_NOISE * scale * noise


def number_waves(width: int) -> Tensor:
    """One row of unit size per box number 0 .. 100: sines and cosines of its value, a quarter of a turn to 16 turns.

    Returns:
        [101, D].
    """
    value = torch.arange(101).unsqueeze(1) / 100
    turns = torch.exp(torch.linspace(math.log(0.25), math.log(16), width // 2))
    angle = 2 * math.pi * (value * turns + torch.rand(width // 2, generator=torch.Generator().manual_seed(7)))
    return torch.cat([angle.sin(), angle.cos()], 1) * 2**0.5


def _float32_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Any:
    """SDPA in float32 under bfloat16 autocast: its bfloat16 backward pass is several times slower on a CPU."""
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **kwargs)


_ATTENTION = "sdpa_float32"
ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _float32_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


_Batch = tuple[Sequence[Scene], Sequence[Document]]
"""Scenes, and a document about each."""


class LanguageModule(nn.Module):
    """Language model and head."""

    def __init__(self, config: TinyGPTVConfig) -> None:
        super().__init__()
        self.language_model = LanguageModel(config.text_config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size)


class LanguageTask:
    """Answers in documents about scenes.

    From step ``lookups_from`` on, documents follow ``LOOKUP_MIX``, and the word after a question mark, the one that has
    to be looked up, counts ``LOOKUP_WEIGHT`` times.
    """

    def __init__(
        self,
        config: TinyGPTVConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        world_seed: int,
        batch_size: int = 64,
        seed: int = 0,
        held_out: int = 192,
        lookups_from: int | None = None,
    ) -> None:
        self.module = LanguageModule(config)
        self.module.language_model.set_attn_implementation(_ATTENTION)
        self.config, self.tokenizer = config, tokenizer
        self.packed = PackedText(tokenizer, config.text_config.hidden_size)
        self.question_mark = self.packed.word_id("?")
        self._start_numbers_as_waves()
        self.world_seed, self.batch_size, self.seed = world_seed, batch_size, seed
        self.held_out, self.lookups_from = held_out, lookups_from
        self._group: tuple[int, list[_Batch]] = (-1, [])

    def _start_numbers_as_waves(self) -> None:
        """Box numbers begin, in the embedding and in the head, as waves of their value: neighbours are alike."""
        ids = [self.packed.word_id(str(number)) for number in range(101)]
        waves = number_waves(self.config.text_config.hidden_size)
        for table in (self.module.language_model.embed_tokens.weight, self.module.lm_head.weight):
            with torch.no_grad():
                table[ids] = waves * table.std()

    def losses(self, step: int) -> dict[str, Tensor]:
        """One batch of documents of like length; matrix products run in bfloat16."""
        group, number = divmod(step, BUCKETS)
        if self._group[0] != group:
            self._group = (group, self._draw_group(group))
        scenes, made = self._group[1][number]
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, 2, step))))
        with torch.autocast("cpu", torch.bfloat16):
            losses, is_lookup, _ = self._token_losses(scenes, made, rng)
        weight = 1 + is_lookup * (LOOKUP_WEIGHT - 1) * self._practises_lookups(step)
        return {"loss": (losses * weight).sum() / weight.sum()}

    def _practises_lookups(self, step: int) -> bool:
        return self.lookups_from is not None and step >= self.lookups_from

    def _draw_group(self, group: int) -> list[_Batch]:
        """``BUCKETS`` batches at once, sorted by length so that little is padding, in random order."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, 1, group))))
        numbers = rng.integers(2**31, size=BUCKETS * self.batch_size)
        scenes = [make_scene(self.world_seed, "train", int(i)) for i in numbers]
        weights = LOOKUP_MIX if self._practises_lookups(group * BUCKETS) else LANGUAGE_MIX
        made = [(scene, make_document(scene, rng, as_image=True, weights=weights)) for scene in scenes]
        made.sort(key=lambda pair: len(pair[1].text()))
        batches: list[_Batch] = []
        for start in range(0, len(made), self.batch_size):
            scenes_of, documents = zip(*made[start : start + self.batch_size], strict=True)
            batches.append((scenes_of, documents))
        return [batches[i] for i in rng.permutation(len(batches))]

    def _token_losses(
        self, scenes: Sequence[Scene], made: Sequence[Document], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of every supervised token, whether it follows a question mark, and the share of documents all right."""
        batch, with_image = self._collate(made)
        ids = torch.from_numpy(batch.input_ids)
        embedding = self.module.language_model.embed_tokens
        is_image = ids == self.config.image_token_id
        inputs_embeds = embedding(ids.masked_fill(is_image, 0))
        if with_image:
            word_ids, number_ids = zip(*(self.packed.ids(scenes[i]) for i in with_image), strict=True)
            words, numbers = torch.from_numpy(np.stack(word_ids)), torch.from_numpy(np.stack(number_ids))
            noise = torch.from_numpy(rng.standard_normal((*words.shape[:2], inputs_embeds.shape[-1]), dtype=np.float32))
            vectors = self.packed.embed(embedding, words, numbers, noise)
            inputs_embeds = inputs_embeds.masked_scatter(is_image.unsqueeze(-1), vectors)
        hidden = self.module.language_model(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
        positions = torch.from_numpy(batch.supervised_positions)
        # Few shapes: the matrix library keeps code and buffers for each that it has seen.
        padded = nn.functional.pad(positions, (0, -len(positions) % POSITIONS_MULTIPLE))
        logits = self.module.lm_head(hidden.flatten(0, 1)[padded])[: len(positions)]
        wanted = torch.from_numpy(batch.supervised_ids)
        wrong = torch.zeros(len(made)).index_add(0, positions // ids.shape[1], (logits.argmax(-1) != wanted).float())
        is_lookup = ids.flatten()[positions] == self.question_mark
        losses = nn.functional.cross_entropy(logits, wanted, reduction="none")
        return losses, is_lookup.float(), (wrong == 0).float().mean()

    def _collate(self, made: Sequence[Document]) -> tuple[MicroBatch, list[int]]:
        """Arrays, and which documents have an image."""
        samples, with_image = [], []
        for i, document in enumerate(made):
            layout = PromptLayout(
                self.tokenizer,
                TEMPLATES[document.template],
                image_token_id=self.config.image_token_id,
                num_query_tokens=self.config.num_query_tokens,
            )
            with_image += [i] if document.num_images else []
            samples.append(LoadedSample(SampleEncoder(layout, _LIMITS).encode(document.exchanges), 0))
        return collate(samples, self.tokenizer.pad_token_id, pad_to_multiple=32), with_image

    def evaluate(self) -> dict[str, float]:
        """Held-out loss per document kind, and the share of documents whose answers are all right."""
        scores: dict[str, float] = {}
        for kind in EVALUATED_KINDS:
            scenes = [make_scene(self.world_seed, "validation", i) for i in range(self.held_out)]
            made = [make_document(s, generator(s.key, f"evaluate {kind}"), kind, as_image=True) for s in scenes]
            rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, 3))))
            losses, _, right = self._token_losses(scenes, made, rng)
            scores[f"{kind}/loss"], scores[f"{kind}/exact"] = float(losses.mean()), float(right)
        return scores
