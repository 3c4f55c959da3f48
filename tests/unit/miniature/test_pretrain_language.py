"""Pretraining of the miniature's language model: words and numbers of packed vectors, batches, losses of tokens."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tinygptv.miniature import pretrain_language
from tinygptv.miniature.documents import LANGUAGE_MIX, LOOKUP_MIX, make_document
from tinygptv.miniature.pretrain_language import PACKED_NOISE, LanguageTask, PackedText, number_waves
from tinygptv.miniature.pretrain_vision import (
    cell_index,
)
from tinygptv.miniature.scenes import generator, make_scene
from tinygptv.miniature.tiny import tiny_tokenizer
from tinygptv.miniature.words import box_text


class Words:
    """A tokenizer with a token for each word that it is asked for."""

    def __init__(self):
        self.known = {}

    def encode(self, text, add_special_tokens):
        assert add_special_tokens is False
        return [self.known.setdefault(text, len(self.known) + 1)]


def test_words_must_be_one_token():
    packed = PackedText(tiny_tokenizer(), 8)
    assert packed.word_id("a") == tiny_tokenizer().encode("a")[0]
    with pytest.raises(ValueError, match="cuts ' red' into 4 tokens; it must be one"):
        packed.word_id(" red")
    with pytest.raises(ValueError, match="cuts '' into 0 tokens"):
        packed.word_id("")


def test_a_cell_has_the_words_and_the_numbers_of_its_object():
    tokenizer, scene = Words(), make_scene(5, "crowded", 0)
    words, numbers = PackedText(tokenizer, 8).ids(scene)
    said = {number: word for word, number in tokenizer.known.items()} | {-1: None}
    cells = {cell_index(scene, item): item for item in scene.objects}
    for cell in range(16):
        item = cells.get(cell)
        assert [said[i] for i in words[cell]] == ([f" {w}" for w in item.attributes] if item else [None] * 4)
        corners = box_text(scene, item).strip("{<>}").split("><") if item else [None] * 4
        assert [said[i] for i in numbers[cell]] == corners


def test_a_packed_vector_is_the_sum_of_words_and_turned_numbers():
    torch.manual_seed(0)
    packed, embedding = PackedText(Words(), 8), nn.Embedding(20, 8)
    for rotation in packed.rotations:
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(8), atol=1e-5, rtol=0)
    words, numbers = torch.tensor([[[1, 2, 3, 4], [-1] * 4]]), torch.tensor([[[5, 6, 7, 8], [-1] * 4]])
    found = packed.embed(embedding, words, numbers, torch.zeros(1, 2, 8))
    table = embedding.weight
    expected = table[1:5].sum(0) + sum(table[5 + i] @ packed.rotations[i] for i in range(4))
    torch.testing.assert_close(found[0, 0], expected)
    assert not found[0, 1].any(), "nothing stands in an empty cell"
    noise = torch.randn(1, 2, 8)
    noisy = packed.embed(embedding, words, numbers, noise) - found
    torch.testing.assert_close(noisy, PACKED_NOISE * table.detach().square().mean().sqrt() * 8**0.5 * noise)


def test_box_numbers_start_as_waves_of_the_size_of_the_other_words():
    waves = number_waves(16)
    assert waves.shape == (101, 16)
    torch.testing.assert_close(waves.square().mean(1), torch.ones(101))
    alike = nn.functional.cosine_similarity(waves[:-1], waves[1:])
    assert alike.min() > nn.functional.cosine_similarity(waves[:50], waves[50:100]).abs().max() - 0.2
    torch.testing.assert_close(waves, number_waves(16))
    torch.manual_seed(0)
    task = object.__new__(LanguageTask)
    task.config = SimpleNamespace(text_config=SimpleNamespace(hidden_size=16))
    task.packed = SimpleNamespace(word_id=lambda word: int(word) + 3)
    tables = [nn.Parameter(0.02 * torch.randn(110, 16)), nn.Parameter(0.3 * torch.randn(110, 16))]
    before = [table.detach().clone() for table in tables]
    task.module = SimpleNamespace(
        language_model=SimpleNamespace(embed_tokens=SimpleNamespace(weight=tables[0])),
        lm_head=SimpleNamespace(weight=tables[1]),
    )
    task._start_numbers_as_waves()
    for table, old in zip(tables, before, strict=True):
        torch.testing.assert_close(table[3:104].detach(), waves * old.std())
        assert torch.equal(table[:3], old[:3]) and torch.equal(table[104:], old[104:])


@pytest.fixture
def language_task(monkeypatch):
    """Makes tasks without a model: documents are so long as their scene's number says."""
    tables = [SimpleNamespace(weight=torch.randn(110, 16)) for _ in range(2)]
    language = SimpleNamespace(set_attn_implementation=lambda name: None, embed_tokens=tables[0])
    module = SimpleNamespace(language_model=language, lm_head=tables[1])
    packed = SimpleNamespace(word_id=lambda word: 105 if word == "?" else int(word))
    document = lambda scene, rng, as_image, weights: SimpleNamespace(  # noqa: E731
        scene=scene, weights=weights, text=lambda: "x" * (scene[2] % 97), as_image=as_image
    )
    monkeypatch.setattr(pretrain_language, "LanguageModule", lambda config: module)
    monkeypatch.setattr(pretrain_language, "PackedText", lambda tokenizer, width: packed)
    monkeypatch.setattr(pretrain_language, "make_scene", lambda *key: key)
    monkeypatch.setattr(pretrain_language, "make_document", document)
    config = SimpleNamespace(text_config=SimpleNamespace(hidden_size=16))
    return lambda **options: LanguageTask(config, "tokenizer", **options)


def test_a_language_task_keeps_what_it_is_given(language_task):
    task = language_task(world_seed=3, batch_size=5, seed=4, held_out=6, lookups_from=8)
    assert (task.world_seed, task.batch_size, task.seed, task.held_out, task.lookups_from) == (3, 5, 4, 6, 8)
    assert task.question_mark == 105
    plain = language_task(world_seed=3)
    assert (plain.batch_size, plain.seed, plain.held_out, plain.lookups_from) == (64, 0, 192, None)
    assert [task._practises_lookups(step) for step in (7, 8, 9)] == [False, True, True]
    assert not plain._practises_lookups(10**6)


def test_batches_of_a_group_hold_documents_of_like_length_in_random_order(language_task):
    task = language_task(world_seed=3, batch_size=5, seed=4, lookups_from=16)
    batches = task._draw_group(1)
    assert len(batches) == pretrain_language.BUCKETS and {len(documents) for _, documents in batches} == {5}
    for scenes, documents in batches:
        assert [document.scene for document in documents] == list(scenes)
        assert all(scene[:2] == (3, "train") for scene in scenes) and all(d.as_image for d in documents)
    lengths = [[len(document.text()) for document in documents] for _, documents in batches]
    assert list(chain(*sorted(lengths))) == sorted(chain(*lengths)) and lengths != sorted(lengths)
    drawn = lambda task, group: [scenes for scenes, _ in task._draw_group(group)]  # noqa: E731
    assert drawn(task, 1) == [scenes for scenes, _ in batches] != drawn(task, 2)
    assert drawn(language_task(world_seed=3, batch_size=5, seed=5), 1) != drawn(task, 1)
    for group, weights in ((1, LANGUAGE_MIX), (2, LOOKUP_MIX)):
        assert all(d.weights is weights for _, documents in task._draw_group(group) for d in documents)


def test_a_batch_belongs_to_its_step_and_the_word_to_be_looked_up_counts_more(language_task, monkeypatch):
    task = language_task(world_seed=3, batch_size=5, seed=4, lookups_from=17)
    losses, is_lookup = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.0, 1.0, 0.0])
    drawn, asked = [], []
    monkeypatch.setattr(task, "_draw_group", lambda group: drawn.append(group) or [((group, n), n) for n in range(8)])

    def token_losses(scenes, made, rng):
        asked.append((scenes, made, int(rng.integers(2**60)), torch.is_autocast_enabled("cpu")))
        return losses, is_lookup, None

    monkeypatch.setattr(task, "_token_losses", token_losses)
    found = {step: float(task.losses(step)["loss"]) for step in (0, 1, 7, 16, 17)}
    assert [(*scenes, number) for scenes, number, _, _ in asked] == [
        (0, 0, 0), (0, 1, 1), (0, 7, 7), (2, 0, 0), (2, 1, 1)
    ]  # fmt: skip
    assert drawn == [0, 2], "a group is drawn once"
    assert len({number for _, _, number, _ in asked}) == 5 and all(autocast for *_, autocast in asked)
    assert found == pytest.approx({0: 3.0, 1: 3.0, 7: 3.0, 16: 3.0, 17: (1 + 4 * 2 + 6) / 6})
    before = asked[1][2]
    task.losses(1)
    assert asked[-1][2] == before and drawn[2:] == [0]


def test_each_kind_is_evaluated_on_the_same_held_out_scenes(language_task, monkeypatch):
    task, made, asked = language_task(world_seed=3, seed=4, held_out=2), [], []
    monkeypatch.setattr(pretrain_language, "make_scene", lambda *key: SimpleNamespace(key=key))
    monkeypatch.setattr(pretrain_language, "generator", lambda key, purpose: (key, purpose))

    def document(scene, rng, kind, as_image):
        made.append((scene.key, rng, as_image))
        return kind

    def token_losses(scenes, documents, rng):
        asked.append(([scene.key for scene in scenes], documents, int(rng.integers(2**60))))
        return torch.tensor([1.0, 2.0]), None, torch.tensor(0.25)

    monkeypatch.setattr(pretrain_language, "make_document", document)
    monkeypatch.setattr(task, "_token_losses", token_losses)
    kinds = ("listing", "vqa", "refer", "identify", "caption", "grounding", "conversation")
    expected = {name: value for kind in kinds for name, value in ((f"{kind}/loss", 1.5), (f"{kind}/exact", 0.25))}
    assert task.evaluate() == expected
    keys = [(3, "validation", 0), (3, "validation", 1)]
    assert [(scenes, documents) for scenes, documents, _ in asked] == [(keys, [kind] * 2) for kind in kinds]
    assert made == [(key, (key, f"evaluate {kind}"), True) for kind in kinds for key in keys]
    assert len({number for *_, number in asked}) == 1, "the same noise for each kind"


def test_tokens_are_scored_where_packed_vectors_stand_for_the_image():
    """A language model that knows every next token, but for one document."""
    config = SimpleNamespace(image_token_id=400, num_query_tokens=16)
    task = object.__new__(LanguageTask)
    tokenizer = tiny_tokenizer()
    task.config, task.tokenizer, task.question_mark = config, tokenizer, tokenizer.encode("?")[0]
    scenes = [make_scene(3, "train", index) for index in range(3)]
    documents = [
        make_document(scenes[0], np.random.default_rng(0), "vqa", as_image=True),
        make_document(scenes[1], np.random.default_rng(1), "text", as_image=True),
        make_document(scenes[2], np.random.default_rng(2), "caption", as_image=True),
    ]
    batch, with_image = task._collate(documents)
    assert with_image == [0, 2] and batch.input_ids.shape[1] % 32 == 0
    packed = []

    def embed(embedding, words, numbers, noise):
        packed.append((words.tolist(), numbers.tolist(), noise))
        return torch.full((len(words), 16, 260), 7.0)

    task.packed = SimpleNamespace(ids=lambda scene: (np.full((16, 4), scenes.index(scene)),) * 2, embed=embed)
    ids, inputs = torch.from_numpy(batch.input_ids), []
    following = torch.nn.functional.one_hot(ids.roll(-1, 1).clamp(max=259), 260).float()

    def model(inputs_embeds, use_cache):
        inputs.append(inputs_embeds)
        known = following.clone()
        known[2] = following[2].roll(1, -1)  # the third is wrong everywhere
        return SimpleNamespace(last_hidden_state=known)

    model.embed_tokens = nn.Embedding(260, 260)
    task.module = SimpleNamespace(language_model=model, lm_head=lambda hidden: hidden * 50)
    losses, is_lookup, right = task._token_losses(scenes, documents, np.random.default_rng(5))
    supervised = torch.from_numpy(batch.supervised_positions)
    rows = supervised // ids.shape[1]
    assert len(losses) == len(is_lookup) == len(supervised) and float(right) == pytest.approx(2 / 3)
    assert losses[rows < 2].max() < 1e-3 and losses[rows == 2].min() > 10
    assert is_lookup.tolist() == (ids.flatten()[supervised] == task.question_mark).float().tolist()
    (given,), ((words, numbers, noise),) = inputs, packed
    is_image = ids == 400
    assert is_image.sum(1).tolist() == [16, 0, 16] and (given[is_image] == 7).all()
    assert torch.equal(given[~is_image], model.embed_tokens(ids[~is_image]))
    assert words == numbers == [[[0] * 4] * 16, [[2] * 4] * 16], "the scenes of the documents with an image"
    assert noise.shape == (2, 16, 260) and abs(float(noise.std()) - 1) < 0.05


def test_texts_are_cut_where_they_are_tokenised():
    pieces = list(pretrain_language._pieces(5, 2))
    texts = []
    for index in range(2):
        scene = make_scene(5, "train", index)
        document = make_document(scene, generator(scene.key, "tokenizer"))
        for exchange, (question, _) in zip(document.exchanges, document.turns(), strict=True):
            texts += [*question.split("###"), exchange.answer, "###"]
    assert pieces == texts and pieces.count("###") >= 2
