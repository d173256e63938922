"""Turns a request's frames into responses, one for each batch or one for all."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from gateway.protocols.kserve import model_description as model
from gateway.protocols.kserve.requests import InferenceRequest
from gateway.protocols.kserve.tensors import raw_numbers, raw_texts
from gateway.streaming.frames import DeltaFrame, Frame
from kvrelay.core.job import FinishReason, Token
from kvrelay.errors import InvalidRequestError, KvrelayError
from kvrelay.kserve import grpc_service_pb2 as pb
from kvrelay.v1 import inference_pb2
from kvrelay.wire.errors import code_of

FINAL_RESPONSE = "triton_final_response"


@dataclass(slots=True)
class _Piece:
    """One sequence's output that is in no response yet."""

    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Responses:
    def __init__(self, request: InferenceRequest) -> None:
        self._request = request
        self._accepted = inference_pb2.Accepted()
        self._num_running = request.num_sequences
        self._finished = False
        self._pieces = self._new_pieces()

    def _new_pieces(self) -> list[_Piece]:
        return [_Piece() for _ in range(self._request.num_sequences)]

    def add(self, frames: Iterable[Frame]) -> None:
        for frame in frames:
            if isinstance(frame, DeltaFrame):
                self._add_delta(frame)
            elif frame.finished:
                self._finished = True
            else:
                self._accepted = inference_pb2.GenerateResponse.FromString(frame.data).accepted

    def _add_delta(self, delta: DeltaFrame) -> None:
        piece = self._pieces[delta.sequence]
        piece.texts.append(delta.text)
        piece.tokens.extend(delta.tokens)
        if delta.finish_reason is not None:
            piece.finish_reason = delta.finish_reason
            self._num_running -= 1

    def take(self) -> pb.ModelInferResponse | None:
        """None if more output must come first."""
        if not self._finished:
            # Ends of sequences wait for the request's end: the last response has both.
            has_output = any(piece.tokens or piece.texts for piece in self._pieces)
            if not (self._request.streams and has_output and self._num_running > 0):
                return None
        response = self._response()
        self._pieces = self._new_pieces()
        return response

    def _response(self) -> pb.ModelInferResponse:
        names = self._request.outputs
        contents = [_RAW[name](self) for name in names]
        return pb.ModelInferResponse(
            model_name=self._accepted.model,
            model_version=model.MODEL_VERSION,
            id=self._request.request_id or self._accepted.request_id,
            parameters={
                FINAL_RESPONSE: pb.InferParameter(bool_param=self._finished),
                "request_id": pb.InferParameter(string_param=self._accepted.request_id),
            },
            outputs=[self._tensor(name) for name in names],
            raw_output_contents=contents,
        )

    def _tensor(self, name: str) -> pb.ModelInferResponse.InferOutputTensor:
        size = 1 if name == model.NUM_INPUT_TOKENS else self._request.num_sequences
        return pb.ModelInferResponse.InferOutputTensor(name=name, datatype=model.DATATYPES[name], shape=[size])

    def _texts(self) -> bytes:
        before = self._request.generate.text if self._request.includes_input else ""
        return raw_texts([before + "".join(piece.texts) for piece in self._pieces])

    def _finish_reasons(self) -> bytes:
        return raw_texts([piece.finish_reason.value if piece.finish_reason else "" for piece in self._pieces])

    def _num_input_tokens(self) -> bytes:
        return raw_numbers([self._accepted.num_prompt_tokens])

    def _num_output_tokens(self) -> bytes:
        return raw_numbers([len(piece.tokens) for piece in self._pieces])

    def _logprobs(self) -> bytes:
        return raw_texts([json.dumps([_token_logprobs(token) for token in piece.tokens]) for piece in self._pieces])


_RAW: dict[str, Callable[[Responses], bytes]] = {
    model.TEXT_OUTPUT: Responses._texts,
    model.FINISH_REASON: Responses._finish_reasons,
    model.NUM_INPUT_TOKENS: Responses._num_input_tokens,
    model.NUM_OUTPUT_TOKENS: Responses._num_output_tokens,
    model.LOGPROBS: Responses._logprobs,
}


def _token_logprobs(token: Token) -> dict[str, object]:
    tops = [{"token_id": top.token_id, "logprob": top.logprob} for top in token.top_logprobs]
    return {"token_id": token.token_id, "logprob": token.logprob, "top_logprobs": tops}


def error_response(request_id: str, error: KvrelayError) -> pb.ModelStreamInferResponse:
    parameters = {
        FINAL_RESPONSE: pb.InferParameter(bool_param=True),
        "code": pb.InferParameter(string_param=code_of(error).name),
        "reason": pb.InferParameter(string_param=error.reason),
    }
    if isinstance(error, InvalidRequestError):
        parameters["field"] = pb.InferParameter(string_param=error.field)
    retry_after_ms = getattr(error, "retry_after_ms", None)
    if retry_after_ms is not None:
        parameters["retry_after_ms"] = pb.InferParameter(int64_param=retry_after_ms)
    response = pb.ModelInferResponse(id=request_id, parameters=parameters)
    return pb.ModelStreamInferResponse(error_message=error.message, infer_response=response)
