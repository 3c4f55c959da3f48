"""Answering on a CUDA card: the answers of the CPU, graphs and steps in turn, every format of artifacts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.serving_model import make_image, make_model, make_processor, make_tokenizer
from tinygptv.checkpoint.folders import write_folder
from tinygptv.data.conversation import ChatMessage
from tinygptv.inference.assistant import Assistant
from tinygptv.inference.engine import Engine
from tinygptv.inference.graph_runner import GraphRunner
from tinygptv.inference.graphed_encoder import GraphedEncoder
from tinygptv.inference.loading import load_for_inference
from tinygptv.inference.request import Request
from tinygptv.inference.sampling import SamplingParams
from tinygptv.kernels import reference
from tinygptv.kernels.shapes import PackedWeight, pack_codes
from tinygptv.quantization.artifact import METHODS, write_artifact
from tinygptv.quantization.linear_cpu import Int4Linear
from tinygptv.quantization.linear_packed import PackedLinear, from_int4
from tinygptv.quantization.linear_tinygemm import TinygemmLinear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]

OPTIONS = [
    {},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.3, "seed": 4, "top_p": 0.7},
    {"temperature": 1.0, "seed": 6, "top_k": 20, "top_p": 0.5, "logprobs": 3},
    {"repetition_penalty": 1.4},
    {"frequency_penalty": 0.8, "presence_penalty": 0.4},
    {"logit_bias": ((7, 3.0), (9, -100.0))},
]


def cuda_model(dtype=torch.float32):
    return make_model().to("cuda", dtype)


def prompts(count, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 390, int(rng.integers(3, 90))) for _ in range(count)]


def answers(engine, ids, **params):
    """Ids of each answer, added while others run."""
    got, keys, waiting = {}, [], list(ids)
    while waiting or engine.has_work:
        if waiting:
            prompt = waiting.pop(0)
            embeds = engine.decoder.embed(torch.from_numpy(prompt).to(engine.decoder.device))
            options = params.get(str(len(keys)), {})
            keys.append(engine.add(Request(prompt, embeds, SamplingParams(**{"max_tokens": 20, **options}))))
        for key, delta in engine.step():
            assert not delta.error
            got.setdefault(key, []).extend(delta.token_ids)
    return [got[key] for key in keys]


@pytest.mark.parametrize("options", OPTIONS)
def test_float32_answers_are_the_cpus(options):
    ids = prompts(12)
    wanted = answers(Engine(make_model(), make_tokenizer(), max_batch_size=5), ids, **{"3": options, "7": options})
    engine = Engine(cuda_model(), make_tokenizer(), max_batch_size=5)
    assert isinstance(engine.runner, GraphRunner) and engine.runner.use_graphs
    assert answers(engine, ids, **{"3": options, "7": options}) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_those_of_the_model_within_rounding(dtype):
    model = cuda_model(dtype)
    engine = Engine(model, make_tokenizer(), max_batch_size=3)
    for ids in prompts(3, seed=5):
        embeds = engine.decoder.embed(torch.from_numpy(ids).cuda())
        engine.add(Request(ids, embeds, SamplingParams(max_tokens=1, logprobs=5, ignore_end=True)))
        expected = model(input_ids=torch.from_numpy(ids).cuda()[None]).logits[0, -1].log_softmax(-1)
        entries = [entry for _ in range(2) for _, delta in engine.step() for entry in delta.logprobs]
        values = expected[[token for token, _ in entries[0].alternatives]]
        torch.testing.assert_close(
            torch.tensor([value for _, value in entries[0].alternatives]), values.float().cpu(), atol=0.1, rtol=0.02
        )


@pytest.mark.parametrize("kind", ["nf4", "int4", "int8"])
@pytest.mark.parametrize("tokens", [1, 5, 16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_with_packed_weights(kind, tokens, dtype):
    outputs, inputs, group = 192, 1344, 64
    lowbit, lowbit_rows = (pytest.importorskip(f"tinygptv.kernels.{name}") for name in ("lowbit", "lowbit_rows"))
    if kind == "int8":
        codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device="cuda")
        weight = PackedWeight(codes, torch.rand(outputs, 1, device="cuda") / 100, None, None, inputs, inputs)
    else:
        codes = pack_codes(torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, device="cuda"))
        scale = torch.rand(outputs, 22, device="cuda").half() / 10
        table = torch.linspace(-1, 1, 16, device="cuda").bfloat16().float()
        weight = PackedWeight(codes, scale, scale / 3 if kind == "int4" else None, table, group, inputs)
    x = torch.randn(tokens, inputs, device="cuda").to(dtype)
    expected = reference.partial_products(x, weight)[0]
    for ops in (lowbit, lowbit_rows):
        products = ops.partial_products(x, weight).sum(0)
        torch.testing.assert_close(products, expected, atol=0.02, rtol=0.01)
        torch.testing.assert_close(ops.unpack(weight, torch.float32), reference.unpack(weight, torch.float32))


@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_torchs_four_bit_kernel(tokens):
    linear = torch.nn.Linear(256, 64).requires_grad_(False)
    stored = Int4Linear.pack(linear, "cpu")
    fast = from_int4(stored, "cuda", torch.bfloat16)
    assert isinstance(fast, TinygemmLinear)
    plain = from_int4({key: tensor.clone() for key, tensor in stored.items()}, "cuda", torch.float32)
    assert isinstance(plain, PackedLinear)
    x = torch.randn(tokens, 256, device="cuda").bfloat16()
    torch.testing.assert_close(fast(x).float(), plain(x.float()), atol=0.02, rtol=0.02)
    torch.testing.assert_close(
        fast.unpack().float(), reference.unpack(plain.packed, torch.float32), atol=1e-3, rtol=1e-2
    )


@pytest.mark.parametrize("method", METHODS)
def test_artifacts_load_and_answer(method, tmp_path):
    if method == "nf4":
        pytest.importorskip("bitsandbytes", reason="writing NF4 needs it")
    folder = tmp_path / method
    write_folder(folder, lambda staging: write_artifact(staging, make_model(), make_processor(), method, "cuda"))
    texts = []
    for device in ("cpu", "cuda"):
        model, processor = load_for_inference(folder, device)
        ids = torch.arange(1, 41, device=device).reshape(2, 20)
        with torch.inference_mode():
            texts.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().cpu())
        assistant = Assistant(model, processor, max_batch_size=2)
        message = ChatMessage("user", "what is it?", (assistant.open(make_image()),))
        assert assistant.answer([message], SamplingParams(max_tokens=8))
        assistant.close()
    assert float((texts[1] - texts[0]).norm() / texts[0].norm()) < 0.05


def test_images_are_encoded_as_on_the_cpu():
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    expected = torch.stack(GraphedEncoder(make_model()).encode(pixels))
    encoder = GraphedEncoder(cuda_model())
    for count in (5, 1, 2, 5):
        embeds = torch.stack(encoder.encode(pixels[:count]))
        torch.testing.assert_close(embeds.cpu(), expected[:count], atol=1e-4, rtol=1e-3)


def test_a_spoilt_request_fails_alone():
    engine = Engine(cuda_model(), make_tokenizer(), max_batch_size=2)
    ids = np.arange(1, 30)
    embeds = engine.decoder.embed(torch.from_numpy(ids).cuda())
    spoilt = embeds.clone()
    spoilt[5] = float("nan")
    keys = [engine.add(Request(ids, e, SamplingParams(max_tokens=6, ignore_end=True))) for e in (spoilt, embeds)]
    reasons = {}
    while engine.has_work:
        reasons.update({key: delta.finish_reason for key, delta in engine.step() if delta.finish_reason})
    assert reasons == {keys[0]: "error", keys[1]: "length"}
    assert engine.decoder.cache.isfinite().all()
