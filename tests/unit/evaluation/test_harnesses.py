"""lmms-eval's and VLMEvalKit's way of asking: the same answers as ours, through stand-ins for their base classes."""

from __future__ import annotations

import importlib
import io
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from pipelines.evaluation.harnesses.in_process import HarnessQuestion, InProcessModel, _cut
from tests.serving_model import make_image, make_model, make_processor, save_checkpoint
from tinygptv.data.images import open_image
from tinygptv.inference.batch import Answerer, Prompt, Reply


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint"))


@pytest.fixture(scope="module")
def pictures():
    return [Image.open(io.BytesIO(make_image(seed))) for seed in range(3)]


@pytest.fixture(scope="module")
def answerer():
    return Answerer(make_model(), make_processor(), batch_size=2)


def ours(answerer, text, seed=None, length=5, choices=()):
    embeds = [] if seed is None else answerer.encode([open_image(make_image(seed))])
    prompt = Prompt(text, None if seed is None else 0, (), length, choices)
    return answerer.choice_losses([prompt], embeds)[0] if choices else answerer.answer([prompt], embeds)[0].text


def test_answers_over_several_chunks_equal_ours(checkpoint, pictures, answerer):
    model = InProcessModel(checkpoint, batch_size=1)
    questions = [HarnessQuestion(f" what {i}? ", pictures[i % 3], 5) for i in range(6)]
    questions.append(HarnessQuestion("no picture", None, 5))
    expected = [ours(answerer, f"[vqa] what {i}?", i % 3) for i in range(6)] + [ours(answerer, "[vqa] no picture")]
    assert model.answer(questions) == expected
    assert len(set(expected)) > 2, "answers that do not depend on the question test nothing"


def test_stop_texts_cut_and_too_long_a_question_is_empty_with_a_warning(checkpoint, pictures, answerer, caplog):
    model = InProcessModel(checkpoint, tag="")
    whole = ours(answerer, "what?", 0)
    mark = whole[2:3]
    assert model.answer([HarnessQuestion("what?", pictures[0], 5, (mark,))]) == [whole.partition(mark)[0].strip()]
    assert model.answer([HarnessQuestion("word " * 400)]) == [""]
    assert "question 0 of the harness has no answer" in caplog.text


def test_the_first_stop_text_cuts_and_questions_are_numbered_over_all_chunks(caplog):
    assert _cut("a b c", ("c", "b", "", "x")) == "a" and _cut(" a b ", ("x",)) == " a b "

    class Refusing:
        def encode(self, images):
            return images

        def answer(self, prompts, embeds):
            return [Reply(error="too long") if "bad" in prompt.instruction else Reply("fine") for prompt in prompts]

    model = object.__new__(InProcessModel)
    model.answerer, model.tag, model.chunk = Refusing(), "", 2
    asked = [HarnessQuestion(text) for text in ("a", "b", "c", "bad", "d")]
    assert model.answer(asked) == ["fine", "fine", "fine", "", "fine"]
    assert "question 3 of the harness" in caplog.text


def test_log_likelihood_is_minus_the_loss_and_knows_the_models_own_answer(checkpoint, pictures, answerer):
    model = InProcessModel(checkpoint)
    own = ours(answerer, "[vqa] which?", 1, 20)
    question = HarnessQuestion("which?", pictures[1])
    (likely, is_own), (unlikely, is_not) = model.log_likelihoods([question, question], [own, " red"])
    assert is_own and not is_not
    losses = ours(answerer, "[vqa] which?", 1, choices=(own, "red"))
    assert [-likely, -unlikely] == pytest.approx(losses, rel=1e-5)


# ---------------------------------------------------------------------- through the harnesses' own interfaces


@dataclass(frozen=True)
class Manifest:
    """Stand-in for lmms-eval's."""

    model_id: str
    simple_class_path: str


def import_with(monkeypatch, name, modules):
    for path, contents in modules.items():
        for depth in range(1, path.count(".") + 1):
            package = ".".join(path.split(".")[:depth])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, ModuleType(package))
        module = ModuleType(path)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@pytest.fixture
def lmms(monkeypatch):
    base = type("lmms", (), {"task_dict": {}})
    modules = {"lmms_eval.api.model": {"lmms": base}, "lmms_eval.models.registry_v2": {"ModelManifest": Manifest}}
    return import_with(monkeypatch, "pipelines.evaluation.harnesses.lmms", modules)


def test_lmms_eval_requests(lmms, checkpoint, pictures, answerer):
    assert Manifest("tinygptv", "pipelines.evaluation.harnesses.lmms.TinyGPTV") == lmms.MANIFEST
    model = lmms.TinyGPTV(checkpoint, batch_size="2", device=None)
    model.task_dict = {"t": {"test": [{"picture": picture, "target": " red"} for picture in pictures]}}

    def request(*arguments):
        return SimpleNamespace(args=arguments)

    def visual(document):
        return [document["picture"]]

    asked = [request(f"what {i}?", {"max_new_tokens": 5, "until": ["\n\n"]}, visual, i, "t", "test") for i in range(3)]
    assert model.generate_until(asked) == [ours(answerer, f"[vqa] what {i}?", i) for i in range(3)]
    ranked = [request("which?", target, visual, 0, "t", "test") for target in ("red", lambda d: d["target"])]
    (first, _), (second, _) = model.loglikelihood(ranked)
    assert first == pytest.approx(-ours(answerer, "[vqa] which?", 0, choices=("red",))[0], rel=1e-5) == second
    with pytest.raises(ValueError, match="has 2 images: tinygptv takes one"):
        model.generate_until([request("x", {}, lambda d: [d["picture"]] * 2, 0, "t", "test")])


def test_vlmevalkit_messages(monkeypatch, checkpoint, tmp_path, answerer):
    class Base:
        def message_to_promptimg(self, message, dataset=None):
            paths = [part["value"] for part in message if part["type"] == "image"]
            return "\n".join(p["value"] for p in message if p["type"] == "text"), paths[0] if paths else None

    module = import_with(
        monkeypatch, "pipelines.evaluation.harnesses.vlmevalkit", {"vlmeval.vlm.base": {"BaseModel": Base}}
    )
    (tmp_path / "a.png").write_bytes(make_image(2))
    model = module.TinyGPTV(checkpoint, max_new_tokens=5)
    message = [{"type": "image", "value": str(tmp_path / "a.png")}, {"type": "text", "value": "what?"}]
    assert model.generate_inner(message) == ours(answerer, "[vqa] what?", 2)
    assert model.generate_inner([{"type": "text", "value": "what?"}]) == ours(answerer, "[vqa] what?")
