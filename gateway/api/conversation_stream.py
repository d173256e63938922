"""One Converse stream: each turn becomes a request."""

import asyncio
from dataclasses import replace

from gateway.api.conversation import Conversation
from gateway.lifecycle.generation_request import GenerationRequest
from gateway.requests.prompt_preparation import PromptPreparation, make_request
from gateway.requests.request_validation import MAX_MESSAGES, parse_messages, parse_sampling
from gateway.requests.runner import RequestRunner
from gateway.requests.starter import RequestStarter
from gateway.requests.tenants import tenant_of_call
from gateway.streaming.frames import DeltaFrame, Frame
from gateway.streaming.readers import OutputReader
from gateway.workers.served_models import ModelLimits
from kvrelay.core.bounds import check_length
from kvrelay.errors import InvalidRequestError
from kvrelay.v1 import inference_pb2, session_pb2
from kvrelay.wire.convert import with_model_defaults


class ConversationStream:
    def __init__(self, preparation: PromptPreparation, starter: RequestStarter) -> None:
        self._preparation = preparation
        self._starter = starter
        self._conversation: Conversation | None = None
        self._limits: ModelLimits | None = None
        self._tenant = ""
        self._sampling = session_pb2.SamplingParams()
        self._runner: RequestRunner | None = None
        self._answer_ids: list[int] = []
        self._answer_text = ""

    async def begin_turn(self, turn: inference_pb2.ConverseRequest, deadline: float) -> OutputReader:
        """Raises KvrelayError if the turn is refused."""
        tenant = tenant_of_call(turn.tenant)
        async with self._starter.place(self._tenant or tenant, deadline) as place:
            request = await self._prepare(turn, tenant, deadline)
            self._answer_ids, self._answer_text = [], ""
            self._runner = self._starter.start(request, place)
        return self._runner.open_reader()

    async def _prepare(self, turn: inference_pb2.ConverseRequest, tenant: str, deadline: float) -> GenerationRequest:
        now = asyncio.get_running_loop().time()
        messages = parse_messages(turn.messages, "messages")
        wanted = turn.sampling if turn.HasField("sampling") else self._sampling
        sampling = parse_sampling(wanted)
        self._sampling = wanted
        conversation, limits = await self._open(turn, tenant, deadline)
        if conversation.num_messages + len(messages) > MAX_MESSAGES:
            raise InvalidRequestError(
                "messages", f"make the conversation longer than {MAX_MESSAGES} messages; begin a new one"
            )
        await self._preparation.formats.check(sampling, limits)
        token_ids = await conversation.add_messages(messages, deadline)
        sampling = with_model_defaults(sampling, wanted, limits.model)
        request = make_request(limits, token_ids, sampling, now, deadline, self._tenant)
        return replace(request, preferred_decode_worker_id=conversation.decode_worker_id)

    async def _open(
        self, turn: inference_pb2.ConverseRequest, tenant: str, deadline: float
    ) -> tuple[Conversation, ModelLimits]:
        if self._conversation is None or self._limits is None:
            check_length("tenant", turn.tenant)
            self._tenant = tenant
            self._limits = await self._preparation.select_model(turn.model, deadline)
            tokenizer = await self._preparation.tokenizers.get(self._limits.model.fingerprint)
            self._conversation = Conversation(tokenizer, self._limits, self._preparation.texts)
        return self._conversation, self._limits

    def on_frame(self, frame: Frame) -> None:
        """Only the first sequence becomes part of the conversation."""
        assert self._conversation is not None, "a turn was begun"
        assert self._runner is not None, "a turn was begun"
        if isinstance(frame, DeltaFrame):
            if frame.sequence == 0:
                self._answer_ids.extend(token.token_id for token in frame.tokens)
                self._answer_text += frame.text
        elif frame.finished:
            self._conversation.add_answer(self._answer_ids, self._answer_text)
            self._conversation.decode_worker_id = self._runner.lifecycle.report.decode_worker_id
