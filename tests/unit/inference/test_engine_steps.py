"""The engine's accounts: who is read and answered in which step, what is counted, why an answer ends."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.scripted_engine import BROKEN, END, WORD, finish, make, prompt, request
from tests.serving_model import VOCAB_SIZE, make_model, make_tokenizer
from tinygptv.inference import engine as engine_module
from tinygptv.inference import graph_runner
from tinygptv.inference.engine import Engine
from tinygptv.inference.runner import FlatRunner
from tinygptv.inference.sampling import SamplingParams


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_prompts_share_what_a_step_may_read_first_come_first_served(model):
    engine = make(model, max_batch_size=4, prefill_tokens=8)
    for length in (250, 240, 200):
        engine.add(request(prompt(length), max_tokens=4))
    engine.step()
    engine.step()
    assert engine.runner.launches[0] == ([], [(0, 0, 250, True), (1, 0, 240, True), (2, 0, 22, False)]), "512 in all"
    assert engine.runner.launches[1] == ([(0, 250), (1, 240)], [(2, 22, 30, False)]), "8 where answers wait"
    assert (engine.stats.running, engine.stats.waiting, engine.stats.steps) == (3, 0, 2)


def test_what_the_end_of_a_prompt_leaves_of_a_step_is_the_next_prompts(model):
    engine = make(model, max_batch_size=4, prefill_tokens=40)
    for length in (250, 240, 200, 100):
        engine.add(request(prompt(length), max_tokens=9))
    for _ in range(6):
        engine.step()
    assert engine.runner.launches[4][1] == [(2, 142, 182, False)]
    assert engine.runner.launches[5][1] == [(2, 182, 200, True), (3, 0, 22, False)]


def test_a_share_above_512_holds_where_nobody_answers_too(model):
    engine = make(model, max_batch_size=3, prefill_tokens=520)
    for length in (250, 240, 200):
        engine.add(request(prompt(length), max_tokens=4))
    engine.step()
    assert [piece[2] for piece in engine.runner.launches[0][1]] == [250, 240, 30]


def test_rows_are_in_the_order_of_their_slots_whoever_came_first(model):
    engine = make(model)
    for length, count in ((10, 1), (20, 6), (30, 3)):
        engine.add(request(prompt(length), max_tokens=count))
    finish(engine)
    rows = [rows for rows, _ in engine.runner.launches]
    assert rows == [[], [(1, 20)], [(0, 30), (1, 21)], [(0, 31), (1, 22)], [(1, 23)], [(1, 24)]]


@pytest.mark.parametrize(
    ("device", "asked", "given", "uses_graph", "share"),
    [
        ("cpu", {}, 0, False, 128),
        ("cuda", {}, 0, True, 512),
        ("cuda", {"runner": "auto"}, 77, True, 77),
        ("cuda", {"runner": "flat"}, 0, False, 512),
        ("cpu", {"runner": "graph"}, 99, True, 99),
    ],
)
def test_graphs_and_larger_shares_are_for_gpus_unless_the_caller_chooses(
    model, monkeypatch, device, asked, given, uses_graph, share
):
    made = []
    decoder = SimpleNamespace(device=torch.device(device))
    monkeypatch.setattr(engine_module, "FlatDecoder", lambda *sizes: made.append(sizes) or decoder)
    monkeypatch.setattr(engine_module, "slots_that_fit", lambda model, wanted, length, dtype: made.append(dtype) or 3)
    monkeypatch.setattr(engine_module, "_build_runner", lambda decoder, use_graph: use_graph)
    engine = Engine(
        model, make_tokenizer(), max_batch_size=5, prefill_tokens=given, context_length=200, kv_cache_dtype="bfloat16",
        **asked,
    )  # fmt: skip
    assert (engine.runner, engine.prefill_tokens) == (uses_graph, share)
    assert made == [torch.bfloat16, (model, 3, 200, torch.bfloat16)] and engine.device == decoder.device
    assert engine.max_batch_size == engine.prefix_cache.num_free == 3, "as many as fit"


def test_requests_get_their_slots_in_order(model):
    engine = make(model, max_batch_size=1)
    keys = [engine.add(request(prompt(length), max_tokens=2)) for length in (10, 20, 30)]
    engine.step()
    assert (engine.stats.running, engine.stats.waiting) == (1, 2)
    assert list(finish(engine)) == keys
    assert [length for _, _, length in engine.runner.admitted] == [10, 20, 30]


def test_everything_is_counted_once(model):
    engine = make(model, {10: [WORD, END], 20: [WORD, BROKEN]}, max_batch_size=3)
    ended, failed = engine.add(request(prompt(10))), engine.add(request(prompt(20)))
    cancelled = engine.add(request(prompt(30)))
    engine.step()
    engine.cancel(cancelled)
    found = finish(engine)
    assert [delta.finish_reason for delta in found[ended]] == ["stop"]
    assert [delta.finish_reason for delta in found[failed]] == ["error"]
    assert [delta.finish_reason for delta in found[cancelled]] == ["cancelled"]
    stats = engine.stats
    assert (stats.finished, stats.failed, stats.cancelled, stats.steps) == (1, 1, 1, 2)
    assert (stats.prompt_tokens, stats.reused_tokens, stats.answer_tokens) == (60, 0, 4), "the end is a token, too"
    assert (stats.running, stats.waiting) == (0, 0) and engine.prefix_cache.num_free == 3


def test_a_spoilt_slot_is_cleared_and_forgotten_and_others_are_not(model):
    engine = make(model, {20: [BROKEN], 30: [BROKEN]}, max_batch_size=3)
    keys = [engine.add(request(prompt(length), max_tokens=1)) for length in (10, 20, 30)]
    found = finish(engine)
    told = "the model's output is not finite (NaN or Inf): its weights are damaged."
    assert [found[key][0].error for key in keys] == ["", told, told]
    assert engine.runner.cleared == [1, 2] and engine.prefix_cache.lengths.tolist() == [10, 0, 0]
    assert (engine.stats.failed, engine.stats.finished) == (2, 1)
    again = engine.add(request(prompt(20)))
    assert finish(engine)[again][0].num_reused == 0


def test_a_later_prompt_starts_from_what_was_answered_too(model):
    """Ten positions of the prompt, and those of the tokens that were read; the last token was never one."""
    engine = make(model, {10: [70, 71, 72]})
    engine.add(request(prompt(10), max_tokens=3))
    finish(engine)
    for following, reused in (([70, 71, 72, 5], 12), ([70, 5, 5, 5], 11), ([71, 71, 71, 71], 10)):
        key = engine.add(request([*prompt(10), *following], max_tokens=1))
        assert finish(engine)[key][0].num_reused == reused


def test_what_earlier_prompts_left_can_be_forgotten_unless_somebody_is_answered(model):
    engine = make(model, context_length=100)
    engine.add(request(prompt(10), max_tokens=1))
    with pytest.raises(AssertionError, match=r"^sequences are running$"):
        engine.forget()
    finish(engine)
    engine.forget()
    key = engine.add(request([*prompt(10), 5], max_tokens=1))
    assert finish(engine)[key][0].num_reused == 0 and engine.prefix_cache.num_free == 2
    assert engine.prefix_cache.ids.shape == (2, 100)


def test_reused_positions_are_told_with_the_first_piece(model):
    engine = make(model, max_batch_size=2)
    ids = prompt(40)
    engine.add(request(ids, max_tokens=1))
    finish(engine)
    longer = engine.add(request([*ids, 5, 6], max_tokens=3))
    other = engine.add(request([*ids, 5, 6], salt=4, max_tokens=3))
    found = finish(engine)
    assert [delta.num_reused for delta in found[longer]] == [40, 0, 0]
    assert [delta.num_reused for delta in found[other]] == [0, 0, 0], "nothing of another client"
    assert (engine.stats.reused_tokens, engine.stats.prompt_tokens) == (40, 40 + 42 + 42), "reused ones are tokens, too"
    assert engine.runner.launches[1][1] == [(0, 40, 42, True), (1, 0, 42, True)]


def test_a_beginning_that_another_slot_still_uses_is_copied_from_there(model):
    engine = make(model, max_batch_size=3)
    for ids in (prompt(30), prompt(40), [*prompt(40), 5]):
        engine.add(request(ids, max_tokens=9))
        engine.step()
    assert engine.runner.copied == [(1, 2, 40)], "from the second slot to the third, the 40 positions they share"
    assert engine.runner.launches[-1][1] == [(2, 40, 41, True)]


@pytest.mark.parametrize(
    ("script", "reason", "count"),
    [
        ([WORD, WORD, WORD], "length", 3),
        ([WORD, WORD, END], "stop", 3),
        ([WORD, END], "stop", 2),
        ([END], "stop", 1),
    ],
)
def test_why_an_answer_ends(model, script, reason, count):
    engine = make(model, {10: script})
    key = engine.add(request(prompt(10), max_tokens=3, logprobs=0))
    deltas = finish(engine)[key]
    assert deltas[-1].finish_reason == reason and len(deltas) == count
    words = [len(delta.logprobs) for delta in deltas]
    assert words == [1] * script.count(WORD) + [0] * script.count(END), "the end has no text, so no probability"


def test_the_rest_of_an_answer_begins_with_its_space(model):
    engine = make(model)
    ids = [make_tokenizer().encode(text, add_special_tokens=False)[0] for text in (" ", "a", "b", "c")]
    whole, rest = request(prompt(10)), request(prompt(20))
    rest.continues = True
    streams = [engine._by_id[engine.add(one)].stream for one in (whole, rest)]
    assert ["".join(stream.push(token) for token in ids) for stream in streams] == ["abc", " abc"]


def test_the_engines_stop_strings_hold_beside_the_requests(model):
    (mark,), (word,) = (make_tokenizer().encode(text, add_special_tokens=False) for text in ("#", "x"))
    script = {10: [word, mark], 20: [mark, word], 30: [word, mark], 40: [mark, word]}
    engine = make(model, script, stop=("#",), max_batch_size=4)
    both = engine.add(request(prompt(10), max_tokens=9, stop=("y",)))
    own = engine.add(request(prompt(20), max_tokens=9, stop=("x",), ignore_end=True))
    held = engine.add(request(prompt(30), max_tokens=2, stop=("#?",), ignore_end=True))
    freed = engine.add(request(prompt(40), max_tokens=2, stop=("#?",), ignore_end=True))
    found = finish(engine)
    text = {key: "".join(delta.text for delta in deltas) for key, deltas in found.items()}
    assert (text[both], found[both][-1].finish_reason) == ("x", "stop")
    assert (text[own], found[own][-1].finish_reason) == ("#", "stop")
    assert (text[freed], found[freed][-1].finish_reason) == ("#x", "length"), "the last token sets free what was held"
    assert (text[held], found[held][-1].finish_reason) == ("x#", "length"), "what was held back is shown at the end"


def test_the_ends_of_tokenizer_and_configuration_both_count():
    changed = make_model()
    changed.config.text_config.eos_token_id = 7
    assert make(changed).end_ids == {0, 7}
    changed.config.text_config.eos_token_id = None
    assert make(changed).end_ids == {0}


@pytest.mark.parametrize(
    ("positions", "given", "length"), [(256, 0, 256), (4096, 0, 2048), (4096, 3000, 3000), (300, 300, 300)]
)
def test_the_context_is_the_models_or_2048_unless_it_is_given(positions, given, length):
    model = make_model()
    model.config.text_config.max_position_embeddings = positions
    assert make(model, context_length=given, max_batch_size=1).context_length == length


def test_biases_name_tokens_of_the_vocabulary(model):
    engine = make(model)
    engine.check(request([1], logit_bias=((0, 1.0), (VOCAB_SIZE - 1, 1.0))))
    for token in (-1, VOCAB_SIZE):
        with pytest.raises(ValueError, match=f"token {token}; the vocabulary ends at {VOCAB_SIZE - 1}"):
            engine.check(request([1], logit_bias=((token, 1.0),)))


def test_a_prompt_that_is_being_read_can_be_cancelled(model):
    engine = make(model, prefill_tokens=8)
    engine.add(request(prompt(10), max_tokens=30))
    engine.step()
    reading = engine.add(request(prompt(200), max_tokens=5))
    engine.step()
    assert engine.runner.launches[-1][1] == [(1, 0, 8, False)]
    engine.cancel(reading)
    key, delta = engine.step()[0]
    assert (key, delta.finish_reason) == (reading, "cancelled")
    assert engine.runner.launches[-1] == ([(0, 11)], []) and engine.prefix_cache.num_free == 1
    assert engine.stats.running == 1


def test_an_answer_that_is_cancelled_is_not_computed_any_further(model):
    engine = make(model)
    left, stays = engine.add(request(prompt(10), max_tokens=9)), engine.add(request(prompt(20), max_tokens=9))
    engine.step()
    engine.cancel(left)
    assert [(key, delta.finish_reason) for key, delta in engine.step()] == [(left, "cancelled"), (stays, None)]
    assert engine.runner.launches[-1] == ([(1, 20)], []) and engine.prefix_cache.num_free == 1
    assert (engine.stats.running, engine.stats.cancelled) == (1, 1)


def test_a_runner_gets_the_text_of_a_prompt_without_its_images_and_what_was_asked_for(model):
    engine = make(model)
    engine.add(request([5, -9, -9, 0, 6], max_tokens=1, seed=3))
    engine.step()
    assert engine.runner.admitted == [(0, [5, 0, 6], 5)]
    assert engine.runner.params == {0: SamplingParams(max_tokens=1, seed=3)}


def test_the_last_token_of_a_steps_share_is_read_too(model):
    engine = make(model, max_batch_size=5, prefill_tokens=513)
    for length in (255, 255, 2, 9, 7):
        engine.add(request(prompt(length), max_tokens=1))
    engine.step()
    assert engine.runner.launches[0][1][2:] == [(2, 0, 2, True), (3, 0, 1, False)]
    assert engine.prefix_cache.lengths.tolist() == [255, 255, 2, 1, 0]


def test_a_graph_runner_is_warmed_up_before_it_is_used(monkeypatch):
    made = []
    graphs = SimpleNamespace(warm_up=lambda: made.append("warm"))
    monkeypatch.setattr(graph_runner, "GraphRunner", lambda decoder: made.append(decoder) or graphs)
    decoder = SimpleNamespace(num_slots=2, copy_prefix=None, clear=None)
    assert engine_module._build_runner(decoder, True) is graphs and made == [decoder, "warm"]
    flat = engine_module._build_runner(decoder, False)
    assert isinstance(flat, FlatRunner) and flat.decoder is decoder and len(made) == 2


def test_one_step_ahead_a_token_is_read_when_the_next_is_launched(model):
    engine = make(model, {10: [WORD, END]}, num_ahead=1)
    key = engine.add(request(prompt(10), max_tokens=9))
    steps = [[(k, delta.token_ids, delta.finish_reason) for k, delta in engine.step()] for _ in range(3)]
    assert steps == [[], [(key, [WORD], None)], [(key, [END], "stop")]]
    assert engine.runner.launches[2] == ([(0, 11)], []), "computed once in vain"
    assert (engine.stats.answer_tokens, engine.stats.finished) == (2, 1) and not engine.has_work


def test_one_step_ahead_no_more_is_launched_than_is_asked_for(model):
    engine = make(model, num_ahead=1)
    key = engine.add(request(prompt(10), max_tokens=2))
    assert [delta.finish_reason for delta in finish(engine)[key]] == [None, "length"]
    assert engine.runner.launches == [([], [(0, 0, 10, True)]), ([(0, 10)], [])]


def test_a_step_that_fails_leaves_those_that_wait(model):
    engine = make(model, max_batch_size=1)
    first, waiting = engine.add(request(prompt(10))), engine.add(request(prompt(20), max_tokens=1))
    launch, engine.runner.launch = engine.runner.launch, lambda *_: 1 / 0
    assert [(key, delta.finish_reason) for key, delta in engine.step()] == [(first, "error")]
    assert (
        engine.stats.failed == 1 and engine.prefix_cache.num_free == 1 and engine.prefix_cache.lengths.tolist() == [0]
    )
    engine.runner.launch = launch
    assert finish(engine)[waiting][-1].finish_reason == "length"


def test_a_request_that_is_cancelled_while_it_waits_never_takes_a_slot(model):
    engine = make(model, max_batch_size=1)
    first, second, third = (engine.add(request(prompt(length), max_tokens=2)) for length in (3, 4, 5))
    engine.step()
    engine.cancel(second), engine.cancel(99)
    found = {key for _ in range(8) for key, _ in engine.step()}
    assert found == {first, second, third}
    assert [length for _, _, length in engine.runner.admitted] == [3, 5], "its place is the next one's"
    assert (engine.stats.cancelled, engine.stats.finished, engine.stats.prompt_tokens) == (1, 2, 8)
    assert engine.prefix_cache.num_free == 1 and not engine.has_work


@pytest.mark.parametrize(("ignores", "reason", "count"), [(False, "stop", 2), (True, "length", 4)])
def test_the_end_of_text_is_a_token_like_others_where_it_is_ignored(model, ignores, reason, count):
    engine = make(model, {5: [WORD, END, WORD, WORD]})
    engine.add(request(prompt(5), max_tokens=4, ignore_end=ignores))
    deltas = [delta for _ in range(6) for _, delta in engine.step()]
    assert (deltas[-1].finish_reason, len(deltas), engine.stats.answer_tokens) == (reason, count, count)


def test_a_step_that_fails_takes_nothing_from_those_that_were_told_before(model):
    """Of a cancelled request, and of one whose token was read before another's could not be."""
    engine = make(model, max_batch_size=3)
    cancelled, told, spoilt = (engine.add(request(prompt(length), max_tokens=2)) for length in (3, 4, 5))
    engine.step()
    engine.cancel(cancelled)
    engine._by_id[spoilt].stream.push = lambda token: 1 / 0
    found = engine.step()
    assert [(key, delta.finish_reason) for key, delta in found] == [
        (cancelled, "cancelled"),
        (told, "length"),
        (spoilt, "error"),
    ]
    assert found[-1][1].error == "the model could not compute this answer: division by zero"
    assert not engine.has_work and engine.prefix_cache.num_free == 3


def test_one_that_ended_does_not_hide_those_after_it(model):
    """A step ahead was computed for all of them; the tokens of the one that ended are dropped, the others' are not."""
    engine = make(model, {3: [END]}, num_ahead=1, max_batch_size=3)
    first, *others = (engine.add(request(prompt(length), max_tokens=3)) for length in (3, 4, 5))
    found = finish(engine)
    assert [delta.finish_reason for delta in found[first]] == ["stop"]
    for key in others:
        assert [(delta.finish_reason, delta.token_ids) for delta in found[key]] == [
            (None, [WORD]),
            (None, [WORD]),
            ("length", [WORD]),
        ]


def test_a_prompt_is_read_to_its_last_token_before_one_is_drawn(model):
    engine = make(model, prefill_tokens=8)
    engine.add(request(prompt(5), max_tokens=9))
    engine.step()
    engine.add(request(prompt(17), max_tokens=1))
    pieces = [engine.step() and engine.runner.launches[-1][1] for _ in range(3)]
    assert pieces == [[(1, 0, 8, False)], [(1, 8, 16, False)], [(1, 16, 17, True)]]


@pytest.mark.parametrize(
    ("script", "counts"),
    [
        ("x##x", [1, 0, 0, 3]),  # what only looked like a stop string
        ("x##", [1, 0, 2]),  # and at the end of the answer
        ("xx###", [1, 1, 0, 0, 0]),
        ("###", [0, 0, 0]),
        ("xé", [1, 0, 2]),  # a character of two tokens
    ],
)
def test_a_token_has_its_probability_once_its_text_is_of_the_answer(model, script, counts):
    tokens = make_tokenizer().convert_tokens_to_ids([*script.replace("é", "Ã©")])
    engine = make(model, {10: tokens}, stop=("###",))
    key = engine.add(request(prompt(10), max_tokens=len(tokens), logprobs=0))
    deltas = finish(engine)[key]
    assert [len(delta.logprobs) for delta in deltas] == counts
    named = [entry.token_id for delta in deltas for entry in delta.logprobs]
    assert named == tokens[: len(named)], "in their order"


def test_what_was_launched_before_a_failure_is_never_read(model):
    engine = make(model, num_ahead=1)
    key = engine.add(request(prompt(5)))
    engine.step()
    assert len(engine._in_flight) == 1
    engine.runner.launch = lambda *_: 1 / 0
    assert [(each, delta.finish_reason) for each, delta in engine.step()] == [(key, "error")]
    assert not engine._in_flight and not engine._answering and not engine._reading
