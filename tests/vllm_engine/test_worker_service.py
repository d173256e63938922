"""What a front may ask of a worker straight away."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("smg_grpc_proto")

from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.errors import InvalidRequestError
from kvrelay.vllm_engine import worker_service
from kvrelay.vllm_engine.client_ids import MAX_ABORTED
from kvrelay.vllm_engine.messages import engine_pb
from kvrelay.vllm_engine.worker_service import WorkerVllmEngine

NOTHING: Any = None
MODEL = ModelSpec("m", "llama", KVLayout(1, 1, 1, "float32"), 10, 64, (0,), "f")
CONTEXT: Any = SimpleNamespace(time_remaining=lambda: None)


def service() -> WorkerVllmEngine:
    engine: Any = SimpleNamespace(model=MODEL, max_tokens=64, folder=Path())
    local: Any = SimpleNamespace(abort=lambda request_id: None)
    return WorkerVllmEngine(engine, NOTHING, local, NOTHING)


def asking(num_tokens: int, request_id: str = "r") -> Any:
    tokenized = engine_pb.TokenizedInput(input_ids=[1] * num_tokens)
    return engine_pb.GenerateRequest(request_id=request_id, tokenized=tokenized)


@pytest.mark.parametrize("request_id", ["", "i" * 129])
def test_a_clients_id_is_short(request_id: str) -> None:
    with pytest.raises(InvalidRequestError, match="request_id"):
        service()._job_of(asking(3, request_id), CONTEXT)


def test_tokens_are_counted_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(service()._job_of(asking(63), CONTEXT).token_ids) == 63
    monkeypatch.setattr(worker_service, "sampling_from_vllm", lambda _: pytest.fail("read"))
    with pytest.raises(InvalidRequestError, match="has 64 tokens"):
        service()._job_of(asking(64), CONTEXT)


async def test_one_abort_names_a_bounded_number_of_requests() -> None:
    with pytest.raises(InvalidRequestError, match="request_ids has 1025 entries"):
        await service().Abort(engine_pb.AbortRequest(request_ids=["r"] * (MAX_ABORTED + 1)), CONTEXT)
