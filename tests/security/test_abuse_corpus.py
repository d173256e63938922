"""Hostile messages against a real cluster: refused by their size, and no other client notices.

Each case is sent over a connection of its own, while another client's request runs. Judged are the
gateway's own processor time, memory and counters, and never the wall clock.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2
from prometheus_client.parser import text_string_to_metric_families

from kvrelay.client import AsyncClient
from kvrelay.cluster.local_cluster import LocalCluster
from kvrelay.cluster.member_settings import with_server
from kvrelay.kserve import grpc_service_pb2 as kserve_pb
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import session_pb2
from tests.integration.clusters import assert_at_rest, cluster_of, engine, greedy, random_prompt
from tests.support.process_memory import MAX_GROWN_BYTES, growth_at_rest, memory_of
from tests.support.tiny_models import make_tiny_model

MIB = 2**20
MAX_CPU_S = 0.5
"""Of the gateway for one case; it took up to 6 s before there were bounds."""
MAX_DELAY_S = 0.1
"""Of the gateway's event loop; a bound of the histogram."""
INFERENCE = "/kvrelay.v1.InferenceService/"
NUM_TOKENS = 16
KSERVE = "/inference.GRPCInferenceService/ModelInfer"
MANY = 300_000
"""Entries of about 1 MiB together, the largest message of a client."""

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]
INVALID, TOO_LARGE = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED
NOT_FOUND = grpc.StatusCode.NOT_FOUND
SERVED = frozenset({grpc.StatusCode.OK, TOO_LARGE})
"""Or refused as one too many."""


@dataclass(frozen=True)
class Case:
    method: str
    make: Callable[[], Any]
    """The message, or its bytes."""
    status: grpc.StatusCode | frozenset[grpc.StatusCode]
    at_once: int = 1
    compression: grpc.Compression | None = None

    @property
    def statuses(self) -> frozenset[grpc.StatusCode]:
        return self.status if isinstance(self.status, frozenset) else frozenset({self.status})

    def data(self) -> bytes:
        message = self.make()
        return message if isinstance(message, bytes) else bytes(message.SerializeToString())


def generate(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"token_ids": pb.TokenIds(ids=[9, 10, 11]), **fields})


def sampled(**fields: Any) -> pb.GenerateRequest:
    return generate(sampling=session_pb2.SamplingParams(**fields))


def infer(shape: Iterable[int], raw: bytes, **fields: Any) -> kserve_pb.ModelInferRequest:
    tensor = kserve_pb.ModelInferRequest.InferInputTensor(name="text_input", datatype="BYTES", shape=shape)
    return kserve_pb.ModelInferRequest(inputs=[tensor], raw_input_contents=[raw], **fields)


def text(num_bytes: int) -> str:
    return "The sea is wide. " * (num_bytes // 17)


G = INFERENCE + "Generate"
CASES = {
    "message of 9 MB": Case(G, lambda: generate(text="x" * 9 * MIB), TOO_LARGE),
    "message of 1 MiB and more, six": Case(G, lambda: generate(text=text(3 * MIB // 2)), TOO_LARGE, at_once=6),
    "gzip bomb of 64 MiB": Case(G, lambda: generate(text="\0" * 64 * MIB), TOO_LARGE, 1, grpc.Compression.Gzip),
    "text of 1 MB": Case(G, lambda: generate(text=text(1_000_000)), INVALID),
    "text of 1 MB, six": Case(G, lambda: generate(text=text(1_000_000)), INVALID, at_once=6),
    "spaces to Tokenize": Case(INFERENCE + "Tokenize", lambda: pb.TokenizeRequest(text=" " * 1_000_000), INVALID),
    "one word to Tokenize": Case(INFERENCE + "Tokenize", lambda: pb.TokenizeRequest(text="a" * 1_000_000), INVALID),
    "token ids": Case(G, lambda: generate(token_ids=pb.TokenIds(ids=[1] * 1_000_000)), INVALID),
    "token ids, six": Case(G, lambda: generate(token_ids=pb.TokenIds(ids=[1] * 1_000_000)), INVALID, at_once=6),
    "ids to Detokenize": Case(
        INFERENCE + "Detokenize", lambda: pb.DetokenizeRequest(token_ids=[1] * 1_000_000), INVALID
    ),
    "stop strings": Case(G, lambda: sampled(stop=[b"x"] * MANY), INVALID),
    "stop strings, six": Case(G, lambda: sampled(stop=[b"x"] * MANY), INVALID, at_once=6),
    "biases": Case(G, lambda: sampled(logit_bias=dict.fromkeys(range(80_000), 1.0)), INVALID),
    "stop tokens": Case(G, lambda: sampled(stop_token_ids=[1] * 1_000_000), INVALID),
    "messages": Case(G, lambda: generate(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="u")] * 200_000)), INVALID),
    "model": Case(G, lambda: generate(model="\x01" * 1_000_000), INVALID),
    "model, six": Case(G, lambda: generate(model="\x01" * 1_000_000), INVALID, at_once=6),
    "tenant": Case(G, lambda: generate(tenant="t" * 1_000_000), INVALID),
    "idempotency key": Case(G, lambda: generate(idempotency_key="t" * 1_000_000), INVALID),
    "request id": Case(INFERENCE + "GetRequest", lambda: pb.GetRequestRequest(request_id="x" * 1_000_000), NOT_FOUND),
    "request id, sixteen": Case(
        INFERENCE + "GetRequest", lambda: pb.GetRequestRequest(request_id="\x01" * 1_000_000), NOT_FOUND, at_once=16
    ),
    "request id to Resume": Case(INFERENCE + "Resume", lambda: pb.ResumeRequest(request_id="}" * 32), NOT_FOUND),
    "request id with Redis' words": Case(
        INFERENCE + "CancelRequest", lambda: pb.CancelRequestRequest(request_id="x\r\nFLUSHALL\r\n"), NOT_FOUND
    ),
    "page token": Case(INFERENCE + "ListRequests", lambda: pb.ListRequestsRequest(page_token="9" * 1_000_000), INVALID),
    "no message": Case(G, lambda: b"\xff" * 4096, INVALID),
    "shape of 10^18": Case(KSERVE, lambda: infer([10**12, 10**6], b"\xff\xff\xff\xff"), INVALID),
    "shape of many": Case(KSERVE, lambda: infer([1] * 1_000_000, b"\2\0\0\0hi"), INVALID),
    "elements": Case(KSERVE, lambda: infer([1], bytes(1_000_000)), INVALID),
    "outputs": Case(
        KSERVE,
        lambda: infer(
            [1],
            b"\2\0\0\0hi",
            outputs=[kserve_pb.ModelInferRequest.InferRequestedOutputTensor(name="text_output")] * 50_000,
        ),
        INVALID,
    ),
    "lists, 64": Case(INFERENCE + "ListRequests", lambda: pb.ListRequestsRequest(page_size=1000), SERVED, at_once=64),
    "tokenizers, 40": Case("/vllm.grpc.engine.VllmEngine/GetTokenizer", lambda: b"", SERVED, at_once=40),
    "watch with a long name": Case(
        "/grpc.health.v1.Health/Watch", lambda: health_pb2.HealthCheckRequest(service="x" * 1_000_000), INVALID
    ),
}


@dataclass(frozen=True)
class Counters:
    """Of the gateway itself, since it started."""

    long_delays: float
    """Times that its event loop kept others waiting for more than MAX_DELAY_S."""
    looks: float
    session_losses: float
    retries: float
    failures: float

    @classmethod
    async def read(cls, cluster: LocalCluster) -> "Counters":
        url = f"http://{cluster.http_addresses['gateway']}/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            page = await response.text()
        samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]

        def total(name: str, **labels: str) -> float:
            return sum(
                sample.value
                for sample in samples
                if sample.name == name and all(sample.labels[label] == value for label, value in labels.items())
            )

        delay = "kvrelay_event_loop_delay_seconds"
        looks, attempts = total(f"{delay}_count"), "kvrelay_attempts_total"
        return cls(
            long_delays=looks - total(f"{delay}_bucket", le=str(MAX_DELAY_S)),
            looks=looks,
            session_losses=total("kvrelay_session_losses_total"),
            retries=total(attempts) - total(attempts, cause="first"),
            failures=total("kvrelay_request_failures_total"),
        )


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    model = make_tiny_model("llama", tmp_path_factory.mktemp("model"))
    built = cluster_of([engine(model)], [engine(model)])
    built.gateway = with_server(built.gateway, http_port=0)
    async with built as cluster:
        yield cluster


@pytest.mark.parametrize("name", CASES)
async def test_a_hostile_message_costs_little_and_no_other_client_notices(cluster: LocalCluster, name: str) -> None:
    case = CASES[name]
    gateway = cluster.pid("gateway")
    prompt = random_prompt(7, 20)
    async with AsyncClient(cluster.gateway_address) as client:
        alone = await greedy(client, prompt, NUM_TOKENS)  # also warms what a first request makes
        workers = await connected(client)
        before, data = await Counters.read(cluster), case.data()
        cpu_s, memory = cpu_of(gateway), memory_of(gateway)
        beside = asyncio.create_task(greedy(client, prompt, NUM_TOKENS))
        sending = (status_of(cluster.gateway_address, case, data) for _ in range(case.at_once))
        assert set(await asyncio.gather(*sending)) <= case.statuses
        innocent = await beside
        assert innocent.outputs == alone.outputs
        assert innocent.finished.phases.num_attempts == 1
        assert cpu_of(gateway) - cpu_s < MAX_CPU_S * case.at_once
        assert await growth_at_rest(gateway, memory) < MAX_GROWN_BYTES
        after = await Counters.read(cluster)
        assert after.looks > before.looks
        assert replace(after, looks=before.looks) == before
        assert await connected(client) == workers
        await assert_at_rest(client)
    assert cluster.pid("gateway") == gateway


async def connected(client: AsyncClient) -> set[str]:
    """Ids of the workers that are connected."""
    return {worker.worker_id for worker in (await client.cluster()).workers if worker.connected}


async def status_of(address: str, case: Case, data: bytes) -> grpc.StatusCode:
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options, compression=case.compression) as channel:
        method: Any = channel.stream_stream(case.method)
        call = method(iter([data]), timeout=60)
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as failure:
            status, message = failure.code(), failure.details() or ""
        else:
            status, message = grpc.StatusCode.OK, ""
    assert len(message) < 1200
    return status


def cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
