"""Frames: the messages of a request's output, encoded once for all readers and the log."""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain

from google.protobuf.message import DecodeError

from kvrelay.core.job import FinishReason, Token
from kvrelay.core.timeline import Phases
from kvrelay.errors import UnreadableStateError
from kvrelay.v1 import inference_pb2
from kvrelay.wire.convert import finish_reason_from_pb, finish_reason_to_pb, token_from_pb, token_to_pb

MAX_ENDED_FRAMES = 100_000
"""Of ended requests; once for readers and once for the store."""


class DeltaFrame:
    __slots__ = ("_data", "finish_reason", "index", "sequence", "text", "tokens")

    def __init__(
        self, sequence: int, index: int, tokens: tuple[Token, ...], text: str, finish_reason: FinishReason | None
    ) -> None:
        self.sequence = sequence
        self.index = index
        self.tokens = tokens
        self.text = text
        self.finish_reason = finish_reason
        self._data: bytes | None = None

    @property
    def data(self) -> bytes:
        """The serialized GenerateResponse."""
        if self._data is None:
            self._data = _encode_delta(self)
        return self._data


class EventFrame:
    """The first or the last message."""

    __slots__ = ("data", "finished")

    def __init__(self, message: inference_pb2.GenerateResponse) -> None:
        self.data = message.SerializeToString()
        self.finished = message.HasField("finished")


Frame = DeltaFrame | EventFrame


def _encode_delta(frame: DeltaFrame) -> bytes:
    """Same bytes as protobuf, several times faster, because all tokens pass here."""
    parts = []
    if frame.sequence:
        parts.append(b"\x08" + _varint(frame.sequence))
    if frame.index:
        parts.append(b"\x10" + _varint(frame.index))
    parts.extend(map(_encode_token, frame.tokens))
    if frame.text:
        text = frame.text.encode()
        parts.append(b"\x22" + _varint(len(text)) + text)
    if frame.finish_reason is not None:
        parts.append(b"\x28" + _varint(finish_reason_to_pb(frame.finish_reason)))
    delta = b"".join(parts)
    return b"\x12" + _varint(len(delta)) + delta


def _encode_token(token: Token) -> bytes:
    if token.logprob is None:
        return _plain_token(token.token_id)
    return _token_field(token_to_pb(token).SerializeToString())


@lru_cache(maxsize=65_536)
def _plain_token(token_id: int) -> bytes:
    return _token_field(b"\x08" + _varint(token_id) if token_id else b"")


def _token_field(token: bytes) -> bytes:
    return b"\x1a" + _varint(len(token)) + token


def _varint(value: int) -> bytes:
    if value < 128:
        return _ONE_BYTE[value]
    if value < 16_384:
        return bytes((value & 127 | 128, value >> 7))
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)


_ONE_BYTE = [bytes([value]) for value in range(128)]


def accepted_frame(request_id: str, model: str, num_prompt_tokens: int, seed: int) -> EventFrame:
    accepted = inference_pb2.Accepted(
        request_id=request_id, model=model, num_prompt_tokens=num_prompt_tokens, seed=seed
    )
    return EventFrame(inference_pb2.GenerateResponse(accepted=accepted))


def finished_frame(
    reasons: Sequence[FinishReason],
    num_prompt_tokens: int,
    num_output_tokens: int,
    num_cached_tokens: int,
    phases: Phases,
) -> EventFrame:
    usage = inference_pb2.Usage(
        num_prompt_tokens=num_prompt_tokens, num_output_tokens=num_output_tokens, num_cached_tokens=num_cached_tokens
    )
    times = inference_pb2.Phases(**{name: getattr(phases, name) for name in Phases.__slots__})
    finish_reasons = [finish_reason_to_pb(reason) for reason in reasons]
    finished = inference_pb2.Finished(finish_reasons=finish_reasons, usage=usage, phases=times)
    return EventFrame(inference_pb2.GenerateResponse(finished=finished))


def decode_frame(data: bytes) -> Frame:
    """Raises UnreadableStateError."""
    try:
        message = inference_pb2.GenerateResponse.FromString(data)
    except DecodeError as failure:
        problem = (
            "what the state store holds of the request's output cannot be read; send the request again as a new one"
        )
        raise UnreadableStateError(problem) from failure
    if not message.HasField("delta"):
        return EventFrame(message)
    delta = message.delta
    tokens = tuple(map(token_from_pb, delta.tokens))
    frame = DeltaFrame(delta.sequence, delta.index, tokens, delta.text, finish_reason_from_pb(delta.finish_reason))
    frame._data = data
    return frame


def is_wanted(frame: Frame, from_index: int) -> bool:
    """Whether a reader that starts at output `from_index` gets the frame."""
    return isinstance(frame, EventFrame) or frame.index >= from_index


def messages(frames: Sequence[Frame]) -> Iterable[bytes]:
    """Merges deltas of a sequence, but never past an event frame."""
    return (frames[0].data,) if len(frames) == 1 else _merged(frames)


def _merged(frames: Sequence[Frame]) -> Iterator[bytes]:
    deltas: dict[int, list[DeltaFrame]] = {}
    for frame in frames:
        if isinstance(frame, DeltaFrame):
            deltas.setdefault(frame.sequence, []).append(frame)
        else:
            yield from map(_merge, deltas.values())
            deltas.clear()
            yield frame.data
    yield from map(_merge, deltas.values())


def _merge(deltas: Sequence[DeltaFrame]) -> bytes:
    if len(deltas) == 1:
        return deltas[0].data
    tokens = tuple(chain.from_iterable(delta.tokens for delta in deltas))
    text = "".join([delta.text for delta in deltas])
    return DeltaFrame(deltas[0].sequence, deltas[0].index, tokens, text, deltas[-1].finish_reason).data


def token_ids(frames: Iterable[Frame], num_sequences: int) -> list[list[int]]:
    """Token ids by sequence.

    Raises:
        UnreadableStateError: a frame has a sequence that the request does not have.
    """
    ids: list[list[int]] = [[] for _ in range(num_sequences)]
    for frame in frames:
        if isinstance(frame, DeltaFrame):
            if frame.sequence >= num_sequences:
                raise UnreadableStateError("the output that the state store holds is not this request's; send it again")
            ids[frame.sequence].extend(token.token_id for token in frame.tokens)
    return ids
