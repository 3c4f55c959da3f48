"""Which slot a prompt gets, and what of it is there already."""

from __future__ import annotations

import numpy as np
import pytest

from tinygptv.inference.prefix_cache import PrefixCache


def prompt(*ids):
    return np.array(ids, dtype=np.int64)


def fill(slots, ids):
    placement = slots.take(ids)
    slots.extend(placement.slot, len(ids))
    return placement


LONG = prompt(*range(100, 140))


def test_a_continued_conversation_goes_on_in_place():
    slots = PrefixCache(3, 64)
    first = fill(slots, LONG)
    slots.release(first.slot)
    again = slots.take(prompt(*LONG, 1, 2))
    assert (again.slot, again.num_reused, again.copy_from) == (first.slot, 40, None)


def test_a_taken_slot_is_copied_from():
    slots = PrefixCache(3, 64)
    first = fill(slots, LONG)
    second = slots.take(prompt(*LONG[:20], 1))
    assert second.slot != first.slot
    assert (second.num_reused, second.copy_from) == (20, first.slot)


def test_a_long_conversation_is_not_lost_to_a_short_common_beginning():
    slots = PrefixCache(2, 64)
    first = fill(slots, LONG)
    slots.release(first.slot)
    other = slots.take(prompt(*LONG[:10], 1))
    assert (other.slot == first.slot, other.copy_from, other.num_reused) == (False, first.slot, 10)


def test_the_last_position_is_always_computed():
    slots = PrefixCache(1, 64)
    slots.release(fill(slots, LONG).slot)
    assert slots.take(LONG).num_reused == 39


def test_short_beginnings_are_not_worth_it():
    slots = PrefixCache(1, 64)
    slots.release(fill(slots, LONG).slot)
    assert slots.take(prompt(*LONG[:5], 1, 2, 3)).num_reused == 0


@pytest.mark.parametrize(("common", "reused"), [(7, 0), (8, 8), (9, 9)])
def test_eight_positions_are_worth_it(common, reused):
    slots = PrefixCache(1, 64)
    slots.release(fill(slots, LONG).slot)
    assert slots.take(prompt(*LONG[:common], 1, 2, 3)).num_reused == reused


@pytest.mark.parametrize(("common", "in_place"), [(19, False), (20, True)])
def test_half_of_a_free_slot_is_continued_in_place(common, in_place):
    slots = PrefixCache(2, 64)
    first = fill(slots, LONG)
    slots.release(first.slot)
    found = slots.take(prompt(*LONG[:common], 1, 2))
    assert (found.slot == first.slot, found.copy_from) == ((True, None) if in_place else (False, first.slot))
    assert slots.lengths[found.slot] == common and slots.num_free == 1


def test_only_computed_positions_count():
    slots = PrefixCache(2, 64)
    placement = slots.take(LONG)
    slots.extend(placement.slot, 12)
    assert slots.take(LONG).num_reused == 12


def test_the_longest_unused_slot_is_taken():
    slots = PrefixCache(3, 64)
    used = [fill(slots, prompt(*range(i * 50, i * 50 + 20))).slot for i in range(3)]
    for slot in (used[1], used[0], used[2]):
        slots.release(slot)
    assert [slots.take(prompt(1000 + i)).slot for i in range(3)] == [used[1], used[0], used[2]]
    assert slots.num_free == 0


def test_tokens_of_the_answer_belong_to_what_a_slot_holds():
    """Whatever an earlier conversation left behind them, and the token of id 0 too."""
    slots = PrefixCache(1, 64)
    slots.release(fill(slots, prompt(*range(200, 260))).slot)
    slot = fill(slots, LONG).slot
    slots.extend(slot, 41, token_id=0)
    slots.extend(slot, 42, token_id=7)
    slots.release(slot)
    assert slots.take(prompt(*LONG, 0, 7, 9)).num_reused == 42


def test_a_slot_that_holds_nothing_is_not_taken_before_its_turn():
    slots = PrefixCache(2, 64)
    spoilt = slots.take(LONG).slot
    slots.extend(spoilt, 0)
    slots.release(spoilt)
    assert (slots.take(LONG).slot, slots.take(LONG).slot) == (1 - spoilt, spoilt)


def test_a_prompt_of_one_token():
    assert PrefixCache(1, 8).take(prompt(3)).num_reused == 0


def test_the_longest_common_beginning_of_all_slots_is_reused():
    slots = PrefixCache(4, 64)
    held = [fill(slots, prompt(*LONG[:common], *range(common, 30))).slot for common in (9, 25, 14)]
    placed = slots.take(prompt(*LONG[:20], 1, 2))
    assert (placed.num_reused, placed.copy_from) == (20, held[1])
    assert slots.take(prompt(*range(50)), salt=0).num_reused == 0, "none of them begins so"


def test_numbers_of_images_are_told_apart_to_the_last_digit():
    """They have more digits than a float."""
    slots, number = PrefixCache(2, 64), -(2**62)
    fill(slots, prompt(*[number] * 20))
    assert slots.take(prompt(*[number - 1] * 20, 5)).num_reused == 0
    assert slots.lengths.tolist() == [20, 0]


@pytest.mark.security
def test_salts_are_told_apart_to_the_last_digit():
    slots, salt = PrefixCache(2, 64), 2**55
    slots.extend(slots.take(LONG, salt).slot, len(LONG))
    assert slots.take(LONG, salt + 1).num_reused == 0


@pytest.mark.security
def test_prompts_of_another_salt_are_not_reused():
    cache = PrefixCache(3, 64)
    ids = np.arange(30)
    first = cache.take(ids, salt=7)
    cache.extend(first.slot, 30)
    cache.release(first.slot)
    assert cache.take(ids, salt=8).num_reused == 0
    assert cache.take(ids, salt=7).num_reused == 29
    own = PrefixCache(2, 64)
    own.extend(own.take(ids).slot, 30)
    assert own.take(ids, salt=0).num_reused == 29, "0 is that of everybody's"
