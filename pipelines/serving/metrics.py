"""``GET /metrics`` in Prometheus' text format: the counters of every ingress and of each replica's engine.

Any of several ingresses may answer, so each shows them all: otherwise counters would jump from one answer to the next.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from pipelines.serving.backend import ReplicaStats

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

ENGINE_COUNTERS = {
    "steps": "forward passes",
    "prompt_tokens": "prompt tokens, image positions included",
    "reused_tokens": "prompt tokens that were taken from the cache",
    "answer_tokens": "tokens generated",
    "finished": "answers finished",
    "cancelled": "answers whose client left",
    "failed": "answers that ended in an error",
    "images_encoded": "images encoded",
    "images_reused": "images whose embeddings were in the cache",
}
ENGINE_GAUGES = {
    "running": "requests in the batch",
    "waiting": "requests that wait for a slot",
    "slots": "most requests in the batch",
}


class Metrics:
    """Counters of one ingress; each has a registry of its own, so that tests can build many."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"namespace": "tinygptv", "registry": self.registry}
        self.requests = Counter(
            "requests", "chat requests by HTTP status; 499: the client left before the answer", ["status"], **options
        )
        self.seconds = Histogram("request_seconds", "seconds from request to last token", buckets=SECONDS, **options)
        self.first_token = Histogram(
            "first_token_seconds", "seconds from request to first text", buckets=SECONDS, **options
        )
        self.in_flight = Gauge("in_flight_requests", "admitted requests in flight", **options)
        self.tokens = Counter("tokens", "tokens of finished requests", ["kind"], **options)
        self.retries = Counter("retries", "requests sent to another replica because the first one died", **options)

    def snapshot(self, ingress: str = "") -> IngressMetrics:
        """The counters now, to be shown by whichever ingress is asked.

        Args:
            ingress: name of this one among several.
        """
        return IngressMetrics(ingress, list(self.registry.collect()))


@dataclass(frozen=True)
class IngressMetrics:
    """Counters of one ingress."""

    ingress: str
    families: list[Metric]


def render(ingresses: Sequence[IngressMetrics], replicas: Sequence[ReplicaStats]) -> bytes:
    """The page.

    Args:
        ingresses: all of them; where there are several, their samples get the label ``ingress``.
        replicas: ``Backend.stats``.
    """
    engine = CollectorRegistry()
    same_name = Tally(stats.replica for stats in replicas)  # process ids, which two nodes may both have
    for name, text in (ENGINE_COUNTERS | ENGINE_GAUGES).items():
        full_name = f"engine_{name}" + ("_total" if name in ENGINE_COUNTERS else "")
        # A gauge may be set; the replica has done the counting.
        gauge = Gauge(full_name, text, ["replica"], namespace="tinygptv", registry=engine)
        for stats in replicas:
            label = stats.replica if same_name[stats.replica] == 1 else f"{stats.replica}@{stats.node}"
            gauge.labels(label).set(stats.values[name])
    return generate_latest(_Merged(ingresses)) + generate_latest(engine)


class _Merged(CollectorRegistry):
    """The ingresses' families, each once, with the samples of all."""

    def __init__(self, ingresses: Sequence[IngressMetrics]) -> None:
        super().__init__()
        self.ingresses = ingresses

    def collect(self) -> Iterator[Metric]:
        """Families by name."""
        merged: dict[str, Metric] = {}
        for ingress in self.ingresses:
            for family in ingress.families:
                known = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    labels = {**sample.labels, "ingress": ingress.ingress} if len(self.ingresses) > 1 else sample.labels
                    known.samples.append(sample._replace(labels=labels))
        yield from merged.values()
