"""Counters and timings of the server, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector


class Metrics:
    """All metrics of a server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "amclr_requests", "Requests, by route and status", ["route", "status"], registry=registry
        )
        self.seconds = Histogram("amclr_request_seconds", "Time to the whole answer", ["route"], registry=registry)
        self.refused = Counter(
            "amclr_refused", "Requests and queries refused, by reason", ["reason"], registry=registry
        )
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self.batches = Histogram("amclr_batch_queries", "Queries answered together", buckets=sizes, registry=registry)
        self.texts = Counter("amclr_texts", "Texts of queries, embedded or cached", ["how"], registry=registry)
        self.waiting = Gauge("amclr_waiting_queries", "Queries waiting for the worker", registry=registry)
        self.images = Gauge("amclr_index_images", "Images in the index", registry=registry)
