"""What a client knows of a request that it streams, and what to do when the stream breaks.

Resuming asks for the whole output again and drops what the client has: tokens by index, text by
length, because text may lag behind tokens. No network, no clock.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import grpc

from kvrelay.client import requests
from kvrelay.client.connection_errors import is_answer_of_http, unreachable_error
from kvrelay.client.results import Accepted, Completion, Delta, Event, Finished, Output
from kvrelay.core.backoff import Backoff
from kvrelay.core.job import FinishReason, Token
from kvrelay.errors import DeadlineError, InternalError, KvrelayError, RequestNotFoundError, UnavailableError
from kvrelay.v1 import inference_pb2
from kvrelay.wire.errors import DETAILS_METADATA_KEY, error_of_rpc

_log = logging.getLogger(__name__)

StreamRequest = inference_pb2.GenerateRequest | inference_pb2.ResumeRequest

_BACKOFF_INITIAL_S = 0.1
_BACKOFF_MAXIMUM_S = 2.0
_CANCELLED_HERE = ("Channel closed!", "Locally cancelled by application!")
"""gRPC's words for calls that their own process cancels."""


@dataclass(slots=True)
class _SequenceOutput:
    next_index: int
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    num_characters_to_skip: int = 0


class StreamState:
    """Collects the events of one request, each token once, from output index `from_index` on."""

    def __init__(self, from_index: int = 0) -> None:
        self.from_index = from_index
        self.accepted: Accepted | None = None
        self.finished: Finished | None = None
        self._outputs: dict[int, _SequenceOutput] = {}

    def take(self, event: Event | None) -> Delta | None:
        """Adds an event and returns what is new in it. Raises InternalError for a missing token."""
        if isinstance(event, Accepted):
            self.accepted = event
        elif isinstance(event, Finished):
            self.finished = event
        elif isinstance(event, Delta):
            return self._take_delta(event)
        return None

    def next_request(self, first: StreamRequest, *, is_lost: bool = False) -> StreamRequest:
        """The request to send now: `first`, or once it is accepted, one for its output.

        A repeated `first` joins the request by its idempotency key. A lost request is sent again
        with its seed, so that its output is the same.
        """
        if self.accepted is None:
            return first
        for output in self._outputs.values():
            output.num_characters_to_skip = len(output.text)
        if is_lost:
            assert isinstance(first, inference_pb2.GenerateRequest), "only a generation can be sent again"
            return requests.generate_again(first, self.accepted.seed)
        coalesce_ms = first.coalesce_ms if first.HasField("coalesce_ms") else None
        return requests.resume_request(self.accepted.request_id, self.from_index, coalesce_ms)

    def text(self, sequence: int = 0) -> str:
        return self._outputs[sequence].text if sequence in self._outputs else ""

    def completion(self) -> Completion:
        """The whole result; only after `finished`."""
        assert self.accepted is not None, "the stream has not begun"
        assert self.finished is not None, "the stream has not finished"
        numbers = range(max(len(self.finished.finish_reasons), 1))
        outputs = (self._outputs.get(number, _SequenceOutput(self.from_index)) for number in numbers)
        values = tuple(Output(output.text, tuple(output.tokens), output.finish_reason) for output in outputs)
        return Completion(self.accepted, values, self.finished)

    def _take_delta(self, delta: Delta) -> Delta | None:
        output = self._outputs.setdefault(delta.sequence, _SequenceOutput(self.from_index))
        if delta.tokens and delta.index > output.next_index:
            raise InternalError(f"the server left out token {output.next_index} of sequence {delta.sequence}")
        num_known_tokens = min(len(delta.tokens), max(0, output.next_index - delta.index))
        num_known_characters = min(len(delta.text), output.num_characters_to_skip)
        output.num_characters_to_skip -= num_known_characters
        new_reason = delta.finish_reason if output.finish_reason is None else None
        new = replace(
            delta,
            index=delta.index + num_known_tokens,
            tokens=delta.tokens[num_known_tokens:],
            text=delta.text[num_known_characters:],
            finish_reason=new_reason,
        )
        if not (new.tokens or new.text or new.finish_reason):
            return None
        output.tokens.extend(new.tokens)
        output.next_index += len(new.tokens)
        output.text += new.text
        output.finish_reason = output.finish_reason or new_reason
        return new


class Recovery:
    """Decides about a broken stream: retry after a delay, or give up with a typed error.

    It gives up at the deadline, or when every address in a row answered UNAVAILABLE, or did not
    answer before the request began. A gateway that is shutting down does not count, because its
    successor may answer.

    A resumable request is sent again if no gateway knows it, because its gateway died before
    storing it or Redis lost it. Others are sent again only before they began.

    Args:
        can_begin_again: the stream began with the request itself, not with a resumption.
    """

    def __init__(self, resumable: bool, addresses: Sequence[str], *, can_begin_again: bool = False) -> None:
        self.request_is_lost = False
        """No gateway knows the request."""
        self._resumable = resumable
        self._can_begin_again = resumable and can_begin_again
        self._addresses = addresses
        self._begun = False
        self._announced = False
        self._told_to_wait = False
        self._num_refusals_left = self._max_refusals = len(addresses)
        self._backoff = Backoff(_BACKOFF_INITIAL_S, _BACKOFF_MAXIMUM_S, random.random)

    def received(self, *, new: bool) -> None:
        """`new`: the message had new output."""
        self._begun = True
        self.request_is_lost = False
        if not new:
            return
        self._announced = self._told_to_wait = False
        self._backoff.reset()
        self._num_refusals_left = self._max_refusals

    def delay_s(self, failure: grpc.RpcError | None, remaining_s: float) -> float:
        """Returns the seconds to wait before resuming, or raises the stream's error.

        Args:
            failure: how the stream ended; None when it ended without its last message.
            remaining_s: time until the request's deadline.
        """
        error = _stream_error(failure, self._addresses)
        if self._begun and self._can_begin_again and isinstance(error, RequestNotFoundError):
            self.request_is_lost = True
        elif not _is_broken(failure) or not (self._resumable or self._may_send_again(error)):
            raise error
        if isinstance(error, UnavailableError) and error.retry_after_ms is not None:
            self._told_to_wait = True
        elif self._is_refusal(failure):
            if self._num_refusals_left == 0:
                raise error
            self._num_refusals_left -= 1
        if self._begun and not self._announced:
            _log.warning("lost the stream (%s); resuming it until its timeout", error.message)
            self._announced = True
        delay_s = self._backoff.next_delay_s()
        if delay_s >= remaining_s:
            raise DeadlineError(f"the stream broke and could not be resumed before the deadline: {error.message}")
        return delay_s

    def _is_refusal(self, failure: grpc.RpcError | None) -> bool:
        if failure is None or self._told_to_wait or self.request_is_lost:
            return False
        return says_so_itself(failure) or not self._begun

    def _may_send_again(self, error: KvrelayError) -> bool:
        return not self._begun and isinstance(error, UnavailableError)


def _stream_error(failure: grpc.RpcError | None, addresses: Sequence[str]) -> KvrelayError:
    if failure is None:
        return UnavailableError("the stream ended before its last message")
    return call_error(failure, addresses)


def _is_broken(failure: grpc.RpcError | None) -> bool:
    """Whether the connection ended the stream, and not the request."""
    if failure is None:
        return True
    assert isinstance(failure, grpc.Call | grpc.aio.AioRpcError)
    if failure.code() is grpc.StatusCode.UNAVAILABLE:
        return True
    # gRPC or a proxy gives these for a connection that was reset.
    torn = (grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    return failure.code() in torn and not says_so_itself(failure)


def says_so_itself(failure: grpc.RpcError) -> bool:
    """Whether a kvrelay server made the status, and not gRPC or a proxy."""
    assert isinstance(failure, grpc.Call | grpc.aio.AioRpcError)
    return any(key == DETAILS_METADATA_KEY for key, _ in failure.trailing_metadata() or ())


def unreachable(failure: grpc.RpcError) -> bool:
    """Whether the call reached no server, so that the client may ask another address."""
    assert isinstance(failure, grpc.Call | grpc.aio.AioRpcError)
    return _was_cut_off(failure) or (failure.code() is grpc.StatusCode.UNAVAILABLE and not says_so_itself(failure))


def _was_cut_off(failure: grpc.RpcError) -> bool:
    """Whether gRPC cancelled the call, as it does in a server that stops before it has begun it."""
    assert isinstance(failure, grpc.Call | grpc.aio.AioRpcError)
    is_cancelled = failure.code() is grpc.StatusCode.CANCELLED and not says_so_itself(failure)
    return is_cancelled and failure.details() not in _CANCELLED_HERE


def call_error(failure: grpc.RpcError, addresses: Sequence[str]) -> KvrelayError:
    """Names the addresses when none answered."""
    if _was_cut_off(failure):
        return UnavailableError("the gateway cut the call off, as it does when it stops; send it again")
    error = error_of_rpc(failure)
    if unreachable(failure) or (not says_so_itself(failure) and is_answer_of_http(error.message)):
        return unreachable_error(error.message, addresses)
    if isinstance(error, DeadlineError) and not says_so_itself(failure):
        return DeadlineError("no answer within the timeout")
    return error
