"""A client of the simulated cluster: sends one request, checks every message of the answer, resumes
elsewhere where it may.

Checked here: I1 (each index once, in order, one terminal), I2 (tokens, text and reasons as without
faults), I6 (an end in time).
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

import grpc

from kvrelay.core.job import FinishReason, Job, JobId
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.errors import DeadlineError, KvrelayError, UnavailableError
from kvrelay.security.process_security import POLL_INTERVAL_S
from kvrelay.v1 import inference_pb2, inference_pb2_grpc, session_pb2
from kvrelay.wire.errors import error_of_rpc
from tests.simulation.network import ClientCall, Network, Place, SimulatedChannel
from tests.simulation.plan import RequestPlan
from tests.simulation.processes import word_of
from tests.simulation.security import metadata_of
from tests.simulation.toy_model import MODEL, expected_output
from tests.simulation.virtual_time import World

LATENESS_S = 1.0
WITHDRAWN_WITHIN_S = 2 * POLL_INTERVAL_S + 0.2
"""Two looks at the keys file, and the way to the client."""
_REASONS = {
    FinishReason.STOP: session_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: session_pb2.FINISH_REASON_LENGTH,
}


class ViolationError(AssertionError):
    """A promise was broken; the message begins with its name."""


@dataclass
class Received:
    """What came of one sequence."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    has_whole_text: bool = True
    """False where a delta after a resume had text that cannot be told from what came before."""
    reason: int = session_pb2.FINISH_REASON_UNSPECIFIED


def expected_sequences(plan: RequestPlan) -> list[tuple[list[int], str, int]]:
    """Tokens, text and reason of every sequence of a request, without faults."""
    expected = []
    for number in range(plan.num_sequences):
        sampling = SamplingParams(
            temperature=0.0 if plan.greedy else 1.0,
            seed=plan.seed,
            max_tokens=plan.max_tokens,
            ignore_eos=plan.ignore_eos,
            n=plan.num_sequences,
        )
        job = Job(JobId("", 1), plan.token_ids, len(plan.token_ids), plan.num_sequences, sampling, plan.tenant, 0)
        token_ids, reason = expected_output(job, number)
        for position, token_id in enumerate(token_ids):
            if token_id in plan.stop_words:
                token_ids, reason = token_ids[: position + 1], FinishReason.STOP
                break
        shown = [word_of(token_id) for token_id in token_ids]
        if token_ids[-1] in plan.stop_words:
            shown[-1] = ""
        expected.append((token_ids, " ".join(shown).strip(), int(_REASONS[reason])))
    return expected


class SimulatedClient:
    """One call, and those that resume it.

    Args:
        world, network: of the cluster.
        plan: what to ask for.
        gateways: addresses, of which the first is asked first.
        has_key: whether it sends its tenant's key.
    """

    def __init__(self, world: World, network: Network, plan: RequestPlan, gateways: list[str], has_key: bool) -> None:
        self.plan = plan
        self.loop = world.new_loop(f"client {plan.number}")
        self.request_id = ""
        self.succeeded = False
        self.error: KvrelayError | None = None
        self.cancelled = False
        self.is_done = False
        self.num_resumes = 0
        self.num_pauses = 0
        self.is_spied_on = False
        self._metadata = metadata_of(plan.tenant) if has_key else ()
        self.asked_again = False
        self.deadline = 0.0
        self.received = [Received() for _ in range(plan.num_sequences)]
        self._world = world
        self._network = network
        self._gateways = gateways
        self._place = Place(self.loop, f"c{plan.number}:1")
        self._task: asyncio.Task[None] | None = None
        self._call: ClientCall | None = None
        self._expected: list[tuple[list[int], str, int]] | None = None

    def start(self) -> None:
        """The call begins now."""
        self.deadline = self._world.now + self.plan.timeout_s
        self._task = self.loop.spawn(self._run(), f"client {self.plan.number}")
        if self.plan.cancel_after_s is not None:
            self.loop.call_later(self.plan.cancel_after_s, self._cancel)

    def check_in_time(self) -> None:
        """I6. To be asked at any time."""
        if self.is_done or not self.deadline or self._world.now <= self.deadline + LATENESS_S:
            return
        # else all is here, and the client reads it slowly
        if self._call is None or not self._call.is_over:
            raise ViolationError(f"I6: client {self.plan.number} has no end {LATENESS_S} s after its deadline")

    def check_withdrawn(self, withdrawn_at_s: float) -> None:
        """T. To be asked at any time about a client whose key is withdrawn."""
        if self.is_done or self._world.now <= withdrawn_at_s + WITHDRAWN_WITHIN_S:
            return
        if self._call is not None and not self._call.is_over:
            raise ViolationError(f"T: client {self.plan.number} is served though its key was withdrawn")

    def _cancel(self) -> None:
        if not self.is_done and self._task is not None:
            self.cancelled = True
            self._task.cancel()

    async def _run(self) -> None:
        try:
            await self._ask()
        except asyncio.CancelledError:
            if not self.cancelled:
                raise
        except ViolationError as violation:
            self._world.problems.append(str(violation))
        finally:
            self.is_done = True

    async def _ask(self) -> None:
        number = 0
        while True:
            address = self._gateways[number % len(self._gateways)]
            channel: Any = SimulatedChannel(self._network, self._place, address)
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            left_s = self.deadline - self._world.now
            if left_s <= 0:
                self.error = DeadlineError("no time is left")
                return
            if self.request_id:
                request = inference_pb2.ResumeRequest(request_id=self.request_id, from_index=self._next_index())
                call = stub.Resume(request, timeout=left_s, metadata=self._metadata)
                self.num_resumes += 1
            else:
                call = stub.Generate(self._request(), timeout=left_s, metadata=self._metadata)
            self._call = call
            try:
                await self._read(call)
                return
            except grpc.aio.AioRpcError as failure:
                self.error = error_of_rpc(failure)
            finally:
                call.cancel()
            if not self._may_go_on(number):
                return
            number += 1
            await asyncio.sleep(0.05)

    def _may_go_on(self, number: int) -> bool:
        if number > 40 or not isinstance(self.error, UnavailableError):
            return False
        return self.plan.resumable if self.request_id else bool(self.plan.key)

    def _next_index(self) -> int:
        return min(len(received.token_ids) for received in self.received)

    def _request(self) -> inference_pb2.GenerateRequest:
        plan = self.plan
        request = inference_pb2.GenerateRequest(
            tenant=plan.tenant, resumable=plan.resumable, idempotency_key=plan.key, model=MODEL.name
        )
        request.token_ids.ids.extend(plan.token_ids)
        request.sampling.temperature = 0.0 if plan.greedy else 1.0
        request.sampling.seed = plan.seed
        request.sampling.max_tokens = plan.max_tokens
        request.sampling.ignore_eos = plan.ignore_eos
        request.sampling.n = plan.num_sequences
        request.sampling.stop.extend(word_of(token_id).encode() for token_id in plan.stop_words)
        return request

    async def _read(self, call: grpc.aio.UnaryStreamCall[object, object]) -> None:
        ended = False
        async for data in call:
            if ended:
                raise ViolationError("I1: something follows the terminal message")
            message = inference_pb2.GenerateResponse.FromString(cast(bytes, data))
            match message.WhichOneof("event"):
                case "accepted":
                    self._take_accepted(message.accepted)
                case "delta":
                    self._take_delta(message.delta)
                case "finished":
                    ended = True
                    self._check_whole(message.finished)
            if self.plan.pause_s:
                self.num_pauses += 1
                await asyncio.sleep(self.plan.pause_s)
        if not ended:
            raise ViolationError("I1: the stream ended with OK and without a terminal message")
        self.error = None
        self.succeeded = True

    def _take_accepted(self, accepted: inference_pb2.Accepted) -> None:
        if self.request_id and accepted.request_id != self.request_id:
            raise ViolationError("I1: another request's output")
        self.request_id = accepted.request_id

    def _take_delta(self, delta: inference_pb2.Delta) -> None:
        received = self.received[delta.sequence]
        if delta.index > len(received.token_ids):
            raise ViolationError(
                f"I1: index {delta.index} of sequence {delta.sequence} comes after {len(received.token_ids)}"
            )
        token_ids = [token.token_id for token in delta.tokens]
        num_known = len(received.token_ids) - delta.index
        if num_known and not self.num_resumes:
            raise ViolationError(f"I1: index {delta.index} of sequence {delta.sequence} comes again")
        if num_known >= len(token_ids):
            return  # of a sequence that was further than another when the client came back
        if num_known:  # what was read from the log is merged, whatever the client has of it
            token_ids, received.has_whole_text = token_ids[num_known:], False
        if received.reason:
            raise ViolationError(f"I1: sequence {delta.sequence} goes on after its end")
        received.token_ids += token_ids
        received.text += delta.text
        received.reason = delta.finish_reason
        self._check_prefix(delta.sequence)

    def _check_prefix(self, number: int) -> None:
        if self._expected is None:
            self._expected = expected_sequences(self.plan)
        token_ids, expected = self.received[number].token_ids, self._expected[number][0]
        if token_ids != expected[: len(token_ids)]:
            raise ViolationError(f"I2: sequence {number} has {token_ids}, without faults it has {expected}")

    def _check_whole(self, finished: inference_pb2.Finished) -> None:
        assert self._expected is not None or not any(received.token_ids for received in self.received)
        self._expected = self._expected or expected_sequences(self.plan)
        for number, (received, (token_ids, text, reason)) in enumerate(zip(self.received, self._expected, strict=True)):
            got_text = received.text.strip() if received.has_whole_text else text
            if (received.token_ids, got_text, received.reason) != (token_ids, text, reason):
                got = (received.token_ids, received.text, received.reason)
                raise ViolationError(
                    f"I2: sequence {number} ended as {got}, without faults {(token_ids, text, reason)}"
                )
        if list(finished.finish_reasons) != [reason for _, _, reason in self._expected]:
            raise ViolationError("I2: the terminal message has other reasons")
