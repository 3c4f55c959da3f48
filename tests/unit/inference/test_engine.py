"""The engine against transformers' ``generate``: same greedy ids, whoever else is in the batch."""

from __future__ import annotations

import functools
import sys

import numpy as np
import pytest
import torch

from tests.serving_model import make_config, make_model, make_tokenizer
from tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.inference import engine as engine_module
from tinygptv.inference.engine import Engine
from tinygptv.inference.request import PromptTooLong, Request
from tinygptv.inference.sampling import SamplingParams


@pytest.fixture(autouse=True, params=["flat", "graph"])
def runner(request, monkeypatch):
    """Every test runs with both runners: step by step, and one step ahead in static shapes."""
    chosen = functools.partial(engine_module.Engine, runner=request.param)
    monkeypatch.setattr(sys.modules[__name__], "Engine", chosen)
    return request.param


def generate(model, ids, max_tokens):
    prompt = torch.tensor(ids)[None]
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
    )
    return output[0, len(ids) :].tolist()


def request(model, ids, **params):
    ids = np.asarray(ids, dtype=np.int64)
    return Request(ids, model.get_input_embeddings()(torch.from_numpy(ids)), SamplingParams(**params))


def run(engine):
    """Step until nothing is left; ids, text, last reason and reused positions by request."""
    ids, text, reasons, reused = {}, {}, {}, {}
    while engine.has_work:
        for key, delta in engine.step():
            ids.setdefault(key, []).extend(delta.token_ids)
            text[key] = text.get(key, "") + delta.text
            reused[key] = reused.get(key, 0) + delta.num_reused
            reasons[key] = delta.finish_reason
    return ids, text, reasons, reused


def random_prompts(count, seed, longest=90):
    rng = np.random.default_rng(seed)
    common = rng.integers(1, 390, 60)
    prompts = []
    for i in range(count):
        ids = rng.integers(1, 390, int(rng.integers(1, longest)))
        prompts.append(np.concatenate([common[: int(rng.integers(4, 50))], ids]) if i % 3 == 0 else ids)
    return prompts


@pytest.mark.parametrize("lora", [False, True])
def test_greedy_equals_generate_while_requests_join_and_leave(lora):
    model = make_model(lora=lora)
    engine = Engine(model, make_tokenizer(), max_batch_size=5, prefill_tokens=16)
    rng = np.random.default_rng(7)
    wanted, got, waiting = {}, {}, random_prompts(16, seed=1)
    while waiting or engine.has_work:
        for _ in range(int(rng.integers(0, 3))):
            if waiting:
                ids, max_tokens = waiting.pop(), int(rng.integers(1, 30))
                wanted[engine.add(request(model, ids, max_tokens=max_tokens))] = generate(model, ids, max_tokens)
        for key, delta in engine.step():
            got.setdefault(key, []).extend(delta.token_ids)
    assert got == wanted
    assert len({tuple(ids) for ids in wanted.values()}) > 12, "a test of one answer proves nothing"
    assert engine.stats.reused_tokens > 0
    assert engine.prefix_cache.num_free == 5


@pytest.mark.parametrize("norm", ["qk_layernorm", "attention_rmsnorm", "input_layernorm"])
def test_switched_off_norms_work(norm):
    torch.manual_seed(3)
    config = make_config(lora_rank=0)
    setattr(config.text_config, norm, False)
    model = TinyGPTVForConditionalGeneration(config).eval().requires_grad_(False)
    model.lm_head.weight.normal_(0, 0.5)
    engine = Engine(model, make_tokenizer(), max_batch_size=2)
    ids = [5, 9, 200, 31, 77]
    key = engine.add(request(model, ids, max_tokens=12))
    assert run(engine)[0][key] == generate(model, ids, 12)


def test_half_precision_runs_and_agrees_with_its_own_generate():
    model = TinyGPTVForConditionalGeneration(make_config(lora_rank=0)).eval().requires_grad_(False)
    model.load_state_dict(make_model().state_dict())
    for module in (*model.language_model.modules(), model.lm_head):
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):  # norms stay float32, as in a loaded checkpoint
            module.to(torch.bfloat16)
    engine = Engine(model, make_tokenizer(), max_batch_size=2)
    assert engine.decoder.cache.dtype == torch.bfloat16
    key = engine.add(request(model, [5, 9, 200], max_tokens=4))
    assert run(engine)[0][key] == generate(model, [5, 9, 200], 4)


def test_a_cache_of_half_the_memory_changes_logits_by_rounding_only():
    model, prompt = make_model(), np.random.default_rng(0).integers(1, 390, 40)
    logprobs = {}
    for dtype in ("auto", "bfloat16"):
        engine = Engine(model, make_tokenizer(), max_batch_size=2, prefill_tokens=16, kv_cache_dtype=dtype)
        engine.add(request(model, prompt, max_tokens=2, logprobs=1))
        logprobs[dtype] = []
        while engine.has_work:
            logprobs[dtype] += [entry.logprob for _, delta in engine.step() for entry in delta.logprobs]
        assert engine.decoder.cache.dtype == {"auto": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    assert logprobs["auto"] != logprobs["bfloat16"]
    assert logprobs["bfloat16"] == pytest.approx(logprobs["auto"], abs=0.1)
    with pytest.raises(ValueError, match="kv_cache_dtype is 'int3'; choose one of auto, bfloat16"):
        Engine(model, make_tokenizer(), kv_cache_dtype="int3")


def test_a_long_prompt_does_not_stop_answers():
    model = make_model()
    engine = Engine(model, make_tokenizer(), max_batch_size=2, prefill_tokens=8)
    first = engine.add(request(model, [1, 2, 3], max_tokens=60, ignore_end=True))
    engine.step()
    engine.add(request(model, list(range(1, 161)), max_tokens=1, ignore_end=True))
    for _ in range(160 // 8):
        assert first in [key for key, _ in engine.step()], "the running answer got no token in this step"
    for _ in range(engine.runner.num_ahead):
        engine.step()
    assert engine.stats.finished == 1


def test_common_beginnings_are_read_once():
    model = make_model()
    engine = Engine(model, make_tokenizer(), max_batch_size=3)
    turn = list(range(10, 50))
    first = engine.add(request(model, turn, max_tokens=5, ignore_end=True))
    answer = run(engine)[0][first]
    longer = [*turn, *answer[:4], 60, 61, 62]
    again = engine.add(request(model, longer, max_tokens=6, ignore_end=True))
    ids, _, _, reused = run(engine)
    assert reused[again] == len(turn) + 4
    fresh = Engine(model, make_tokenizer(), max_batch_size=1)
    alone = fresh.add(request(model, longer, max_tokens=6, ignore_end=True))
    assert run(fresh)[0][alone] == ids[again]


def test_the_beginning_of_a_running_request_is_copied():
    model = make_model()
    engine = Engine(model, make_tokenizer(), max_batch_size=2)
    prompt = list(range(10, 50))
    engine.add(request(model, prompt, max_tokens=30, ignore_end=True))
    engine.step()
    second = engine.add(request(model, [*prompt[:30], 7, 8], max_tokens=5, ignore_end=True))
    ids, _, _, reused = run(engine)
    assert reused[second] == 30
    fresh = Engine(model, make_tokenizer(), max_batch_size=1)
    alone = fresh.add(request(model, [*prompt[:30], 7, 8], max_tokens=5, ignore_end=True))
    assert run(fresh)[0][alone] == ids[second]


def test_images_with_other_numbers_share_nothing():
    model = make_model()
    engine = Engine(model, make_tokenizer(), max_batch_size=2)
    embeds = torch.randn(2, 20, 64)
    for number in (-5, -6):
        ids = np.array([number] * 16 + [1, 2, 3, 4])
        key = engine.add(Request(ids, embeds[number + 6], SamplingParams(max_tokens=2)))
        assert run(engine)[3][key] == 0


def test_cancelling_frees_the_slot_before_the_next_step():
    model = make_model()
    engine = Engine(model, make_tokenizer(), max_batch_size=1)
    first = engine.add(request(model, [1, 2, 3], max_tokens=100, ignore_end=True))
    second = engine.add(request(model, [4, 5, 6], max_tokens=3, ignore_end=True))
    engine.step()
    engine.cancel(first)
    results = dict(engine.step())
    assert results[first].finish_reason == "cancelled"
    assert engine.stats.running == 1 and engine.stats.waiting == 0
    tokens = results[second].token_ids if second in results else []
    assert tokens + run(engine)[0][second] == generate(model, [4, 5, 6], 3)
    engine.cancel(first)  # known no more: ignored
    assert engine.stats.cancelled == 1 and not engine.has_work


def test_a_waiting_request_can_be_cancelled():
    model = make_model()
    engine = Engine(model, make_tokenizer(), max_batch_size=1)
    engine.add(request(model, [1, 2, 3], max_tokens=5, ignore_end=True))
    waiting = engine.add(request(model, [4, 5, 6], max_tokens=5))
    engine.step()
    engine.cancel(waiting)
    assert run(engine)[2][waiting] == "cancelled"
    assert engine.prefix_cache.num_free == 1


def test_stop_strings_and_length_end_an_answer():
    model, tokenizer = make_model(), make_tokenizer()
    engine = Engine(model, tokenizer, max_batch_size=2)
    plain = engine.add(request(model, [11, 12, 13], max_tokens=30, ignore_end=True))
    ids, texts, reasons, _ = run(engine)
    assert reasons[plain] == "length" and len(ids[plain]) == 30
    text = texts[plain]
    stop = text[10:13]
    cut = engine.add(request(model, [11, 12, 13], max_tokens=30, ignore_end=True, stop=(stop,)))
    ids, texts, reasons, _ = run(engine)
    assert reasons[cut] == "stop"
    assert texts[cut] == text[: text.index(stop)].rstrip()
    assert len(ids[cut]) < 30


def test_end_of_text_token_ends_an_answer():
    model = make_model()
    engine = Engine(model, make_tokenizer(), max_batch_size=1)
    key = engine.add(request(model, [11, 12, 13], max_tokens=30, logit_bias=((0, 1000.0),)))
    ids, texts, reasons, _ = run(engine)
    assert (ids[key], texts[key], reasons[key]) == ([0], "", "stop")


def test_ignore_end_runs_past_the_end_of_text_and_the_stop_string():
    model, bias = make_model(), ((0, 1000.0),)
    engine = Engine(model, make_tokenizer(), max_batch_size=1, stop=("###",))
    key = engine.add(request(model, [11, 12, 13], max_tokens=7, ignore_end=True, logit_bias=bias))
    ids, _, reasons, _ = run(engine)
    assert (ids[key], reasons[key]) == ([0] * 7, "length")
    (hash_id,) = make_tokenizer().encode("#", add_special_tokens=False)
    said = ((hash_id, 1000.0),)
    key = engine.add(request(model, [11, 12, 13], max_tokens=7, ignore_end=True, logit_bias=said))
    ids, texts, reasons, _ = run(engine)
    assert (ids[key], texts[key], reasons[key]) == ([hash_id] * 7, "#" * 7, "length")
    key = engine.add(request(model, [11, 12, 13], max_tokens=7, logit_bias=said))
    _, texts, reasons, _ = run(engine)
    assert (texts[key], reasons[key]) == ("", "stop")


def test_the_context_bounds_prompt_and_answer():
    model = make_model()
    engine = Engine(model, make_tokenizer(), max_batch_size=1, context_length=32)
    with pytest.raises(PromptTooLong, match="32"):
        engine.add(request(model, list(range(1, 33))))
    key = engine.add(request(model, list(range(1, 31)), max_tokens=50, ignore_end=True))
    ids, _, reasons, _ = run(engine)
    assert len(ids[key]) == 2 and reasons[key] == "length"
    with pytest.raises(ValueError, match="positions"):
        Engine(model, make_tokenizer(), context_length=10_000)


def test_unknown_bias_token_is_refused():
    model = make_model()
    engine = Engine(model, make_tokenizer(), max_batch_size=1)
    with pytest.raises(ValueError, match="99999"):
        engine.add(request(model, [1], logit_bias=((99999, 1.0),)))


def test_a_spoilt_request_fails_alone_and_leaves_no_trace():
    model = make_model()
    engine = Engine(model, make_tokenizer(), max_batch_size=2)
    good = engine.add(request(model, [1, 2, 3], max_tokens=20, ignore_end=True))
    bad = request(model, list(range(1, 41)), max_tokens=20)
    bad.inputs_embeds[5] = float("nan")
    spoilt = engine.add(bad)
    ids, _, reasons, _ = run(engine)
    assert reasons == {good: "length", spoilt: "error"}
    assert engine.decoder.cache.isfinite().all()
    again = engine.add(request(model, list(range(1, 41)), max_tokens=20, ignore_end=True))
    short = engine.add(request(model, [1, 2, 3], max_tokens=20, ignore_end=True))
    ids_after, _, _, reused = run(engine)
    assert ids_after[short] == ids[good] and len(ids_after[again]) == 20
    assert reused[again] == 0, "nothing of the spoilt request may be reused"


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(monkeypatch):
    model = make_model()
    engine = Engine(model, make_tokenizer(), max_batch_size=1)
    first = engine.add(request(model, [1, 2, 3], max_tokens=20))
    waiting = engine.add(request(model, [4, 5], max_tokens=2, ignore_end=True))
    launch = engine.runner.launch

    def broken(*args):
        monkeypatch.setattr(engine.runner, "launch", launch)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.runner, "launch", broken)
    results = dict(engine.step())
    assert results[first].finish_reason == "error" and "out of memory" in results[first].error
    assert run(engine)[2] == {waiting: "length"}
    assert engine.prefix_cache.num_free == 1


def test_seeded_sampling_does_not_depend_on_the_batch():
    model = make_model()
    options = {"max_tokens": 15, "temperature": 0.9, "top_p": 0.9, "seed": 5, "ignore_end": True}
    alone = Engine(model, make_tokenizer(), max_batch_size=1)
    key = alone.add(request(model, [1, 2, 3], **options))
    wanted = run(alone)[0][key]
    engine = Engine(model, make_tokenizer(), max_batch_size=4)
    for seed in range(3):
        engine.add(request(model, [4 + seed, 5], max_tokens=9, temperature=1.5, seed=seed))
    key = engine.add(request(model, [1, 2, 3], **options))
    assert run(engine)[0][key] == wanted
    other = engine.add(request(model, [1, 2, 3], **{**options, "seed": 6}))
    assert run(engine)[0][other] != wanted


def test_logprobs_are_those_of_the_model():
    model = make_model()
    engine = Engine(model, make_tokenizer(), max_batch_size=1)
    engine.add(request(model, [1, 2, 3], max_tokens=2, logprobs=3, temperature=2.0, seed=1, ignore_end=True))
    entries = [delta.logprobs[0] for _ in range(2) for _, delta in engine.step()]
    logprobs = model(input_ids=torch.tensor([[1, 2, 3]])).logits[0, -1].log_softmax(-1)
    assert entries[0].logprob == pytest.approx(float(logprobs[entries[0].token_id]), abs=1e-4)
    assert [token for token, _ in entries[0].alternatives] == logprobs.topk(3).indices.tolist()
