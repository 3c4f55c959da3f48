"""What a person writes in Python: README's lines, images in any form, answers as text, peft on top."""

from __future__ import annotations

import base64
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.paths import ROOT
from tests.unit.test_hugging_face import PICTURES, PROMPTS, random_model
from tinygptv.checkpoint.checkpoint import save_checkpoint
from tinygptv.data.processing import TinyGPTVProcessor
from tinygptv.miniature.backbones import shipped_model
from tinygptv.miniature.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = random_model()
    processor = TinyGPTVProcessor.from_config(model.config, tiny_tokenizer())
    return save_checkpoint(tmp_path_factory.mktemp("python") / "checkpoint", model, processor, {"stage": 2})


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def test_the_lines_of_readme_ask_a_question(monkeypatch, capsys, tmp_path):
    """As they stand, with the shipped model in the place of the demo's checkpoint."""
    section = (ROOT / "README.md").read_text().partition("## From Python")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert "outputs/demo/stage4/checkpoint" in code and '"photo.jpg"' in code
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").write_bytes((ROOT / "pipelines/serving/ui/example-1.jpg").read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code = code.replace("outputs/demo/stage4/checkpoint", str(shipped_model()))
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "black"


SOURCES = {
    "PIL image": lambda path: {"image": Image.open(path)},
    "text": lambda path: {"image": str(path)},
    "Path": lambda path: {"image": path},
    "path": lambda path: {"path": str(path)},
    "path as Path": lambda path: {"path": path},
    "url": lambda path: {"url": path.as_uri()},
    "url as Path": lambda path: {"url": path},
    "data URL": lambda path: {"url": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()},
    "OpenAI's": lambda path: {"type": "image_url", "image_url": {"url": str(path)}},
}


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "my photo.png"
    PICTURES[0].save(path)
    return path


@pytest.mark.parametrize("form", SOURCES)
def test_every_form_of_an_image_is_read(processor, photo, form):
    turn = [{"role": "user", "content": [{"type": "image", **SOURCES[form](photo)}, {"type": "text", "text": "what?"}]}]
    inputs = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=True)
    wanted = processor(images=[PICTURES[0]], text="what?")
    assert torch.equal(inputs["input_ids"], wanted["input_ids"])
    assert torch.equal(inputs["pixel_values"], wanted["pixel_values"])


def test_plain_text_gets_the_image_and_the_template(processor):
    inputs = processor(images=PICTURES[0], text="what?")
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    rendered = processor(images=PICTURES[0], text=processor.apply_chat_template(turn, add_generation_prompt=True))
    assert torch.equal(inputs["input_ids"], rendered["input_ids"])
    assert (inputs["input_ids"] == processor.image_token_id).sum() == processor.num_query_tokens


@pytest.mark.parametrize("ending", ["###", "####", "###<|endoftext|>", "###<|endoftext|><|endoftext|>", "### "])
def test_no_answer_ends_in_the_end_symbol(processor, ending):
    """Whichever way transformers or a user turns ids into text."""
    ids = processor.tokenizer.encode("a ## dog" + ending)
    kept = [
        processor.decode(ids, skip_special_tokens=True),
        processor.decode_answer(ids),
        *processor.batch_decode([ids], skip_special_tokens=True),
        *processor.post_process_image_text_to_text([ids]),
    ]
    assert {text.strip() for text in kept} == {"a ## dog"}
    assert "#" not in processor.decode(ids).removeprefix("a ## dog")


def test_the_pipeline_takes_plain_text_and_cuts_the_end_symbol(folder, photo, monkeypatch):
    from transformers import pipeline

    chat = pipeline("image-text-to-text", model=str(folder))
    answer = chat.tokenizer.encode("a dog###") if chat.tokenizer else chat.processor.tokenizer.encode("a dog###")

    def generate(**inputs):
        assert (inputs["input_ids"] == chat.processor.image_token_id).sum() == chat.processor.num_query_tokens
        return torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)

    monkeypatch.setattr(chat.model, "generate", generate)
    turn = [{"role": "user", "content": [{"type": "image", "path": str(photo)}, {"type": "text", "text": "what?"}]}]
    assert chat(text=turn, return_full_text=False)[0]["generated_text"] == "a dog"
    assert chat(images=str(photo), text="what?", return_full_text=False)[0]["generated_text"] == "a dog"


@pytest.mark.parametrize(
    ("targets", "name"),
    [(["qkv_proj"], "mine"), (["fc1", "fc2"], "default"), (["qkv_proj", "dense", "fc1", "fc2"], "mine")],
)
def test_peft_on_top_trains_its_own_adapter_only(folder, processor, tmp_path, name, targets):
    """The base stays frozen and as trained, its own adapters included; what was saved loads again."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert model.config.lora_rank
    inputs = processor(images=PICTURES, text=PROMPTS)
    config = {"r": 2, "target_modules": targets, "exclude_modules": ".*(vision_encoder|qformer).*"}
    with torch.no_grad():
        wanted = model(**inputs).logits
        adapted = get_peft_model(model, LoraConfig(**config), adapter_name=name).eval()
        assert torch.allclose(adapted(**inputs).logits, wanted, atol=1e-4)
        trainable = {key for key, parameter in adapted.named_parameters() if parameter.requires_grad}
        assert len(trainable) == 2 * len(targets) * model.config.text_config.num_hidden_layers
        assert all(
            "language_model.layers" in key and f"lora_{key[-len(name) - 9]}.{name}.weight" in key for key in trainable
        )
        for key in trainable:
            adapted.get_parameter(key).normal_(std=0.1)
        changed = adapted(**inputs).logits
        with adapted.disable_adapter():
            assert torch.allclose(adapted(**inputs).logits, wanted, atol=1e-4)
        assert not torch.allclose(changed, wanted, atol=1e-2)
        adapted.save_pretrained(tmp_path)
        again = AutoModelForImageTextToText.from_pretrained(folder).eval()
        again = PeftModel.from_pretrained(
            again, tmp_path / ("" if name == "default" else name), adapter_name=name
        ).eval()
        assert torch.allclose(again(**inputs).logits, changed, atol=1e-4)
        assert torch.allclose(again.merge_and_unload()(**inputs).logits, changed, atol=1e-3)
