"""Serves /metrics in Prometheus' text format or OpenMetrics. Imports prometheus_client late."""

from __future__ import annotations  # libraries' classes are named for type checkers only

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import kvrelay
from kvrelay.network.http_server import AddRoutes
from kvrelay.observability.metrics.families import Family, Histogram, Sample, Source

if TYPE_CHECKING:
    from aiohttp import web
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

BUILD_INFO = Family(
    "kvrelay_build_info", "gauge", "Always 1; labels say which version runs in which role.", ("version", "role")
)


def metrics_route(role: str, *sources: Source) -> AddRoutes:
    """Each family comes from one source."""

    def add(application: web.Application) -> None:
        from aiohttp import web
        from prometheus_client.exposition import choose_encoder

        registry = create_registry(role, sources)

        async def answer(request: web.Request) -> web.Response:
            encode, content_type = choose_encoder(request.headers.get("Accept", ""))
            return web.Response(body=encode(registry), headers={"Content-Type": content_type})

        application.router.add_get("/metrics", answer)

    return add


def create_registry(role: str, sources: Iterable[Source]) -> CollectorRegistry:
    """The sources, the build, and the process's memory, CPU time and open files."""
    from prometheus_client import CollectorRegistry, ProcessCollector
    from prometheus_client.registry import Collector

    class Sources(Collector):
        def collect(self) -> Iterator[Metric]:
            samples = [Sample(BUILD_INFO, 1, (kvrelay.__version__, role))]
            for source in sources:
                samples.extend(source())
            return _metrics_of(samples)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Sources())
    ProcessCollector(registry=registry)
    return registry


def _metrics_of(samples: Iterable[Sample]) -> Iterator[Metric]:
    by_family: dict[Family, list[Sample]] = {}
    for sample in samples:
        by_family.setdefault(sample.family, []).append(sample)
    for family, members in by_family.items():
        yield _metric_of(family, members)


def _metric_of(family: Family, samples: Iterable[Sample]) -> Metric:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    if family.kind == "histogram":
        histograms = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        for _, value, labels in samples:
            assert isinstance(value, Histogram), "what the family says"
            histograms.add_metric(labels, list(_cumulated(value)), value.sum)
        return histograms
    make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = make(family.name, family.help, labels=family.labels)
    for _, value, labels in samples:
        assert not isinstance(value, Histogram), "what the family says"
        metric.add_metric(labels, value)
    return metric


def _cumulated(histogram: Histogram) -> Iterator[tuple[str, float]]:
    """(upper bound, number of values up to it)."""
    total = 0
    for bound, count in zip((*histogram.bounds, float("inf")), list(histogram.counts), strict=True):
        total += count
        yield ("+Inf" if bound == float("inf") else repr(float(bound))), total
