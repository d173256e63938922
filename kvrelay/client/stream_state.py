"""What a client knows of a request whose output it streams, and what to do when the stream breaks. Pure: no network, no clock.

Resuming asks for the whole output again and drops what is known already: tokens by their index, text by its length. Text may lag
behind tokens (half a character, the possible start of a stop string), so only all of it since the first index can be compared.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import grpc

from kvrelay.backoff import Backoff
from kvrelay.client import requests
from kvrelay.client.results import Accepted, Completion, Delta, Event, Finished, Output
from kvrelay.error_status import DETAILS_METADATA_KEY, error_of_rpc
from kvrelay.errors import DeadlineError, InternalError, KvrelayError, RequestNotFoundError, UnavailableError
from kvrelay.v1 import inference_pb2
from kvrelay.work import FinishReason, Token

_log = logging.getLogger(__name__)

StreamRequest = inference_pb2.GenerateRequest | inference_pb2.ResumeRequest

_BACKOFF_INITIAL_S = 0.1
_BACKOFF_MAXIMUM_S = 2.0


@dataclass(slots=True)
class _SequenceOutput:
    next_index: int
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    num_characters_to_skip: int = 0


class StreamState:
    """Collects the events of one request, each token once.

    Args:
        from_index: output index with which the stream begins.
    """

    def __init__(self, from_index: int = 0) -> None:
        self.from_index = from_index
        self.accepted: Accepted | None = None
        self.finished: Finished | None = None
        self._outputs: dict[int, _SequenceOutput] = {}

    def take(self, event: Event | None) -> Delta | None:
        """What is new in an event for the user.

        Raises:
            InternalError: the server left out a token.
        """
        if isinstance(event, Accepted):
            self.accepted = event
        elif isinstance(event, Finished):
            self.finished = event
        elif isinstance(event, Delta):
            return self._take_delta(event)
        return None

    def next_request(self, first: StreamRequest, *, is_lost: bool = False) -> StreamRequest:
        """What to ask for when a stream begins: `first`, or, once the request is accepted, its output again from `from_index`.

        Before that, a repeated `first` joins the request it may have made, by its idempotency key. A request that is lost is made
        once more, with the seed that it had: its output is the same.
        """
        if self.accepted is None:
            return first
        for output in self._outputs.values():
            output.num_characters_to_skip = len(output.text)
        if is_lost:
            assert isinstance(first, inference_pb2.GenerateRequest), "only what was generated can be again"
            return requests.generate_again(first, self.accepted.seed)
        coalesce_ms = first.coalesce_ms if first.HasField("coalesce_ms") else None
        return requests.resume_request(self.accepted.request_id, self.from_index, coalesce_ms)

    def text(self, sequence: int = 0) -> str:
        """Text of a sequence so far."""
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
    """Decides about a broken stream: try again after a delay, or give up with a typed error.

    A connection that broke is tried again until the deadline. Two things are believed once every address has shown them in a row:
    that a gateway says UNAVAILABLE itself, and that nobody answers at all before anything has begun. A gateway that is shutting
    down says when to come again, and is not believed to be the last: others, or its successor, are asked until the deadline.

    A request that is not resumable is sent again only as long as nothing of it has begun. One that is may be lost all the same,
    when its gateway died just before it wrote it down, or Redis lost it: then nobody knows it any more, and it is begun again.

    Args:
        resumable: whether the request may be sent again once it has begun.
        addresses: of gateways.
        can_begin_again: whether the stream began with the request itself, so that a lost one can be made once more.
    """

    def __init__(self, resumable: bool, addresses: Sequence[str], *, can_begin_again: bool = False) -> None:
        self.request_is_lost = False
        """Whether the request is to be made once more, for no gateway knows it."""
        self._resumable = resumable
        self._can_begin_again = resumable and can_begin_again
        self._addresses = addresses
        self._begun = False
        self._announced = False
        self._told_to_wait = False
        self._num_refusals_left = self._max_refusals = len(addresses)
        self._backoff = Backoff(_BACKOFF_INITIAL_S, _BACKOFF_MAXIMUM_S)

    def received(self, *, new: bool) -> None:
        """Something arrived: new output, or only what was known before."""
        self._begun = True
        self.request_is_lost = False
        if not new:
            return
        self._announced = self._told_to_wait = False
        self._backoff.reset()
        self._num_refusals_left = self._max_refusals

    def delay_s(self, failure: grpc.RpcError | None, remaining_s: float) -> float:
        """How long to wait before the stream is resumed, in seconds.

        Args:
            failure: how the stream ended; None when it just ended, without its last message.
            remaining_s: time until the request's deadline.

        Raises:
            KvrelayError: it is not to be resumed.
        """
        error = _stream_error(failure, self._addresses)
        if self._begun and self._can_begin_again and isinstance(error, RequestNotFoundError):
            self.request_is_lost = True
        elif not is_broken(failure) or not (self._resumable or self._may_send_again(error)):
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
        """Whether nothing of the request has begun, so that another gateway may be asked for all of it."""
        return not self._begun and isinstance(error, UnavailableError)


def _stream_error(failure: grpc.RpcError | None, addresses: Sequence[str]) -> KvrelayError:
    if failure is None:
        return UnavailableError("the stream ended before its last message")
    return call_error(failure, addresses)


def is_broken(failure: grpc.RpcError | None) -> bool:
    """Whether a stream's end says something about the connection rather than about the request."""
    if failure is None:
        return True
    assert isinstance(failure, grpc.Call | grpc.aio.AioRpcError)
    if failure.code() is grpc.StatusCode.UNAVAILABLE:
        return True
    # What gRPC itself, or a proxy, makes of a connection that was reset in the middle.
    torn = (grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    return failure.code() in torn and not says_so_itself(failure)


def says_so_itself(failure: grpc.RpcError) -> bool:
    """Whether the status was made by a server of kvrelay and not by gRPC on the way."""
    assert isinstance(failure, grpc.Call | grpc.aio.AioRpcError)
    return any(key == DETAILS_METADATA_KEY for key, _ in failure.trailing_metadata() or ())


def unreachable(failure: grpc.RpcError) -> bool:
    """Whether a call did not reach any server, so that another address may be asked."""
    assert isinstance(failure, grpc.Call | grpc.aio.AioRpcError)
    return failure.code() is grpc.StatusCode.UNAVAILABLE and not says_so_itself(failure)


def call_error(failure: grpc.RpcError, addresses: Sequence[str]) -> KvrelayError:
    """The typed error of a failed call; where nobody answered, it names who was asked."""
    error = error_of_rpc(failure)
    if unreachable(failure):
        # gRPC's text is a chain of causes; the last one is what a person wants to know.
        cause = error.message.rpartition(": ")[2].rstrip("]")
        return UnavailableError(f"cannot reach a gateway at {' or '.join(addresses)}: {cause}")
    if isinstance(error, DeadlineError) and not says_so_itself(failure):
        return DeadlineError("no answer within the timeout")
    return error
