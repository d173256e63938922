"""The turns of one Converse stream: each becomes a request whose prompt continues the conversation's tokens."""

import asyncio

from gateway.conversation import MAX_MESSAGES, Conversation
from gateway.output_frames import DeltaFrame, Frame
from gateway.output_readers import OutputReader
from gateway.prompt_preparation import check_response_format, make_request
from gateway.relay import Relay
from gateway.request_runner import RequestRunner
from gateway.request_validation import ModelLimits, check_key_length, parse_messages, parse_sampling
from kvrelay.errors import InvalidRequestError
from kvrelay.sampling_params import SamplingParams
from kvrelay.v1 import inference_pb2

MODEL_WAIT_S = 5.0


class Converser:
    """One conversation as it goes on.

    Args:
        relay: this gateway.
    """

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._conversation: Conversation | None = None
        self._limits: ModelLimits | None = None
        self._tenant = ""
        self._sampling = SamplingParams()
        self._runner: RequestRunner | None = None
        self._answer_ids: list[int] = []
        self._answer_text = ""

    async def begin_turn(self, turn: inference_pb2.ConverseRequest, deadline: float) -> OutputReader:
        """Starts a turn's request.

        Raises:
            KvrelayError: the turn is refused.
        """
        self._relay.check_open()
        self._relay.check_room()
        now = asyncio.get_running_loop().time()
        messages = parse_messages(turn.messages, "messages")
        if turn.HasField("sampling"):
            self._sampling = parse_sampling(turn.sampling)
        conversation, limits = await self._open(turn)
        if conversation.num_messages + len(messages) > MAX_MESSAGES:
            raise InvalidRequestError("messages", f"make the conversation longer than {MAX_MESSAGES} messages; begin a new one")
        await check_response_format(self._sampling, self._relay, limits)
        request = make_request(
            limits,
            await conversation.add_messages(messages),
            self._sampling,
            tenant=self._tenant,
            submit_time=now,
            deadline=deadline,
            preferred_decode_worker_id=conversation.decode_worker_id,
        )
        self._answer_ids, self._answer_text = [], ""
        self._runner = self._relay.start(request)
        return self._runner.open_reader()

    async def _open(self, turn: inference_pb2.ConverseRequest) -> tuple[Conversation, ModelLimits]:
        """The conversation, begun with its first turn."""
        if self._conversation is None or self._limits is None:
            check_key_length("tenant", turn.tenant)
            self._tenant = turn.tenant
            self._limits = await self._relay.models.wait_and_select(turn.model, MODEL_WAIT_S)
            tokenizer = await self._relay.tokenizers.get(self._limits.model.fingerprint)
            self._conversation = Conversation(tokenizer)
        return self._conversation, self._limits

    def note(self, frame: Frame) -> None:
        """Follows the answer; its first sequence becomes part of the conversation."""
        assert self._conversation is not None, "a turn was begun"
        assert self._runner is not None, "a turn was begun"
        if isinstance(frame, DeltaFrame):
            if frame.sequence == 0:
                self._answer_ids.extend(token.token_id for token in frame.tokens)
                self._answer_text += frame.text
        elif frame.finished:
            self._conversation.add_answer(self._answer_ids, self._answer_text)
            self._conversation.decode_worker_id = self._runner.lifecycle.report.decode_worker_id
