"""How far a quantized model moved: its numbers, and what both models are asked."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tinygptv.data.prompt_layout import Exchange
from tinygptv.data.sample import SampleRow, Turn
from tinygptv.inference import drift as module
from tinygptv.inference.batch import Reply
from tinygptv.inference.drift import HeldOut, compare, measure


def test_a_drift_is_quantized_against_full():
    full = HeldOut(torch.tensor([1.0, 2.0, 3.0]), ("a", "b", "c", "d"))
    drift = compare(full, HeldOut(torch.tensor([1.0, 1.0, 1.0]), ("a", "b", "C", "d")))
    assert (drift.loss, drift.full_loss, drift.quantized_loss) == (-1.0, 2.0, 1.0)
    assert (drift.full_perplexity, drift.quantized_perplexity) == pytest.approx((math.e**2, math.e))
    assert (drift.answer_agreement, drift.num_tokens, drift.num_answers) == (0.75, 3, 4)
    assert drift.to_dict()["full_perplexity"] == 7.389056 and set(drift.to_dict()) == set(vars(drift))
    with pytest.raises(ValueError, match="zip"):
        compare(full, HeldOut(torch.ones(3), ("a",)))


def test_each_row_is_asked_its_first_instruction_about_its_own_image(monkeypatch):
    asked = {}

    class Answering:
        def __init__(self, model, processor, batch_size):
            asked.update(model=model, processor=processor, batch_size=batch_size)

        def encode(self, images):
            return [f"embeds of {image}" for image in images]

        def answer(self, prompts, embeds):
            asked.update(prompts=prompts, embeds=embeds)
            return [Reply("a text"), Reply(error="too long"), Reply("more")]

    def losses(model, samples, embeds, pad):
        asked.update(samples=samples, shown=embeds, pad=pad)
        return [torch.tensor([1.0]), torch.tensor([2.0, 3.0]), torch.tensor([])]

    class Encoder:
        def __init__(self, layout, limits):
            asked["limits"] = (layout, limits.max_text_tokens)

        def encode(self, exchanges):
            return [each.instruction for each in exchanges]

    monkeypatch.setattr(module, "Answerer", Answering)
    monkeypatch.setattr(module, "sample_losses", losses)
    monkeypatch.setattr(module, "SampleEncoder", Encoder)
    monkeypatch.setattr(module, "open_image", lambda image: image.decode())
    monkeypatch.setattr(module, "chooser", lambda generator: generator)

    def render(row, choose):
        asked.setdefault("drawn", []).append(int(choose.integers(10**9)))
        return [Exchange(turn.question, turn.answers[0]) for turn in row.turns]

    monkeypatch.setattr(module, "render_sample", render)
    processor = SimpleNamespace(layout=lambda: "layout", tokenizer=SimpleNamespace(pad_token_id=7))
    rows = [
        SampleRow("1", "s", "vqa", (Turn("q1", ("a1",)), Turn("q2", ("a2",))), b"one"),
        SampleRow("2", "s", "text", (Turn("q3", ("a3",)),)),
        SampleRow("3", "s", "vqa", (Turn("q4", ("a4",)),), b"two"),
    ]
    found = measure("model", processor, rows, seed=5)
    generator = np.random.default_rng(5)
    assert asked.pop("drawn") == [int(generator.integers(10**9)) for _ in rows], "wordings follow from the seed"
    assert found.answers == ("a text", "too long", "more") and found.losses.tolist() == [1.0, 2.0, 3.0]
    assert [(p.instruction, p.image, p.history, p.max_new_tokens) for p in asked["prompts"]] == [
        ("q1", 0, (), 24),
        ("q3", None, (), 24),
        ("q4", 1, (), 24),
    ]
    assert asked["shown"] == ["embeds of one", None, "embeds of two"] and asked["embeds"] == asked["shown"][::2]
    assert asked["samples"] == [["q1", "q2"], ["q3"], ["q4"]]
    assert (asked["limits"], asked["pad"], asked["batch_size"]) == (("layout", 160), 7, 8)
    assert asked["model"] == "model" and asked["processor"] is processor
    measure("model", processor, rows)
    assert asked["drawn"][0] == int(np.random.default_rng(0).integers(10**9)), "0, where none is given"
