"""The metrics page: several ingresses and replicas on it, each once, whichever ingress is asked."""

from __future__ import annotations

import pickle
import re

from prometheus_client.parser import text_string_to_metric_families

from pipelines.serving.backend import ReplicaStats
from pipelines.serving.metrics import ENGINE_COUNTERS, ENGINE_GAUGES, Metrics, render


def stats(replica, node="a", value=1.0):
    return ReplicaStats(replica, node, dict.fromkeys((*ENGINE_COUNTERS, *ENGINE_GAUGES), value))


def ingress(name, requests):
    metrics = Metrics()
    metrics.requests.labels(200).inc(requests)
    metrics.seconds.observe(0.3)
    return pickle.loads(pickle.dumps(metrics.snapshot(name)))  # as it travels between processes


def samples(page, name):
    families = text_string_to_metric_families(page.decode())
    return {tuple(sorted(s.labels.items())): s.value for family in families for s in family.samples if s.name == name}


def test_one_ingress_needs_no_label():
    page = render([ingress("x", 3)], [stats("17")])
    assert samples(page, "tinygptv_requests_total") == {(("status", "200"),): 3}
    assert samples(page, "tinygptv_engine_slots") == {(("replica", "17"),): 1}


def test_whichever_ingress_is_asked_shows_them_all():
    one, two = ingress("one", 3), ingress("two", 5)
    page = render([one, two], [])
    assert samples(page, "tinygptv_requests_total") == {
        (("ingress", "one"), ("status", "200")): 3,
        (("ingress", "two"), ("status", "200")): 5,
    }
    assert samples(render([two, one], []), "tinygptv_requests_total") == samples(page, "tinygptv_requests_total")
    types = re.findall(rb"^# TYPE (\S+) (\w+)$", page, re.MULTILINE)
    kinds = [name for name, _ in types]
    assert len(kinds) == len(set(kinds)), "each family is described once"
    known = {b"tinygptv_in_flight_requests": b"gauge", b"tinygptv_request_seconds": b"histogram"}
    assert {name: kind for name, kind in types if name in known} == known, "as it is"
    families = {f"tinygptv_{name}".encode() for name in ("requests", "tokens", "retries")}
    assert {kind.removesuffix(b"_total") for kind in kinds} >= families | {b"tinygptv_in_flight_requests"}
    assert len(samples(page, "tinygptv_request_seconds_count")) == 2


def test_process_ids_of_two_nodes_do_not_collide():
    page = render([], [stats("17", "a", 2.0), stats("17", "b", 3.0), stats("18", "b", 4.0)])
    assert samples(page, "tinygptv_engine_steps_total") == {
        (("replica", "17@a"),): 2,
        (("replica", "17@b"),): 3,
        (("replica", "18"),): 4,
    }


def test_names_labels_and_buckets_are_what_dashboards_ask_for():
    families = {family.name: family for family in Metrics().registry.collect()}
    assert {name: (family.type, family.documentation) for name, family in families.items()} == {
        "tinygptv_requests": ("counter", "chat requests by HTTP status; 499: the client left before the answer"),
        "tinygptv_request_seconds": ("histogram", "seconds from request to last token"),
        "tinygptv_first_token_seconds": ("histogram", "seconds from request to first text"),
        "tinygptv_in_flight_requests": ("gauge", "admitted requests in flight"),
        "tinygptv_tokens": ("counter", "tokens of finished requests"),
        "tinygptv_retries": ("counter", "requests sent to another replica because the first one died"),
    }
    bounds = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, float("inf")]
    for name in ("tinygptv_request_seconds", "tinygptv_first_token_seconds"):
        found = [float(s.labels["le"]) for s in families[name].samples if s.name.endswith("_bucket")]
        assert found == bounds


def test_counters_of_an_engine_are_totals_and_its_sizes_are_not():
    values = {name: float(number) for number, name in enumerate((*ENGINE_COUNTERS, *ENGINE_GAUGES))}
    page = render([], [ReplicaStats("9", "a", values)]).decode()
    shown = dict(re.findall(r'^tinygptv_engine_(\w+)\{replica="9"\} (\S+)$', page, re.MULTILINE))
    totals = {"steps", "prompt_tokens", "reused_tokens", "answer_tokens", "finished", "cancelled", "failed"}
    totals |= {"images_encoded", "images_reused"}
    assert {name.removesuffix("_total") for name in shown if name.endswith("_total")} == totals == set(ENGINE_COUNTERS)
    assert {name.removesuffix("_total"): float(value) for name, value in shown.items()} == values
    assert {name for name in shown if not name.endswith("_total")} == {"running", "waiting", "slots"}
    assert "# HELP tinygptv_engine_waiting requests that wait for a slot" in page


def test_a_snapshot_has_the_name_and_the_numbers_of_its_moment():
    metrics = Metrics()
    metrics.in_flight.set(3)
    early = metrics.snapshot("one")
    metrics.in_flight.set(0)
    late = metrics.snapshot()
    assert (early.ingress, late.ingress) == ("one", "")
    assert [samples(render([each], []), "tinygptv_in_flight_requests")[()] for each in (early, late)] == [3, 0]
