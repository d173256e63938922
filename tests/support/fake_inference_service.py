"""A scripted gateway for tests of the client: its answers, and where its streams break."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from kvrelay.network import rpc
from kvrelay.v1 import inference_pb2, inference_pb2_grpc, session_pb2

REQUEST_ID = "0" * 32

Behaviour = Callable[[Any, Any], AsyncIterator[Any]]


def accepted() -> inference_pb2.Accepted:
    return inference_pb2.Accepted(request_id=REQUEST_ID, model="tiny", num_prompt_tokens=3, seed=7)


def delta(index: int, text: str, *, sequence: int = 0, num_tokens: int = 1, last: bool = False) -> inference_pb2.Delta:
    return inference_pb2.Delta(
        sequence=sequence,
        index=index,
        tokens=[session_pb2.Token(token_id=100 + index + number) for number in range(num_tokens)],
        text=text,
        finish_reason=session_pb2.FINISH_REASON_LENGTH if last else session_pb2.FINISH_REASON_UNSPECIFIED,
    )


def finished(num_sequences: int = 1, num_tokens: int = 3) -> inference_pb2.Finished:
    return inference_pb2.Finished(
        finish_reasons=[session_pb2.FINISH_REASON_LENGTH] * num_sequences,
        usage=inference_pb2.Usage(num_prompt_tokens=3, num_output_tokens=num_tokens),
        phases=inference_pb2.Phases(
            decode_ms=20,
            transfer_bytes=4096,
            transfer_ms=2,
            transfer_wire_ms=1,
            num_attempts=1,
            prefill_worker_id="prefill-1",
            decode_worker_id="decode-1",
        ),
    )


class FakeInferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Each streaming call takes the next behaviour; the last stays. `calls` has the requests."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.generate: list[Behaviour] = []
        self.resume: list[Behaviour] = []
        self.converse: Behaviour | None = None
        self.unary: dict[str, Any] = {}

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for event in self._play(self.generate, request, context):
            yield _wrap(inference_pb2.GenerateResponse, event)

    async def Resume(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for event in self._play(self.resume, request, context):
            yield _wrap(inference_pb2.ResumeResponse, event)

    async def Converse(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        async for request in request_iterator:
            self.calls.append(request)
            assert self.converse is not None
            async for event in self.converse(request, context):
                yield _wrap(inference_pb2.ConverseResponse, event)

    async def GetRequest(self, request: Any, context: Any) -> Any:
        return self._answer("GetRequest", request)

    async def ListRequests(self, request: Any, context: Any) -> Any:
        return self._answer("ListRequests", request)

    async def GetTimeline(self, request: Any, context: Any) -> Any:
        return self._answer("GetTimeline", request)

    async def CancelRequest(self, request: Any, context: Any) -> Any:
        return self._answer("CancelRequest", request)

    async def Tokenize(self, request: Any, context: Any) -> Any:
        return self._answer("Tokenize", request)

    async def Detokenize(self, request: Any, context: Any) -> Any:
        return self._answer("Detokenize", request)

    async def ListModels(self, request: Any, context: Any) -> Any:
        return self._answer("ListModels", request)

    async def GetCluster(self, request: Any, context: Any) -> Any:
        return self._answer("GetCluster", request)

    async def _play(self, script: list[Behaviour], request: Any, context: Any) -> AsyncIterator[Any]:
        self.calls.append(request)
        behaviour = script.pop(0) if len(script) > 1 else script[0]
        async for event in behaviour(request, context):
            yield event

    def _answer(self, method: str, request: Any) -> Any:
        self.calls.append(request)
        answer = self.unary[method]
        if isinstance(answer, Exception):
            raise answer
        return answer


async def start_fake(service: FakeInferenceService) -> tuple[rpc.BoundServer, str]:
    """Starts a server on a free loopback port. The caller stops `bound.server`."""
    server = rpc.create_server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    bound = rpc.bind_server(server, "127.0.0.1", 0, ["kvrelay.v1.InferenceService"])
    await server.start()
    await bound.set_serving(True)
    return bound, f"127.0.0.1:{bound.port}"


def play(*events: Any) -> Behaviour:
    """Sends the events."""

    async def behaviour(request: Any, context: Any) -> AsyncIterator[Any]:
        for event in events:
            yield event

    return behaviour


def then_wait(*events: Any) -> Behaviour:
    """Sends the events, then nothing until the client leaves."""

    async def behaviour(request: Any, context: Any) -> AsyncIterator[Any]:
        for event in events:
            yield event
        await asyncio.Event().wait()

    return behaviour


def then_break(*events: Any, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> Behaviour:
    """Sends the events, then breaks like a lost connection: a status without our details."""

    async def behaviour(request: Any, context: Any) -> AsyncIterator[Any]:
        for event in events:
            yield event
        await context.abort(code, "Socket closed")

    return behaviour


def then_raise(error: Exception, *events: Any) -> Behaviour:
    """Sends the events, then fails like the service itself."""

    async def behaviour(request: Any, context: Any) -> AsyncIterator[Any]:
        for event in events:
            yield event
        raise error

    return behaviour


def _wrap(response_class: Any, event: Any) -> Any:
    names = {inference_pb2.Accepted: "accepted", inference_pb2.Delta: "delta", inference_pb2.Finished: "finished"}
    return response_class(**{names[type(event)]: event})
