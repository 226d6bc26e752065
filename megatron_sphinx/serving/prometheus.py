"""What the server has done and is at, for Prometheus to collect."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megatron_sphinx.generation.answering import Load
from megatron_sphinx.serving.gate import Gate

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


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
            yield from _of_load(load)


def _of_load(load: Load) -> Iterator[Metric]:
    """Yield what a model is at, and what it has done."""
    gauge, counter = GaugeMetricFamily, CounterMetricFamily
    yield gauge("sphinx_waiting", "Answers that no token has been computed of.", load.waiting)
    yield gauge("sphinx_running", "Answers that are computed.", load.running)
    yield gauge("sphinx_cached_places", "Tokens that the key-value caches hold.", load.cached_places)
    yield gauge("sphinx_places", "Tokens that the key-value caches have room for.", load.places)
    yield counter("sphinx_prompt_tokens", "Tokens of all prompts.", load.prompt_tokens)
    yield counter("sphinx_hit_tokens", "Tokens of prompts that were in the prefix cache.", load.hit_tokens)
    yield counter("sphinx_new_tokens", "Tokens drawn.", load.new_tokens)
    yield counter("sphinx_pictures", "Pictures encoded.", load.pictures)
    yield counter("sphinx_picture_hits", "Pictures asked about that needed no encoding.", load.picture_hits)
    yield counter("sphinx_finished", "Answers that ended.", load.finished)
