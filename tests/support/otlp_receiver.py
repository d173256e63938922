"""An OpenTelemetry collector for tests: receives spans as OTLP over HTTP and keeps them."""

import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Status


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """Times are nanoseconds since 1970."""

    service: str
    instance: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    began_ns: int
    ended_ns: int
    error: str | None
    """None for a span without an error."""
    attributes: dict[str, str | int | float | bool]


@dataclass(slots=True)
class OtlpReceiver:
    """What has come so far."""

    endpoint: str = ""
    spans: list[ReceivedSpan] = field(default_factory=list)

    def of_trace(self, trace_id: str, name: str | None = None) -> list[ReceivedSpan]:
        """Spans of a trace, all or by name, in the order of their beginnings."""
        spans = [span for span in self.spans if span.trace_id == trace_id and name in (None, span.name)]
        return sorted(spans, key=lambda span: span.began_ns)

    async def take(self, request: web.Request) -> web.Response:
        """Answers one export."""
        body = await request.read()
        message = ExportTraceServiceRequest.FromString(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
        self.spans.extend(_spans(message))
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(), headers={"Content-Type": "application/x-protobuf"}
        )


@asynccontextmanager
async def receiving() -> AsyncIterator[OtlpReceiver]:
    """A collector on a free loopback port."""
    receiver = OtlpReceiver()
    application = web.Application()
    application.router.add_post("/v1/traces", receiver.take)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    receiver.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield receiver
    finally:
        await runner.cleanup()


def _spans(message: ExportTraceServiceRequest) -> list[ReceivedSpan]:
    found = []
    for resource_spans in message.resource_spans:
        resource = {each.key: each.value.string_value for each in resource_spans.resource.attributes}
        for span in (span for scope in resource_spans.scope_spans for span in scope.spans):
            values = {
                each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value")
                for each in span.attributes
            }
            found.append(
                ReceivedSpan(
                    service=resource["service.name"],
                    instance=resource["service.instance.id"],
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    began_ns=span.start_time_unix_nano,
                    ended_ns=span.end_time_unix_nano,
                    error=span.status.message if span.status.code == Status.STATUS_CODE_ERROR else None,
                    attributes=values,
                )
            )
    return found
