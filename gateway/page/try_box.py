"""The prompt box of the live page: POST /api/try streams a request's output.

    {"text": "What is the capital of France?", "max_tokens": 64}

`chat`: whether the text is a user's message; by default if the model has a chat template. Each line
of the answer is a `GenerateResponse` or a final error.
"""

from __future__ import annotations  # aiohttp's classes are named for type checkers only

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway.gateway import Gateway
from gateway.page.page_guard import check_sender
from gateway.page.page_json import HEADERS, HttpRefusal, error_json, error_response, to_json
from gateway.requests.request_validation import deadline_of
from gateway.resume.stored_output import FrameReader
from gateway.streaming.frames import Frame, messages
from kvrelay.core.sampling_params import DEFAULT_MAX_TOKENS
from kvrelay.errors import DeadlineError, InvalidRequestError, KvrelayError, OverloadedError, UnsupportedError
from kvrelay.network.http_bounds import HostNames
from kvrelay.v1 import inference_pb2, session_pb2

if TYPE_CHECKING:
    from aiohttp import web

MAX_BODY_BYTES = 16 * 1024
MAX_TOKENS = DEFAULT_MAX_TOKENS
"""Also the default."""
MAX_AT_ONCE = 4
BODY_TIMEOUT_S = 10.0
LAST_LINES_TIMEOUT_S = 5.0
"""Time after the deadline until a page that does not read is cut off."""
LINES_TYPE = "application/x-ndjson"


class TypedPrompt(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    text: str = Field(min_length=1)
    chat: bool | None = None
    model: str = ""
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)


class TryBox:
    def __init__(self, gateway: Gateway, is_open: bool, names: HostNames) -> None:
        self.is_open = is_open
        self._gateway = gateway
        self._names = names
        self._num_now = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        try:
            if not self.is_open:
                advice = (
                    "by itself it is only where the HTTP port listens on loopback; start the gateway with --try-box"
                )
                raise UnsupportedError(f"the box to try prompts is off here: {advice}")
            check_sender(request.headers, self._names)
            with self._place():
                deadline = deadline_of(self._gateway.settings)
                prompt = _parse(await _read_body(request))
                reader = await self._gateway.generation.open(await self._to_request(prompt, deadline), deadline)
                return await _stream(request, reader, deadline + LAST_LINES_TIMEOUT_S)
        except (KvrelayError, HttpRefusal) as error:
            return error_response(error)

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._num_now >= MAX_AT_ONCE:
            with self._gateway.metrics.counting_refusals():
                raise OverloadedError(
                    f"{MAX_AT_ONCE} prompts are being tried already; try again when one of them has its answer"
                )
        self._num_now += 1
        try:
            yield
        finally:
            self._num_now -= 1

    async def _to_request(self, prompt: TypedPrompt, deadline: float) -> inference_pb2.GenerateRequest:
        sampling = session_pb2.SamplingParams(max_tokens=prompt.max_tokens)
        if not (await self._has_template(prompt.model, deadline) if prompt.chat is None else prompt.chat):
            return inference_pb2.GenerateRequest(text=prompt.text, model=prompt.model, sampling=sampling)
        chat = inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content=prompt.text)])
        return inference_pb2.GenerateRequest(chat=chat, model=prompt.model, sampling=sampling)

    async def _has_template(self, model: str, deadline: float) -> bool:
        self._gateway.starter.check_room()  # before any cost
        preparation = self._gateway.preparation
        limits = await preparation.select_model(model, deadline)
        tokenizer = await preparation.tokenizers.get(limits.model.fingerprint)
        return await preparation.texts.has_chat_template(tokenizer)


async def _read_body(request: web.Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.content.iter_any():
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    raise HttpRefusal(
                        413, f"the body has more than {MAX_BODY_BYTES} bytes; send a longer prompt over gRPC"
                    )
    except TimeoutError:
        raise DeadlineError(f"the body did not come within {BODY_TIMEOUT_S:g} s; send it again") from None
    return bytes(body)


def _parse(body: bytes) -> TypedPrompt:
    try:
        return TypedPrompt.model_validate_json(body)
    except ValidationError as failure:
        first = failure.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "body"
        advice = 'send a JSON object such as {"text": "Hello", "max_tokens": 64}'
        raise InvalidRequestError(field, f"is wrong: {first['msg']}; {advice}") from None


async def _stream(request: web.Request, reader: FrameReader, until: float) -> web.StreamResponse:
    """aiohttp cancels this when the page goes."""
    from aiohttp import web

    response = web.StreamResponse(headers=HEADERS | {"Content-Type": LINES_TYPE, "X-Accel-Buffering": "no"})
    try:
        async with asyncio.timeout_at(until):
            await response.prepare(request)
            try:
                async for frames in reader.batches():
                    await response.write(_lines(frames))
            except KvrelayError as error:
                await response.write(_line(error_json(error)))
            await response.write_eof()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()  # the page does not read
    except ConnectionResetError:
        pass  # the page is gone
    finally:
        reader.close()
    return response


def _lines(frames: list[Frame]) -> bytes:
    return b"".join(_line(to_json(inference_pb2.GenerateResponse.FromString(data))) for data in messages(frames))


def _line(event: object) -> bytes:
    return json.dumps(event).encode() + b"\n"
