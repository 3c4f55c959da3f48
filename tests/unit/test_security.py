"""Which test holds each promise of SECURITY.md; each of them is marked, so that ``make test-security`` runs it."""

from __future__ import annotations

import ast

import pytest

from tests.paths import ROOT

UNIT = ROOT / "tests/unit"

PROMISES: dict[str, dict[str, tuple[str, ...]]] = {
    "Ray's ports ask for a token and listen on loopback": {
        "test_cluster": ("a_token_is_made_once_and_only_its_owner_reads_it", "nothing_of_ours_switches_tokens_off"),
    },
    "one body stalls nobody": {
        "serving/test_body": (
            "many_wrong_values_within_the_bound_are_cheap",
            "very_many_messages_are_refused_before_any_work",
            "a_body_of_very_many_values_is_refused_before_it_is_parsed",
        ),
    },
    "slow bodies and headers take no place": {
        "serving/test_body": ("a_body_that_trickles_is_given_up", "slow_bodies_take_no_place"),
        "serving/test_connections": ("headers_that_do_not_come_close_the_connection",),
        "serving/test_gate": ("one_client_cannot_take_every_place",),
    },
    "images are bounded before they are decoded": {
        "data/test_image_structure": ("scans_are_counted", "counting_very_many_scans_is_cheap"),
        "data/ingest/test_check_images": ("decompression_bombs_are_refused_unread", "many_scans_are_refused_unread"),
        "serving/test_decoders": (
            "a_job_that_takes_too_long_is_killed_and_the_next_one_decoded",
            "waiting_for_a_decoder_has_an_end",
            "memory_is_bounded",
        ),
    },
    "names never become addresses": {
        "test_storage": ("a_name_never_becomes_part_of_the_address", "names_that_lead_out_of_a_folder"),
        "data/test_shards": (
            "a_manifests_names_do_not_lead_out_of_its_folder",
            "a_name_that_looks_like_options_is_a_name",
        ),
        "data/test_features": ("names_of_parts_do_not_lead_out_of_the_cache",),
        "data/sources/test_images": ("names_that_cannot_be_read", "a_name_that_looks_like_options_is_a_file_name"),
        "data/sources/test_tar": ("links_are_refused", "a_tar_in_a_bucket_is_found_and_read_whatever_its_name"),
    },
    "pickles and tars are walked within bounds": {
        "data/sources/test_pickles": (
            "claims_of_size_are_refused_before_anything_is_built",
            "objects_and_names_outside_of_the_file_are_refused",
        ),
        "data/sources/test_tar": ("hostile_headers_are_passed_over_in_bounded_time",),
        "checkpoint/test_pickle_check": ("bombs_are_refused", "reading_a_bomb_takes_no_memory"),
        "convert/test_convert": ("a_pickle_never_runs_code",),
    },
    "one row never ends an ingest": {
        "data/ingest/test_hostile_rows": (
            "a_hostile_row_costs_itself_alone",
            "an_error_that_nobody_thought_of_costs_its_row",
        ),
        "data/sources/test_json_entries": ("a_broken_entry_costs_itself_alone",),
    },
    "a request sizes no work of the engine's thread": {
        "serving/test_refusals": ("mistakes_are_answered_in_openais_shape",),
        "inference/test_assistant": ("too_much_text_is_refused_before_any_work",),
    },
    "keys share no cache": {
        "serving/test_clients": ("keys_share_no_cache",),
        "inference/test_assistant": ("callers_with_different_salts_share_nothing",),
        "inference/test_prefix_cache": ("prompts_of_another_salt_are_not_reused",),
    },
    "keys are never empty and never shown": {
        "serving/test_clients": (
            "sources_without_a_key_are_refused_instead_of_opening_the_server",
            "unusable_keys_are_refused_and_not_shown",
            "no_key_is_in_what_ray_shows_of_the_application",
            "keys_are_compared_whole",
        ),
        "settings/test_settings": ("secrets_are_never_shown_in_errors",),
        "tracking/test_mlflow": ("passwords_of_uris_are_not_logged",),
        "serving/test_run": ("listening_for_others_without_keys_gives_a_warning",),
    },
    "a full disk truncates nothing; the shard cache is private": {
        "training/test_disk_full": ("a_state_that_does_not_fit", "a_record_that_does_not_fit"),
        "data/test_remote_shards": (
            "the_cache_is_a_private_folder",
            "a_cache_into_which_others_could_put_files_is_refused",
            "a_copy_with_another_content_is_fetched_again",
        ),
    },
    "folders run no code, and say no more than they may": {
        "checkpoint/test_load_model": (
            "code_of_a_folder_never_runs_and_nobody_is_asked",
            "a_config_that_is_none_is_one_sentence",
        ),
        "checkpoint/test_folders": ("a_malformed_manifest_is_one_sentence",),
        "data/test_shards": ("a_malformed_manifest_is_one_sentence",),
        "serving/test_fetch": ("which_addresses_are_public", "the_target_of_a_redirect_is_never_requested"),
        "serving/test_clients": ("pages_for_operators_are_behind_the_key_as_soon_as_there_is_one",),
    },
    "a client that leaves is no error and ends no thread": {
        "serving/test_body": ("a_client_that_leaves_is_no_error_of_the_server",),
        "inference/test_assistant": ("a_caller_that_leaves_hurts_neither_the_thread_nor_others",),
    },
}
"""Promise -> file -> names of its tests, without ``test_``."""


def is_mark(node: ast.expr) -> bool:
    return ast.unparse(node).endswith("mark.security")


def marked_tests(file: str) -> tuple[set[str], set[str]]:
    """Names of all tests of a file, and of those that carry the marker."""
    tree = ast.parse((UNIT / f"{file}.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    everything = any(
        isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "pytestmark"
        and "mark.security" in ast.unparse(node.value)
        for node in tree.body
    )
    marked = {node.name for node in functions if everything or any(map(is_mark, node.decorator_list))}
    return {node.name for node in functions}, marked


@pytest.mark.parametrize("promise", PROMISES)
def test_each_promise_is_held_by_marked_tests(promise):
    for file, names in PROMISES[promise].items():
        found, marked = marked_tests(file)
        wanted = {f"test_{name}" for name in names}
        assert wanted <= found, f"{file}: {sorted(wanted - found)} are gone"
        assert wanted <= marked, f"{file}: {sorted(wanted - marked)} lack @pytest.mark.security"
