"""lmms-eval's and VLMEvalKit's way of asking: the same answers as ours, through stand-ins for their base classes."""

from __future__ import annotations

import importlib
import io
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from pipelines.evaluation.harnesses import in_process
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
    assert (model.chunk, model.answerer.batch_size, model.tag) == (in_process._BATCHES_AT_ONCE, 1, "[vqa] ")
    questions = [HarnessQuestion(f" what {i}? ", pictures[i % 3], 5) for i in range(6)]
    questions.append(HarnessQuestion("no picture", None, 5))
    expected = [ours(answerer, f"[vqa] what {i}?", i % 3) for i in range(6)] + [ours(answerer, "[vqa] no picture")]
    assert model.answer(questions) == expected
    assert len(set(expected)) > 2, "answers that do not depend on the question test nothing"


@pytest.mark.parametrize(("threads", "told"), [(0, []), (3, [3])])
def test_a_model_is_loaded_for_its_device_and_asked_in_chunks_of_four_batches(monkeypatch, threads, told):
    set_to = []
    monkeypatch.setattr(in_process.torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(in_process, "load_for_inference", lambda *given: [("model of", *given), "processor"])
    monkeypatch.setattr(in_process, "Answerer", lambda *given: given)
    model = InProcessModel("c", device="cuda", batch_size=3, threads=threads, tag="[refer] ")
    assert model.answerer == (("model of", "c", "cuda"), "processor", 3) and set_to == told
    assert (model.chunk, model.tag) == (12, "[refer] ")
    plain = InProcessModel("c")
    assert (plain.answerer[0][-1], plain.chunk, plain.tag, set_to) == ("cpu", 256, "[vqa] ", told)


def test_stop_texts_cut_and_too_long_a_question_is_empty_with_a_warning(checkpoint, pictures, answerer, caplog):
    model = InProcessModel(checkpoint, tag="")
    whole = ours(answerer, "what?", 0)
    mark = whole[2:3]
    assert model.answer([HarnessQuestion("what?", pictures[0], 5, (mark,))]) == [whole.partition(mark)[0].strip()]
    assert model.answer([HarnessQuestion("word " * 400)]) == [""]
    assert "question 0 of the harness has no answer" in caplog.text


def test_the_first_stop_text_cuts_and_questions_are_numbered_over_all_chunks(caplog):
    assert _cut("a b c", ("c", "b", "", "x")) == "a" and _cut(" a b ", ("x",)) == " a b "
    assert _cut("b a b", ("b",)) == "" and _cut(" x b y b z", ("b", "y")) == "x"

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


class Asked:
    """Stands for ``InProcessModel``: notes what it is made with and asked."""

    def __init__(self, checkpoint, **options):
        self.made, self.asked = (checkpoint, options), []

    def answer(self, questions):
        self.asked += questions
        return [question.text.upper() for question in questions]

    def log_likelihoods(self, questions, continuations):
        self.asked += zip(questions, continuations, strict=True)
        return [(-1.0, True) for _ in questions]


def test_what_lmms_eval_asks_for_reaches_the_model(lmms, monkeypatch):
    monkeypatch.setattr(lmms, "InProcessModel", Asked)
    model = lmms.TinyGPTV("c", device="cuda", batch_size="3", threads="2", tag="")
    assert model.model.made == ("c", {"device": "cuda", "batch_size": 3, "threads": 2, "tag": ""})
    assert lmms.TinyGPTV("c", device=None).model.made == (
        "c", {"device": "cpu", "batch_size": 64, "threads": 0, "tag": "[vqa] "}
    )  # fmt: skip
    model.task_dict = {"t": {"test": ["d0", "d1"], "val": ["v0"]}}

    def request(*values):
        return SimpleNamespace(args=values)

    def first(document):
        return [f"image of {document}"]

    answers = model.generate_until(
        [
            request("a", {"until": "stop", "max_new_tokens": "5"}, first, 1, "t", "test"),
            request("b", {"until": ["x", "y"]}, lambda document: [], 0, "t", "val"),
            request("c", {}, None, 0, "t", "test"),
        ]
    )
    assert answers == ["A", "B", "C"]
    assert model.model.asked == [
        HarnessQuestion("a", "image of d1", 5, ("stop",)),
        HarnessQuestion("b", None, 64, ("x", "y")),
        HarnessQuestion("c", None, 64, ()),
    ]
    model.model.asked.clear()
    ranked = [
        request("q", "yes", first, 0, "t", "val"),
        request("q", lambda document: f"of {document}", first, 1, "t", "test"),
    ]
    assert model.loglikelihood(ranked) == [(-1.0, True)] * 2
    assert model.model.asked == [
        (HarnessQuestion("q", "image of v0"), "yes"),
        (HarnessQuestion("q", "image of d1"), "of d1"),
    ]
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])


def test_what_vlmevalkit_asks_for_reaches_the_model(monkeypatch, tmp_path):
    told = []

    class Base:
        def message_to_promptimg(self, message, dataset=None):
            told.append((message, dataset))
            return message, tmp_path / "a.png" if message == "seen" else None

    module = import_with(
        monkeypatch, "pipelines.evaluation.harnesses.vlmevalkit", {"vlmeval.vlm.base": {"BaseModel": Base}}
    )
    monkeypatch.setattr(module, "InProcessModel", Asked)
    Image.new("RGB", (7, 5)).save(tmp_path / "a.png")
    model = module.TinyGPTV("c", max_new_tokens=9, device="cuda", tag="")
    assert model.model.made == ("c", {"device": "cuda", "tag": ""}) and model.INTERLEAVE is False
    assert [model.generate_inner(text, "a data set") for text in ("seen", "told")] == ["SEEN", "TOLD"]
    assert told == [("seen", "a data set"), ("told", "a data set")]
    (seen, blind) = model.model.asked
    assert (seen.text, seen.image.size, seen.max_new_tokens, seen.stop) == ("seen", (7, 5), 9, ())
    assert blind == HarnessQuestion("told", None, 9)
    assert module.TinyGPTV("c").max_new_tokens == 64


def test_each_image_is_encoded_once_and_named_by_its_place(pictures):
    model = object.__new__(InProcessModel)
    model.tag = "[vqa] "
    asked = [
        HarnessQuestion(" a ", pictures[1], 7), HarnessQuestion("b"), HarnessQuestion("c", pictures[0]),
        HarnessQuestion("d", pictures[1]),
    ]  # fmt: skip
    images, prompts = model._prompts(asked, [("x", "y"), (), (), ()])
    assert [image.tobytes() for image in images] == [pictures[n].convert("RGB").tobytes() for n in (1, 0)]
    assert [(p.instruction, p.image, p.history, p.max_new_tokens, p.choices) for p in prompts] == [
        ("[vqa] a", 0, (), 7, ("x", "y")),
        ("[vqa] b", None, (), 20, ()),
        ("[vqa] c", 1, (), 20, ()),
        ("[vqa] d", 0, (), 20, ()),
    ]


def test_an_image_of_another_mode_is_converted_once_and_equal_ones_are_each_encoded(pictures):
    model = object.__new__(InProcessModel)
    model.tag, grey = "", pictures[0].convert("L")
    same = [grey, grey, pictures[1].convert("RGB"), pictures[1].convert("RGB")]
    images, prompts = model._prompts([HarnessQuestion("a", image) for image in same], [()] * 4)
    assert [image.mode for image in images] == ["RGB"] * 3 and [prompt.image for prompt in prompts] == [0, 0, 1, 2]


def test_likelihoods_are_of_the_stripped_text_in_chunks():
    batches = []

    class Ranking:
        def encode(self, images):
            return images

        def choice_losses(self, prompts, embeds):
            batches.append([prompt.choices for prompt in prompts])
            return [(float(len(prompt.choices[0])),) for prompt in prompts]

        def answer(self, prompts, embeds):
            return [Reply("red") for _ in prompts]

    model = object.__new__(InProcessModel)
    model.answerer, model.tag, model.chunk = Ranking(), "", 2
    found = model.log_likelihoods([HarnessQuestion(text) for text in "abc"], [" red", "blue ", "red"])
    assert found == [(-3.0, True), (-4.0, False), (-3.0, True)]
    assert batches == [[("red",), ("blue",)], [("red",)]]
