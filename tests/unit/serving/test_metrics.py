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
    kinds = re.findall(rb"^# TYPE (\S+)", page, re.MULTILINE)
    assert len(kinds) == len(set(kinds)), "each family is described once"
    assert len(samples(page, "tinygptv_request_seconds_count")) == 2


def test_process_ids_of_two_nodes_do_not_collide():
    page = render([], [stats("17", "a", 2.0), stats("17", "b", 3.0), stats("18", "b", 4.0)])
    assert samples(page, "tinygptv_engine_steps_total") == {
        (("replica", "17@a"),): 2,
        (("replica", "17@b"),): 3,
        (("replica", "18"),): 4,
    }
