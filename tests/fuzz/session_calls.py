"""Sessions with a worker that send garbage around one good work, whose tokens say whether the worker still does what it must."""

from __future__ import annotations

import queue
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from kvrelay.error_status import error_of_rpc
from kvrelay.errors import KvrelayError
from kvrelay.liveness import PROTOCOL_VERSION
from kvrelay.sampling_params import SamplingParams
from kvrelay.v1 import decode_pb2, prefill_pb2, session_pb2
from kvrelay.wire import reserve_to_pb, start_prefill_to_pb, work_id_to_pb
from kvrelay.work import Work
from tests.fuzz.mutations import mutate_bytes, mutate_message
from tests.works import make_work

CALL_TIMEOUT_S = 60.0
GOOD_PROMPT = list(range(10, 22))
ADDRESS = "127.0.0.1:1"
"""Where nobody listens."""


@dataclass(frozen=True)
class Protocol:
    """One kind of session."""

    method: str
    request_type: Any
    response_type: Any

    def hello(self, **changes: Any) -> bytes:
        values: dict[str, Any] = {"gateway_id": "g", "protocol_version": PROTOCOL_VERSION, "liveness_window_ms": 60_000} | changes
        message: bytes = self.request_type(hello=session_pb2.GatewayHello(**values)).SerializeToString()
        return message


DECODE = Protocol(
    "/kvrelay.v1.DecodeService/Session", decode_pb2.DecodeServiceSessionRequest, decode_pb2.DecodeServiceSessionResponse
)
PREFILL = Protocol(
    "/kvrelay.v1.PrefillService/Session", prefill_pb2.PrefillServiceSessionRequest, prefill_pb2.PrefillServiceSessionResponse
)


@dataclass
class SessionOutcome:
    """What a session gave. `error` is None when it ended with OK."""

    error: KvrelayError | None
    good_tokens: list[int]
    num_failed_works: int


def good_work(generator: random.Random, max_tokens: int) -> Work:
    """Greedy: its tokens are always the same."""
    return make_work(GOOD_PROMPT, max_tokens, request_id=f"{generator.getrandbits(128):032x}")


def odd_work(generator: random.Random) -> Work:
    """Valid, and sampled in every way that there is."""
    sampling = SamplingParams(
        temperature=generator.choice((0.0, 0.7, 1e-30, 100.0)),
        top_k=generator.choice((0, 1, 5, 2**31)),
        top_p=generator.choice((1.0, 0.5, 1e-30)),
        min_p=generator.choice((0.0, 0.3, 1.0)),
        repetition_penalty=generator.choice((1.0, 1.3, 1e-40, 100.0)),
        presence_penalty=generator.choice((0.0, -2.0, 2.0)),
        logit_bias=generator.choice(({}, {5: 100.0}, {5: -100.0, 6: -100.0})),
        seed=generator.choice((0, 2**64 - 1)),
        max_tokens=generator.choice((1, 2, 30, 2**31)),
        min_tokens=generator.choice((0, 1)),
        logprobs=generator.choice((None, 0, 20)),
        n=1,
    )
    prompt = [generator.randrange(5, 100) for _ in range(generator.choice((1, 3, 4, 20)))]
    num_sequences = generator.choice((1, 1, 8))
    request_id = f"{generator.getrandbits(128):032x}"
    return make_work(prompt, 1, request_id=request_id, sampling=sampling, num_sequences=num_sequences)


def decode_commands(work: Work, fingerprint: str) -> list[decode_pb2.DecodeServiceSessionRequest]:
    """All that a gateway says of a work that is computed on the decode worker."""
    work_id, request = work_id_to_pb(work.work_id), decode_pb2.DecodeServiceSessionRequest
    return [
        request(reserve=reserve_to_pb(work, fingerprint)),
        request(run_prompt=decode_pb2.RunPrompt(work_id=work_id)),
        request(heartbeat=session_pb2.Heartbeat(number=3)),
        request(finish_sequence=decode_pb2.FinishSequence(work_id=work_id, sequence=0)),
        request(cancel_work=session_pb2.CancelWork(work_id=work_id)),
    ]


def prefill_commands(work: Work) -> list[prefill_pb2.PrefillServiceSessionRequest]:
    """The same of a prefill worker."""
    request = prefill_pb2.PrefillServiceSessionRequest
    return [
        request(start_prefill=start_prefill_to_pb(work, bytes(16), ADDRESS, 0)),
        request(heartbeat_ack=session_pb2.HeartbeatAck(number=3)),
        request(cancel_work=session_pb2.CancelWork(work_id=work_id_to_pb(work.work_id))),
    ]


def odd_commands(protocol: Protocol, fingerprint: str, generator: random.Random, num_works: int, raw_share: float) -> list[bytes]:
    """Commands about works, most of them with odd fields; so many of the works with bytes that may be no message."""
    messages: list[bytes] = []
    for _ in range(num_works):
        work = odd_work(generator)
        commands: list[Any] = decode_commands(work, fingerprint) if protocol is DECODE else prefill_commands(work)
        kept = 2 if protocol is DECODE else 1
        commands = commands[:kept] + [each for each in commands[kept:] if generator.random() < 0.3]
        if generator.random() < 0.7:
            mutate_message(generator.choice(commands), generator)
        if generator.random() < 0.1:
            commands.append(commands[0])
        encoded = [command.SerializeToString() for command in commands]
        if generator.random() < raw_share:
            position = generator.randrange(len(encoded))
            encoded[position] = mutate_bytes(encoded[position], generator.choice(encoded), generator)
        messages += encoded
    return messages


def run_session(channel: grpc.Channel, protocol: Protocol, hello: bytes, good: list[bytes], odd: list[bytes]) -> SessionOutcome:
    """Sends the good work's first command, the odd ones, and the rest of the good work's; leaves when that is done.

    Blocks; called in a thread.
    """
    requests: queue.Queue[bytes | None] = queue.Queue()
    for message in (hello, *good[:1], *odd, *good[1:]):
        requests.put(message)

    def sent() -> Iterator[bytes]:
        while (request := requests.get()) is not None:
            yield request

    outcome = SessionOutcome(None, [], 0)
    good_id = _work_id(protocol.request_type.FromString(good[0]))
    try:
        responses: Any = channel.stream_stream(protocol.method)(sent(), timeout=CALL_TIMEOUT_S)  # type: ignore[arg-type]
        for data in responses:
            response = protocol.response_type.FromString(data)
            if _note(response, good_id, outcome):
                requests.put(None)
    except grpc.RpcError as failure:
        outcome.error = error_of_rpc(failure)
    requests.put(None)
    return outcome


def _work_id(request: Any) -> session_pb2.WorkId:
    work_id: session_pb2.WorkId = getattr(request, request.WhichOneof("message")).work_id
    return work_id


def _note(response: Any, good_id: session_pb2.WorkId, outcome: SessionOutcome) -> bool:
    """Whether the good work has ended."""
    match response.WhichOneof("message"):
        case "work_failed":
            outcome.num_failed_works += 1
            assert response.work_failed.work_id != good_id, f"the good work failed: {response.work_failed.message}"
            assert response.work_failed.kind != session_pb2.FAILURE_KIND_INTERNAL, response.work_failed
            assert len(response.work_failed.message) > 5
        case "step_output":
            tokens = [token for token in response.step_output.tokens if token.work_id == good_id]
            outcome.good_tokens += [token.token.token_id for token in tokens]
            return any(token.finish_reason for token in tokens)
        case "prefill_done" if response.prefill_done.work_id == good_id:
            outcome.good_tokens += [token.token.token_id for token in response.prefill_done.tokens]
            return True
    return False
