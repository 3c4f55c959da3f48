"""Steps in static shapes: the same tokens as step by step, and no wait for the device between launch and read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.serving_model import make_model, make_tokenizer
from tests.unit.inference.test_engine import random_prompts, request, run
from tinygptv.inference.decoder import FlatDecoder
from tinygptv.inference.device_sampling import DeviceSampling, read_back
from tinygptv.inference.engine import Engine
from tinygptv.inference.graph_runner import BUCKETS, GraphRunner, _Ask, _drawn, _Step, _to_host, bucket_of
from tinygptv.inference.graphed_encoder import GraphedEncoder
from tinygptv.inference.runner import Drawn, Piece, Row
from tinygptv.inference.sampling import Sampler, SamplingParams, TokenLogprobs


def test_buckets_hold_every_number_of_rows():
    assert [bucket_of(n) for n in (1, 2, 3, 9, 32, 33, 128)] == [1, 2, 4, 12, 32, 40, 128]
    assert bucket_of(129) == 256
    quarters = [*range(4, 33, 4), *range(40, 65, 8), *range(80, 129, 16)]
    assert list(BUCKETS) == [1, 2, *quarters], "steps of 4, of 8 above 32, of 16 above 64"


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ([{}, {"top_k": 3}], _Ask()),
        ([{}, {"temperature": 0.5}], _Ask(samples=True)),
        ([{"frequency_penalty": 0.5}, {}], _Ask(samples=True, penalises=True)),
        ([{}, {"logprobs": 0}], _Ask(logprobs=True)),
        ([{"logprobs": 2}, {"logit_bias": ((1, 1.0),)}], _Ask(True, True, True)),
    ],
)
def test_a_step_computes_what_any_of_its_requests_asks_for(options, asked):
    runner = GraphRunner(FlatDecoder(make_model(), 3, 16))
    for slot, params in enumerate([*options, {"temperature": 1.0, "logprobs": 1, "presence_penalty": 1.0}]):
        runner.admit(slot, SamplingParams(**params), np.array([1]), 1)
    assert runner._ask([0, 1]) == asked, "not what the others ask for"


def test_what_is_read_of_a_step_is_that_of_its_own_launch():
    """The device's tensor is the next step's by then."""
    result = torch.tensor([[1.0, 2.0]])
    kept = _to_host(result)
    result.zero_()
    assert kept.read() == [[1.0, 2.0]]


OPTIONS = [
    {},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.3, "seed": 4, "top_p": 0.7},
    {"temperature": 1.0, "seed": 5, "top_k": 7},
    {"temperature": 1.0, "seed": 6, "top_k": 20, "top_p": 0.5},
    {"temperature": 1.5, "seed": 7, "min_p": 0.4},
    {"temperature": 1.5, "seed": 9, "min_p": 0.2, "top_p": 0.8},
    {"repetition_penalty": 1.4},
    {"frequency_penalty": 0.8, "presence_penalty": 0.4, "temperature": 0.7, "seed": 8},
    {"logit_bias": ((7, 3.0), (9, -100.0), (7, 1.0))},
]


def test_every_way_of_sampling_gives_the_same_tokens_as_step_by_step():
    model, tokenizer = make_model(), make_tokenizer()
    answers = []
    for runner in ("flat", "graph"):
        engine = Engine(model, tokenizer, max_batch_size=5, prefill_tokens=32, runner=runner)
        for ids, options in zip(random_prompts(len(OPTIONS), seed=2), OPTIONS, strict=True):
            engine.add(request(model, ids, max_tokens=25, ignore_end=True, **options))
        answers.append(run(engine)[0])
    assert answers[0] == answers[1]


def test_rows_draw_as_one_request_draws():
    torch.manual_seed(0)
    vocab_size, length, prompt = 300, 64, np.array([3, 4, 5, 250])
    sampling = DeviceSampling(len(OPTIONS), length, vocab_size, torch.device("cpu"))
    samplers = []
    for slot, options in enumerate(OPTIONS):
        params = SamplingParams(max_tokens=20, **options)
        sampling.admit(slot, params, prompt, len(prompt))
        samplers.append(Sampler(params, prompt.tolist()))
    slots = torch.arange(len(OPTIONS))
    for step in range(20):
        logits = torch.randn(len(OPTIONS), vocab_size) * 3
        positions = torch.full_like(slots, len(prompt) - 1 + step)
        drawn = sampling.draw(logits, slots, positions, penalise=True).tolist()
        assert drawn == [sampler.draw(row) for sampler, row in zip(samplers, logits, strict=True)]


def test_read_back_tells_token_finiteness_and_logprobs():
    logits = torch.randn(3, 50)
    logits[1, 7], logits[2, 8] = torch.nan, -torch.inf
    tokens = logits.nan_to_num().argmax(-1)
    rows = read_back(logits, tokens, logprobs=True)
    assert rows[:, 0].long().tolist() == tokens.tolist()
    assert rows[:, 1].tolist() == [1, 0, 0]
    logprobs = logits[0].log_softmax(-1)
    assert float(rows[0, 2]) == pytest.approx(float(logprobs[tokens[0]]), abs=1e-5)
    assert rows[0, 3:23].long().tolist() == logprobs.topk(20).indices.tolist()
    torch.testing.assert_close(rows[0, 23:], logprobs.topk(20).values)


class _NoWait(TorchDispatchMode):
    """Fails on operations that read the device back to the host."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name.strip("_") not in {n.strip("_") for n in self.WAITING}, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def _fails(*_):
    raise AssertionError("the step waits for the device")


def test_a_step_never_waits_for_the_device(monkeypatch):
    model = make_model()
    runner = GraphRunner(FlatDecoder(model, 3, 96))
    embeds = torch.randn(20, 64)
    params = [
        SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9, seed=1, logprobs=4), SamplingParams(top_k=3),
    ]  # fmt: skip
    for slot, p in enumerate(params):
        runner.admit(slot, p, np.arange(5), 20)
    launches = []
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, _fails)
    with _NoWait():
        launches.append(runner.launch([], [Piece(slot, 0, 20, embeds, is_last=True) for slot in range(3)]))
        launches += [runner.launch([Row(slot, 20 + i) for slot in range(3)], []) for i in range(4)]
    monkeypatch.undo()
    assert all(drawn.is_finite for launch in launches for drawn in launch.read())


def test_the_next_step_is_launched_before_the_last_one_is_read():
    model = make_model()
    engine = Engine(model, make_tokenizer(), max_batch_size=1, runner="graph")
    engine.add(request(model, [1, 2, 3], max_tokens=4, ignore_end=True))
    tokens = [len(dict(engine.step()).get(0).token_ids) if step else len(engine.step()) for step in range(5)]
    assert tokens == [0, 1, 1, 1, 1]
    assert not engine.has_work and engine.stats.steps == 4, "no step beyond the longest answer"


def test_each_penalty_has_its_own_number_on_the_device():
    """As OpenAI defines them: frequency by the count, presence once; repetition divides and multiplies by the sign."""
    sampling = DeviceSampling(2, 16, 5, torch.device("cpu"))
    params = SamplingParams(
        repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((4, 1.0), (4, 2.0))
    )
    sampling.admit(1, params, np.array([0, 1]), 2)
    sampling.penalties.count(torch.tensor([1, 1, 1]), torch.tensor([2, 2, 3]))
    logits = torch.tensor([[4.0, -4.0, 4.0, 4.0, 4.0]])
    found = sampling.penalties.apply(logits, torch.tensor([1]), sampling.options[1:2])
    assert found.tolist() == [[2.0, -8.0, 2.0 - 1.25, 2.0 - 0.75, 7.0]]
    assert logits.tolist() == [[4.0, -4.0, 4.0, 4.0, 4.0]]
    sampling.admit(1, SamplingParams(), np.array([3]), 1)
    penalties = sampling.penalties
    assert penalties.counts.sum() == penalties.bias.sum() == 0 and penalties.seen.nonzero().tolist() == [[1, 3]]


def test_rows_of_nobody_are_the_slot_behind_the_last():
    runner = GraphRunner(FlatDecoder(make_model(), 3, 16))
    assert runner.slots_T.tolist() == [3] * 4
    runner._place([2, 0, 1])
    assert runner.slots_T.tolist() == [2, 0, 1, 3]
    runner._place([1])
    assert runner.slots_T.tolist() == [1, 0, 1, 3], "one row is a bucket of its own"
    runner.warm_up()
    assert runner._rows == [] and runner.lengths_G.tolist() == [0] * 4


def test_what_follows_a_step_is_captured_once_for_each_kind_of_request():
    captured, sampled = [], []

    class Runner:
        slots_T = torch.arange(4)

        def capture(self, function):
            captured.append(function.__name__)
            return function

        def decode(self, bucket):
            return torch.full((bucket, 5), 1.0)

        def sample(self, logits, slots, penalise):
            sampled.append((slots.tolist(), penalise))

        def result(self, logits, slots, logprobs):
            return len(logits), logprobs

    step = _Step(Runner(), 2)
    plain, ranked = _Ask(), _Ask(logprobs=True)
    drawn, penalised = _Ask(samples=True), _Ask(samples=True, penalises=True)
    found = [step.run(ask) for ask in (plain, drawn, penalised, ranked, drawn, plain)]
    assert found == [(2, False), (2, False), (2, False), (2, True), (2, False), (2, False)]
    assert sampled == [([0, 1], False), ([0, 1], True), ([0, 1], False)]
    assert len(captured) == 4, "decoding and three kinds"


def test_images_have_a_graph_for_each_number_of_them():
    encoder = object.__new__(GraphedEncoder)
    encoder.use_graphs, encoder._graphs, captured = True, {}, []
    encoder._capture = lambda held: captured.append(len(held)) or f"graph of {len(held)}"
    found = [encoder._encoder(torch.zeros(size, 3)) for size in (1, 4, 1, 4)]
    assert found == ["graph of 1", "graph of 4"] * 2 and captured == [1, 4]
    encoder.use_graphs, encoder.model = False, make_model()
    assert encoder._encoder(torch.zeros(2, 3)) == encoder.model.encode_images


@pytest.mark.parametrize(
    ("asked", "alternatives"), [(None, None), (0, ()), (1, ((4, -0.5),)), (2, ((4, -0.5), (6, -1.5)))]
)
def test_what_comes_back_is_a_token_and_what_was_asked_for(asked, alternatives):
    row = [4.0, 1.0, -0.5, 4.0, 6.0, -0.5, -1.5]
    found = _drawn(row, SamplingParams(logprobs=asked))
    expected = None if asked is None else TokenLogprobs(4, -0.5, alternatives)
    assert found == Drawn(4, True, expected)
    assert _drawn([4.0, 0.0, *row[2:]], SamplingParams(logprobs=asked)) == Drawn(4, False), (
        "nothing of what is not finite"
    )
