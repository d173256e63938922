"""A process of clients for `bench relay`: opens streams and notes when each message came. Parses
nothing until all is over.
"""

import os
import time
from dataclasses import dataclass

from benchmarks.http2_streams import Access, Message, read_streams
from kvrelay.v1 import inference_pb2, session_pb2

GENERATE = "/kvrelay.v1.InferenceService/Generate"
PROMPT_TOKENS = 64


class IncompleteStreamError(Exception):
    """A stream ended without its last message."""


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """What one process of clients is to do. `cores`: where it may run."""

    address: str
    num_streams: int
    max_tokens: int
    coalesce_ms: int
    timeout_s: float
    cores: frozenset[int]
    access: Access | None = None


@dataclass(frozen=True, slots=True)
class ReceivedMessage:
    """One Delta: when it came, in monotonic seconds of this host, and the tokens in it."""

    time_s: float
    index: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StreamRecord:
    """One stream as its client saw it."""

    request_id: str
    messages: tuple[ReceivedMessage, ...]


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """What one process of clients saw, and the processor seconds that it took for it."""

    streams: tuple[StreamRecord, ...]
    cpu_s: float


def run_streams(plan: StreamPlan) -> ClientRecord:
    """Opens all streams at once, over one connection, and reads them to their ends. For a process
    of its own.
    """
    os.sched_setaffinity(0, plan.cores)
    requests = [_request(plan, number).SerializeToString() for number in range(plan.num_streams)]
    begin_cpu_s = time.process_time()
    streams = read_streams(plan.address, GENERATE, requests, plan.timeout_s, plan.access)
    cpu_s = time.process_time() - begin_cpu_s
    return ClientRecord(tuple(map(_parse, streams)), cpu_s)


def _request(plan: StreamPlan, number: int) -> inference_pb2.GenerateRequest:
    sampling = session_pb2.SamplingParams(temperature=0.0, max_tokens=plan.max_tokens, ignore_eos=True)
    prompt = [300 + (7 * number + place) % 8192 for place in range(PROMPT_TOKENS)]
    token_ids = inference_pb2.TokenIds(ids=prompt)
    return inference_pb2.GenerateRequest(token_ids=token_ids, sampling=sampling, coalesce_ms=plan.coalesce_ms)


def _parse(received: list[Message]) -> StreamRecord:
    request_id = ""
    messages = []
    finished = False
    for time_s, data in received:
        frame = inference_pb2.GenerateResponse.FromString(data)
        if frame.HasField("accepted"):
            request_id = frame.accepted.request_id
        elif frame.HasField("delta"):
            messages.append(ReceivedMessage(time_s, frame.delta.index, len(frame.delta.tokens)))
        else:
            finished = True
    if not finished:
        raise IncompleteStreamError(
            f"stream {request_id!r} ended after {len(messages)} deltas without its last message"
        )
    return StreamRecord(request_id, tuple(messages))
