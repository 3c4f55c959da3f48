"""A citizen of transformers: Auto classes, generate in all its ways, attention implementations, dtypes, pipelines."""

from __future__ import annotations

import copy
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    TextIteratorStreamer,
)

import tinygptv
from tinygptv.checkpoint.checkpoint import save_checkpoint
from tinygptv.data.processing import TinyGPTVProcessor, load_tokenizer
from tinygptv.miniature.tiny import tiny_config, tiny_tokenizer
from tinygptv.model.generation import EndSymbolCriteria
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

PROMPTS = ["<Img><ImageHere></Img> what is it?", "hello", "<ImageHere> and <ImageHere>: which is red?"]
NEW = 7


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8))


PICTURES = [picture(0), picture(1), picture(2)]


def random_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = TinyGPTVForConditionalGeneration(tiny_config(**changes)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = random_model()
    processor = TinyGPTVProcessor.from_config(model.config, tiny_tokenizer())
    return save_checkpoint(tmp_path_factory.mktemp("hf") / "checkpoint", model, processor, {"stage": 2, "recipe": "x"})


@pytest.fixture(scope="module")
def model(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None  # so that all answers have one length
    model.generation_config.end_pieces = None
    return model


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def inputs_of(processor, prompts=PROMPTS, pictures=PICTURES):
    return processor(images=pictures or None, text=prompts)


def new_tokens(model, inputs, **settings):
    output = model.generate(**inputs, max_new_tokens=NEW, **{"do_sample": False, **settings})
    return output[:, inputs["input_ids"].shape[1] :]


@pytest.fixture(scope="module")
def greedy(model, processor):
    """The reference: one prompt at a time, the whole sequence again for each token, no cache, no padding."""
    rows, pictures = [], list(PICTURES)
    for prompt in PROMPTS:
        own, pictures = pictures[: prompt.count("<ImageHere>")], pictures[prompt.count("<ImageHere>") :]
        inputs = inputs_of(processor, [prompt], own)
        ids = inputs.pop("input_ids")
        for _ in range(NEW):
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=inputs.get("pixel_values")).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        rows.append(ids[0, -NEW:].tolist())
    assert len({tuple(row) for row in rows}) == len(rows)
    return rows


# ------------------------------------------------------------------ saving and loading


def test_auto_classes_give_ours(folder, model, processor):
    assert type(AutoConfig.from_pretrained(folder)) is tinygptv.TinyGPTVConfig
    assert type(model) is tinygptv.TinyGPTVForConditionalGeneration
    assert type(processor) is tinygptv.TinyGPTVProcessor


def test_sharded_folder_loads_the_same(tmp_path, model):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())) > 1
    again = TinyGPTVForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_model_card_tells_what_the_folder_is(folder, model):
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "Made by stage 2 of the recipe `x`" in card
    assert f"{sum(p.numel() for p in model.parameters()):,}" in card and "'###'" in card


def test_dtype_is_honoured_and_norms_stay_float32(folder, model, processor):
    half = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in half.named_parameters()}
    assert dtypes["language_model.layers.0.mlp.fc1.weight"] == dtypes["lm_head.weight"] == torch.bfloat16
    assert dtypes["language_model.layers.0.self_attn.q_layernorm.weight"] == torch.float32
    assert dtypes["projector.linear_1.weight"] == torch.float32
    inputs = inputs_of(processor)
    with torch.no_grad():
        ours, wanted = half(**inputs).logits, model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert ours.dtype == torch.float32
    assert (ours - wanted)[real].abs().max() < 0.05 * wanted[real].abs().max()


@pytest.mark.parametrize("device_map", ["cpu", "offloaded"])
def test_device_map(folder, model, processor, tmp_path, device_map):
    parts = dict.fromkeys(("vision_encoder", "qformer", "projector", "lm_head"), "cpu")
    mapped = {**parts, "language_model": "disk"} if device_map == "offloaded" else device_map
    placed = AutoModelForImageTextToText.from_pretrained(folder, device_map=mapped, offload_folder=tmp_path)
    inputs = inputs_of(processor)
    with torch.no_grad():
        assert torch.equal(placed(**inputs).logits, model(**inputs).logits)


# ------------------------------------------------------------------ generation


def test_left_padded_batch_equals_single_prompts(model, processor, greedy):
    """Several images, one, and none in one batch."""
    assert new_tokens(model, inputs_of(processor)).tolist() == greedy
    assert new_tokens(model, inputs_of(processor), use_cache=False).tolist() == greedy


def test_cached_features_and_ready_embeddings_stand_for_pixels(model, processor, greedy):
    inputs = inputs_of(processor)
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        features, embeds = model.encode_query_features(pixels), model.encode_images(pixels)
    assert new_tokens(model, {**inputs, "query_features": features}).tolist() == greedy
    assert new_tokens(model, {**inputs, "image_embeds": embeds}).tolist() == greedy


def test_sampling(model, processor, greedy):
    inputs = inputs_of(processor)
    assert new_tokens(model, inputs, do_sample=True, top_k=1).tolist() == greedy
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(new_tokens(model, inputs, do_sample=True, top_k=0, num_return_sequences=2).tolist())
    assert draws[0] == draws[1] != draws[2] and len(draws[0]) == 6


def score_of(model, processor, prompt, pictures, tokens):
    """Log-probability of an answer."""
    inputs = inputs_of(processor, [prompt], pictures)
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=inputs.get("pixel_values")).logits[0, -len(tokens) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(tokens)), tokens].sum())


def test_beams_find_likelier_answers_and_keep_rows_apart(model, processor, greedy):
    beams = new_tokens(model, inputs_of(processor), num_beams=4).tolist()
    pictures = list(PICTURES)
    for prompt, found, plain in zip(PROMPTS, beams, greedy, strict=True):
        own, pictures = pictures[: prompt.count("<ImageHere>")], pictures[prompt.count("<ImageHere>") :]
        alone = new_tokens(model, inputs_of(processor, [prompt], own), num_beams=4).tolist()
        assert found == alone[0]
        scores = [score_of(model, processor, prompt, own, tokens) for tokens in (found, plain)]
        assert scores[0] >= scores[1] - 1e-4


@pytest.mark.parametrize("index", range(len(PROMPTS)))
def test_candidates_of_an_assistant_or_of_the_prompt_change_nothing(model, processor, greedy, index):
    first = sum(prompt.count("<ImageHere>") for prompt in PROMPTS[:index])
    own = PICTURES[first : first + PROMPTS[index].count("<ImageHere>")]
    inputs = inputs_of(processor, [PROMPTS[index]], own)
    assistant = random_model(seed=5, lora_rank=0)
    assistant.generation_config.eos_token_id = None
    assert new_tokens(model, inputs, assistant_model=assistant).tolist() == [greedy[index]]
    assert new_tokens(model, inputs, prompt_lookup_num_tokens=3).tolist() == [greedy[index]]


def test_streaming(model, processor, greedy):
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
    inputs = inputs_of(processor, PROMPTS[:1], PICTURES[:1])
    thread = threading.Thread(target=new_tokens, args=(model, inputs), kwargs={"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == processor.tokenizer.decode(greedy[0])


def test_a_missing_image_is_named(model, processor):
    inputs = inputs_of(processor)
    with pytest.raises(ValueError, match=r"image positions but 2 images|positions for 3 images but 2"):
        new_tokens(model, {**inputs, "pixel_values": inputs["pixel_values"][:2]})
    with pytest.raises(ValueError, match="3 <ImageHere> but 1 images were given"):
        inputs_of(processor, PROMPTS, PICTURES[:1])


# ------------------------------------------------------------------ the end of an answer


def test_answers_end_at_the_end_symbol(folder, processor):
    """A model that only says '#' stops after three of them: the symbol in pieces, as this tokenizer has no '###'."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    hash_id = processor.tokenizer.convert_tokens_to_ids("#")
    model.lm_head.bias.data[hash_id] = 1e4
    inputs = inputs_of(processor, ["###"], [])
    assert new_tokens(model, inputs).tolist() == [[hash_id] * 3]
    assert new_tokens(model, inputs, generation_config=GenerationConfig()).tolist() == [[hash_id] * 3]


def test_an_end_symbol_of_one_token_is_an_end_token():
    config = tiny_config(template="caption")
    processor = TinyGPTVProcessor.from_config(config, tiny_tokenizer())
    settings = GenerationConfig()
    processor.set_end_symbol(settings)
    newline = processor.tokenizer.encode("\n")
    assert settings.eos_token_id == [0, *newline] and settings.end_pieces == {}


@pytest.mark.parametrize(
    ("texts", "length"),
    [(["#", "##"], 2), (["##", "#"], 2), (["a#", "##", "x"], 2), (["#", "#", "a", "#"], None), (["a##", "#b"], 2)],
)
def test_an_end_symbol_is_found_however_it_is_cut(texts, length):
    criteria = EndSymbolCriteria("###", {i: text for i, text in enumerate(texts)})
    stopped = None
    for count in range(1, len(texts) + 1):
        row = torch.tensor([[90, 91, *range(count)]])
        if stopped is None and criteria(row, None)[0]:
            stopped = count
    assert stopped == length


# ------------------------------------------------------------------ attention and checkpointing


def test_attention_implementations_agree(folder, model, processor):
    inputs = inputs_of(processor)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        wanted = model(**inputs).logits[real]
    for name in ("eager", "flex_attention"):
        other = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=name)
        assert other.language_model.config._attn_implementation == name
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # flex attention would be compiled for minutes
            assert (other(**inputs).logits[real] - wanted).abs().max() < 1e-4 * wanted.abs().max(), name


def test_gradient_checkpointing_changes_no_number(model):
    ids = torch.arange(1, 41).view(2, 20)
    results = []
    for checkpointing in (False, True):
        copied = copy.deepcopy(model).requires_grad_(True).train()
        if checkpointing:
            copied.gradient_checkpointing_enable({"use_reentrant": False})
            assert (
                copied.language_model.gradient_checkpointing or copied.language_model.layers[0].gradient_checkpointing
            )
        loss = copied(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in copied.named_parameters() if p.grad is not None}))
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.equal(loss, other_loss) and gradients.keys() == other_gradients.keys()
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


# ------------------------------------------------------------------ templates


def test_chat_template_is_the_layout_of_training(processor):
    """What a pipeline renders is, token for token, what training sees before the answer."""
    from tinygptv.data.prompt_layout import Exchange

    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
        {"role": "user", "content": [{"type": "text", "text": "colour?"}]},
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    ids = processor(images=PICTURES[:1], text=text)["input_ids"][0].tolist()
    wanted = processor.layout().encode_prompt([Exchange("what?", "a dog", 1), Exchange("colour?")])
    assert ids == wanted


def test_a_tokenizer_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"no tokenizer in {tmp_path}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"bos_token": None}, ("</s>", "</s>", "</s>")),
        ({"bos_token": None, "eos_token": None}, ("<|endoftext|>", "<|endoftext|>", "</s>")),
        ({"eos_token": None, "pad_token": None}, ("<s>", "<s>", "<s>")),
        ({}, ("<s>", "</s>", "</s>")),
    ],
)
def test_a_tokenizer_that_names_no_bos_or_eos_is_completed(tmp_path, changes, wanted):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"})
    for role, token in changes.items():
        setattr(tokenizer, role, token)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == wanted
    assert all(isinstance(getattr(loaded, f"{role}_token_id"), int) for role in ("bos", "eos", "pad"))


def test_a_tokenizer_without_any_such_token_is_refused(tmp_path):
    config = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    config["model"]["vocab"] = {k: v for k, v in config["model"]["vocab"].items() if k != "<|endoftext|>"}
    config["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match=r"'<\|endoftext\|>' is not in its vocabulary: set bos_token"):
        load_tokenizer(tmp_path)


def test_images_follow_their_rows_when_these_are_repeated():
    torch.manual_seed(0)
    model = TinyGPTVForConditionalGeneration(tiny_config())
    image, queries = model.config.image_token_id, model.config.num_query_tokens
    rows = [[image] * 2 * queries + [1], [2] * 2 * queries + [1], [image] * queries + [1] * (queries + 1)]
    pixels = torch.arange(3.0).reshape(3, 1, 1, 1)
    ids, more = model._expand_inputs_for_generation(2, input_ids=torch.tensor(rows), pixel_values=pixels)
    assert ids.tolist() == [row for row in rows for _ in range(2)]
    assert more["pixel_values"].ravel().tolist() == [0, 1, 0, 1, 2, 2]
    with pytest.raises(ValueError, match="positions for 3 images but 2 were given"):
        model._expand_inputs_for_generation(2, input_ids=torch.tensor(rows), pixel_values=pixels[:2])
