"""Sessions with a worker that send garbage around one good job, whose tokens say whether the worker
still does what it must.
"""

from __future__ import annotations

import queue
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from kvrelay.core.job import Job
from kvrelay.core.liveness import PROTOCOL_VERSION
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.errors import KvrelayError
from kvrelay.v1 import decode_pb2, prefill_pb2, session_pb2
from kvrelay.wire.convert import job_id_to_pb, reserve_to_pb, start_prefill_to_pb
from kvrelay.wire.errors import error_of_rpc
from tests.fuzz.mutations import mutate_bytes, mutate_message
from tests.support.jobs import make_job

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
        values: dict[str, Any] = {
            "gateway_id": "g",
            "protocol_version": PROTOCOL_VERSION,
            "liveness_window_ms": 60_000,
        } | changes
        message: bytes = self.request_type(hello=session_pb2.GatewayHello(**values)).SerializeToString()
        return message


DECODE = Protocol(
    "/kvrelay.v1.DecodeService/Session", decode_pb2.DecodeServiceSessionRequest, decode_pb2.DecodeServiceSessionResponse
)
PREFILL = Protocol(
    "/kvrelay.v1.PrefillService/Session",
    prefill_pb2.PrefillServiceSessionRequest,
    prefill_pb2.PrefillServiceSessionResponse,
)


@dataclass
class SessionOutcome:
    """What a session gave. `error` is None when it ended with OK."""

    error: KvrelayError | None
    good_tokens: list[int]
    num_failed_jobs: int


def good_job(generator: random.Random, max_tokens: int) -> Job:
    """Greedy: its tokens are always the same."""
    return make_job(GOOD_PROMPT, max_tokens, request_id=f"{generator.getrandbits(128):032x}")


def odd_job(generator: random.Random) -> Job:
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
    return make_job(prompt, 1, request_id=request_id, sampling=sampling, num_sequences=num_sequences)


def decode_commands(job: Job, fingerprint: str) -> list[decode_pb2.DecodeServiceSessionRequest]:
    """All that a gateway says of a job that is computed on the decode worker."""
    job_id, request = job_id_to_pb(job.job_id), decode_pb2.DecodeServiceSessionRequest
    return [
        request(reserve=reserve_to_pb(job, fingerprint)),
        request(run_prompt=decode_pb2.RunPrompt(job_id=job_id)),
        request(heartbeat=session_pb2.Heartbeat(number=3)),
        request(finish_sequence=decode_pb2.FinishSequence(job_id=job_id, sequence=0)),
        request(cancel_job=session_pb2.CancelJob(job_id=job_id)),
    ]


def prefill_commands(job: Job) -> list[prefill_pb2.PrefillServiceSessionRequest]:
    """The same of a prefill worker."""
    request = prefill_pb2.PrefillServiceSessionRequest
    return [
        request(start_prefill=start_prefill_to_pb(job, bytes(16), ADDRESS, 0)),
        request(heartbeat_ack=session_pb2.HeartbeatAck(number=3)),
        request(cancel_job=session_pb2.CancelJob(job_id=job_id_to_pb(job.job_id))),
    ]


def odd_commands(
    protocol: Protocol, fingerprint: str, generator: random.Random, num_jobs: int, raw_share: float
) -> list[bytes]:
    """Commands about jobs, most of them with odd fields; so many of the jobs with bytes that may be
    no message.
    """
    messages: list[bytes] = []
    for _ in range(num_jobs):
        job = odd_job(generator)
        commands: list[Any] = decode_commands(job, fingerprint) if protocol is DECODE else prefill_commands(job)
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


def run_session(
    channel: grpc.Channel, protocol: Protocol, hello: bytes, good: list[bytes], odd: list[bytes]
) -> SessionOutcome:
    """Sends the good job's first command, the odd ones, and the rest of the good job's; leaves when
    that is done.

    Blocks; called in a thread.
    """
    requests: queue.Queue[bytes | None] = queue.Queue()
    for message in (hello, *good[:1], *odd, *good[1:]):
        requests.put(message)

    def sent() -> Iterator[bytes]:
        while (request := requests.get()) is not None:
            yield request

    outcome = SessionOutcome(None, [], 0)
    good_id = _job_id(protocol.request_type.FromString(good[0]))
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


def _job_id(request: Any) -> session_pb2.JobId:
    job_id: session_pb2.JobId = getattr(request, request.WhichOneof("message")).job_id
    return job_id


def _note(response: Any, good_id: session_pb2.JobId, outcome: SessionOutcome) -> bool:
    """Whether the good job has ended."""
    match response.WhichOneof("message"):
        case "job_failed":
            outcome.num_failed_jobs += 1
            assert response.job_failed.job_id != good_id, f"the good job failed: {response.job_failed.message}"
            assert response.job_failed.kind != session_pb2.FAILURE_KIND_INTERNAL, response.job_failed
            assert len(response.job_failed.message) > 5
        case "step_output":
            tokens = [token for token in response.step_output.tokens if token.job_id == good_id]
            outcome.good_tokens += [token.token.token_id for token in tokens]
            return any(token.finish_reason for token in tokens)
        case "prefill_done" if response.prefill_done.job_id == good_id:
            outcome.good_tokens += [token.token.token_id for token in response.prefill_done.tokens]
            return True
    return False
