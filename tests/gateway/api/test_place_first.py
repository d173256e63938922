"""A request takes a place before its prompt is looked at, whichever call it comes by."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.api.conversation_stream import ConversationStream
from gateway.api.generation import Generation
from gateway.requests.request_validation import MAX_MESSAGES
from kvrelay.errors import InvalidRequestError, OverloadedError
from kvrelay.v1 import inference_pb2 as pb

TURN = pb.ConverseRequest(messages=[pb.ChatMessage(role="user", content="x")])


class Full:
    """Has no place."""

    @asynccontextmanager
    async def place(self, tenant: str, deadline: float) -> AsyncIterator[None]:
        raise OverloadedError("all places are taken", 100)
        yield

    def check_open(self) -> None:
        pass


class Untouched:
    """Prepares nothing."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for")


UNTOUCHED: Any = Untouched()
FULL: Any = Full()


async def test_without_a_place_no_request_is_prepared() -> None:
    with pytest.raises(OverloadedError):
        await Generation(UNTOUCHED, FULL, UNTOUCHED, UNTOUCHED).open(pb.GenerateRequest(text="x"), 60.0)


async def test_without_a_place_no_turn_is_prepared() -> None:
    with pytest.raises(OverloadedError):
        await ConversationStream(UNTOUCHED, FULL).begin_turn(TURN, 60.0)


async def test_without_a_place_no_request_of_a_front_is_prepared() -> None:
    pytest.importorskip("smg_grpc_proto")
    from gateway.protocols.vllm_engine.service import VllmEngineService
    from kvrelay.vllm_engine.messages import engine_pb

    settings = SimpleNamespace(default_timeout_ms=60_000, max_timeout_ms=60_000)
    gateway: Any = SimpleNamespace(
        settings=settings, starter=FULL, preparation=UNTOUCHED, tokenizers=SimpleNamespace(files=None)
    )
    context: Any = SimpleNamespace(time_remaining=lambda: None, invocation_metadata=lambda: ())
    with pytest.raises(OverloadedError):
        await anext(VllmEngineService(gateway).Generate(engine_pb.GenerateRequest(request_id="r", text="x"), context))


async def test_a_conversations_tenant_is_short_before_anything_is_kept() -> None:
    turn = pb.ConverseRequest(messages=TURN.messages, tenant="t" * 129)
    with pytest.raises(InvalidRequestError, match="tenant has 129 bytes"):
        await ConversationStream(UNTOUCHED, FULL)._prepare(turn, turn.tenant, 60.0)


async def test_turns_do_not_add_up_beyond_the_messages_of_one_request() -> None:
    stream = ConversationStream(UNTOUCHED, FULL)
    conversation: Any = SimpleNamespace(num_messages=MAX_MESSAGES)
    limits: Any = SimpleNamespace()
    stream._conversation, stream._limits = conversation, limits
    with pytest.raises(InvalidRequestError, match=f"longer than {MAX_MESSAGES} messages"):
        await stream._prepare(TURN, "", 60.0)
