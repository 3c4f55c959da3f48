"""What ``GET /metrics`` shows, in Prometheus' text format: the ingress's own counters and each replica's engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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

    def render(self, replicas: Sequence[ReplicaStats]) -> bytes:
        """The page.

        Args:
            replicas: ``Backend.stats``.
        """
        engine = CollectorRegistry()
        for name, text in (ENGINE_COUNTERS | ENGINE_GAUGES).items():
            full_name = f"engine_{name}" + ("_total" if name in ENGINE_COUNTERS else "")
            # A gauge may be set; the replica has done the counting.
            gauge = Gauge(full_name, text, ["replica"], namespace="tinygptv", registry=engine)
            for stats in replicas:
                gauge.labels(stats.replica).set(stats.values[name])
        return generate_latest(self.registry) + generate_latest(engine)
