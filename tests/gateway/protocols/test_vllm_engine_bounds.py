"""What one message of VllmEngine may name."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("smg_grpc_proto")

from gateway.protocols.vllm_engine.requests import prepare
from gateway.protocols.vllm_engine.service import VllmEngineService
from kvrelay.errors import InvalidRequestError
from kvrelay.vllm_engine.client_ids import MAX_ABORTED
from kvrelay.vllm_engine.messages import engine_pb

NOTHING: Any = None


@pytest.mark.parametrize("request_id", ["", "i" * 129])
async def test_a_clients_id_is_looked_at_before_anything_is_prepared(request_id: str) -> None:
    with pytest.raises(InvalidRequestError, match="request_id"):
        await prepare(engine_pb.GenerateRequest(request_id=request_id, text="x"), NOTHING, 60.0)


async def test_one_abort_names_a_bounded_number_of_requests() -> None:
    gateway: Any = SimpleNamespace(tokenizers=SimpleNamespace(files=None))
    service = VllmEngineService(gateway)
    await service.Abort(engine_pb.AbortRequest(request_ids=["r"] * MAX_ABORTED), NOTHING)
    with pytest.raises(InvalidRequestError, match="request_ids has 1025 entries"):
        await service.Abort(engine_pb.AbortRequest(request_ids=["r"] * (MAX_ABORTED + 1)), NOTHING)
