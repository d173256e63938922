"""An address that a client names is looked up before anything of its request begins."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvrelay.core.member import MemberRole
from kvrelay.errors import InvalidRequestError
from kvrelay.vllm_engine.transfer_params import handoff_params
from tests.support.jobs import make_job

pytest.importorskip("smg_grpc_proto")

from decode_worker.vllm_engine.service import DecodeGeneration
from kvrelay.vllm_engine.messages import engine_pb


class Peers:
    def __init__(self) -> None:
        self.asked: list[tuple[MemberRole, str]] = []

    async def is_registered(self, role: MemberRole, address: str) -> bool:
        self.asked.append((role, address))
        return False


async def test_a_strangers_address_begins_nothing() -> None:
    nothing: Any = None
    peers: Any = Peers()
    engine: Any = SimpleNamespace(model=SimpleNamespace(fingerprint="f"))
    generation = DecodeGeneration(engine, nothing, nothing, nothing, peers)
    request = engine_pb.GenerateRequest(request_id="r", kv_transfer_params_json=handoff_params("10.0.0.9:1", "f"))
    with pytest.raises(InvalidRequestError, match="no prefill worker is registered"):
        await anext(generation.generate(request, make_job([5, 6], 4)))
    assert peers.asked == [(MemberRole.PREFILL, "10.0.0.9:1")]
