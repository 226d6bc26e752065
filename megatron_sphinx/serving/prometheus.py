"""What the server has done and is at, for Prometheus to collect."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megatron_sphinx.serving.gate import Gate

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_GAUGES = {
    "waiting": "Answers that no token has been computed of.",
    "running": "Answers that are computed.",
    "cached_places": "Tokens that the key-value caches hold.",
    "places": "Tokens that the key-value caches have room for.",
}
_COUNTERS = {
    "prompt_tokens": "Tokens of all prompts.",
    "hit_tokens": "Tokens of prompts that were in the prefix cache.",
    "new_tokens": "Tokens drawn.",
    "pictures": "Pictures encoded.",
    "picture_hits": "Pictures asked about that needed no encoding.",
    "finished": "Answers that ended.",
}


class Metrics:
    """Counts what the server does, and asks the model what it is at.

    Args:
        gate: to the model.

    Attributes:
        requests: requests for chats by the HTTP status that they got; of a stream, that of its end, and 499 for a
            client that was gone before.
        request_seconds: from the beginning of a chat request to its end.
        first_token_seconds: from the beginning of a chat request to the first token of an answer.
    """

    def __init__(self, gate: Gate) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "sphinx_requests", "Chat requests that ended, by status.", ["status"], registry=self._registry
        )
        self.request_seconds = Histogram(
            "sphinx_request_seconds", "Time of a chat request.", buckets=_SECONDS, registry=self._registry
        )
        self.first_token_seconds = Histogram(
            "sphinx_first_token_seconds", "Time to the first token.", buckets=_SECONDS, registry=self._registry
        )
        self._registry.register(_Model(gate))

    def page(self) -> bytes:
        """Return all of it in the text format of Prometheus."""
        return generate_latest(self._registry)


class _Model(Collector):
    """Asks the model what it is at, whenever Prometheus asks."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("sphinx_requests_inside", "Chat requests under way.", self._gate.inside)
        load = self._gate.load()
        yield GaugeMetricFamily("sphinx_ready", "Whether requests are answered.", float(load is not None))
        if load is not None:
            for name, title in _GAUGES.items():
                yield GaugeMetricFamily(f"sphinx_{name}", title, getattr(load, name))
            for name, title in _COUNTERS.items():
                yield CounterMetricFamily(f"sphinx_{name}", title, getattr(load, name))
