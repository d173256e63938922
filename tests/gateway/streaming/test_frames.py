"""How frames become messages: whatever the cut, a reader gets the same tokens and text."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.streaming.frames import (
    DeltaFrame,
    EventFrame,
    Frame,
    accepted_frame,
    decode_frame,
    finished_frame,
    messages,
)
from kvrelay.core.job import FinishReason, Token, TopLogprob
from kvrelay.core.timeline import Phases
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import session_pb2
from kvrelay.wire.convert import finish_reason_to_pb, token_to_pb


def delta(sequence: int, index: int, text: str, reason: FinishReason | None = None) -> DeltaFrame:
    logprobs = (TopLogprob(3, -0.5), TopLogprob(4, -1.5))
    token = Token(100 + index, -0.25, logprobs) if index % 2 else Token(100 + index)
    return DeltaFrame(sequence, index, (token,), text, reason)


def parsed(frames: list[Frame]) -> list[pb.GenerateResponse]:
    return [pb.GenerateResponse.FromString(message) for message in messages(frames)]


def test_deltas_that_wait_together_become_one_message() -> None:
    (message,) = parsed([delta(0, 4, "a"), delta(0, 5, ""), delta(0, 6, "bc", FinishReason.STOP)])
    assert (message.delta.index, message.delta.text) == (4, "abc")
    assert [token.token_id for token in message.delta.tokens] == [104, 105, 106]
    assert [token.HasField("logprob") for token in message.delta.tokens] == [False, True, False]
    assert [top.token_id for top in message.delta.tokens[1].top_logprobs] == [3, 4]
    assert message.delta.finish_reason == session_pb2.FINISH_REASON_STOP


def test_deltas_are_not_merged_across_accepted_and_finished() -> None:
    last = finished_frame([FinishReason.LENGTH], 3, 2, 0, Phases())
    frames: list[Frame] = [accepted_frame("id", "model", 3, 7), delta(0, 0, "a"), delta(0, 1, "b"), last]
    assert [message.WhichOneof("event") for message in parsed(frames)] == ["accepted", "delta", "finished"]


tokens = st.builds(
    Token,
    st.integers(0, 2**32 - 1),
    st.none() | st.floats(width=32, allow_nan=False),
    st.just(()) | st.just((TopLogprob(3, -0.5), TopLogprob(70_000, -1.5))),
)


@given(
    st.integers(0, 300),
    st.integers(0, 2**32 - 1),
    st.lists(tokens, max_size=4),
    st.text(max_size=80),
    st.none() | st.sampled_from(FinishReason),
)
def test_encoded_deltas_equal_protobufs_bytes(
    sequence: int, index: int, tokens: list[Token], text: str, reason: FinishReason | None
) -> None:
    expected = pb.Delta(
        sequence=sequence,
        index=index,
        tokens=[token_to_pb(token) for token in tokens],
        text=text,
        finish_reason=finish_reason_to_pb(reason),
    )
    data = DeltaFrame(sequence, index, tuple(tokens), text, reason).data
    assert data == pb.GenerateResponse(delta=expected).SerializeToString(deterministic=True)


def test_a_frame_survives_the_log_unchanged() -> None:
    frame = delta(1, 7, "text", FinishReason.LENGTH)
    again = decode_frame(frame.data)
    assert isinstance(again, DeltaFrame)
    assert again.data == frame.data
    assert (again.sequence, again.index, again.tokens, again.text, again.finish_reason) == (
        frame.sequence,
        frame.index,
        frame.tokens,
        frame.text,
        frame.finish_reason,
    )
    event = decode_frame(accepted_frame("id", "model", 3, 7).data)
    assert isinstance(event, EventFrame)
    assert not event.finished


@given(
    st.lists(st.tuples(st.integers(0, 2), st.text(max_size=3)), max_size=30), st.lists(st.integers(1, 8), max_size=30)
)
def test_merging_at_any_cut_keeps_tokens_and_text(outputs: list[tuple[int, str]], cuts: list[int]) -> None:
    indexes = {0: 0, 1: 0, 2: 0}
    frames: list[Frame] = []
    for sequence, text in outputs:
        frames.append(delta(sequence, indexes[sequence], text))
        indexes[sequence] += 1
    tokens: dict[int, list[int]] = {}
    texts: dict[int, str] = {}
    position = 0
    for length in [*cuts, len(frames)]:
        for message in parsed(frames[position : position + length]):
            got = tokens.setdefault(message.delta.sequence, [])
            assert message.delta.index == len(got), "I1"
            got.extend(token.token_id for token in message.delta.tokens)
            texts[message.delta.sequence] = texts.get(message.delta.sequence, "") + message.delta.text
        position += length
    assert tokens == {number: [100 + index for index in range(count)] for number, count in indexes.items() if count}
    assert texts == {number: "".join(text for sequence, text in outputs if sequence == number) for number in tokens}
