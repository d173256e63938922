"""Three tenants, all methods, all ids: nothing of one is in another's answers, and a foreign id is
answered like one that never was.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from gateway.state.other_gateways import FORWARDED_METADATA
from kvrelay.kserve import grpc_service_pb2_grpc
from kvrelay.security.principal import current_principal
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import session_pb2
from kvrelay.vllm_engine.messages import engine_pb
from kvrelay.wire.errors import DETAILS_METADATA_KEY
from tests.gateway.conftest import Answer, Gateway, eventually, read_all, read_into, token_request
from tests.gateway.protocols.kserve.messages import infer_request
from tests.support.fake_workers import TOKENIZER, expected_token_ids
from tests.support.guarded_cluster import GATEWAY, OPERATOR, GuardedCluster, Keys, as_caller, guarded_cluster
from tests.support.redis_fixtures import stopped

TENANTS = ("tenant-anna-7f3a", "tenant-bert-91c0", "tenant-cleo-d2e8")
NUM_TOKENS = 20
HELD_AT = 100
"""Longer requests stop here, and so are running."""
MAX_RUNNING = 12
SHARED_KEY, SHARED_PROMPT = "payment-17", list(range(10, 50))
"""What all tenants use alike."""
SAMPLING = session_pb2.SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@dataclass(frozen=True)
class Request:
    """What the test knows of a request."""

    request_id: str
    owner: str
    text: str
    """Of its output; no other request has the same."""


@dataclass(frozen=True)
class Outcome:
    """What a caller gets: the bytes of all messages, or of an error with its details."""

    code: grpc.StatusCode
    data: bytes

    def without(self, request_id: str) -> "Outcome":
        return Outcome(self.code, self.data.replace(request_id.encode(), b"ID"))


async def outcome_of(call: Any) -> Outcome:
    try:
        async with asyncio.timeout(30):
            if hasattr(call, "__aiter__"):
                data = b"".join([message.SerializeToString() async for message in call])
            else:
                data = (await call).SerializeToString()
    except grpc.aio.AioRpcError as failure:
        details = [value for key, value in failure.trailing_metadata() or () if key == DETAILS_METADATA_KEY]
        return Outcome(failure.code(), "\n".join((failure.details() or "", "")).encode() + b"".join(details))  # type: ignore[arg-type]
    return Outcome(grpc.StatusCode.OK, data)


LOOKUPS = ("Resume", "GetRequest", "CancelRequest", "GetTimeline")


async def look_up(gateway: Gateway, method: str, request_id: str, caller: str, *more: tuple[str, str]) -> Outcome:
    message: Any = getattr(pb, f"{method}Request")(request_id=request_id)
    return await outcome_of(getattr(gateway.stub, method)(message, metadata=(*as_caller(caller), *more)))


class TenantMachine(RuleBasedStateMachine):
    """All lives share a cluster, so later ones find more to ask for."""

    loop: asyncio.AbstractEventLoop
    cluster: GuardedCluster
    requests: list[Request]
    running: list[tuple[Request, Any]]
    by_key: dict[tuple[str, str], str]

    # --- what tenants make

    @rule(
        tenant=st.sampled_from(TENANTS),
        gateway=st.integers(0, 1),
        fields=st.sampled_from([{}, {"resumable": True}, {"tenant": True}]),
        number=st.integers(0, 200),
    )
    def generate(self, tenant: str, gateway: int, fields: dict[str, Any], number: int) -> None:
        prompt = [10 + TENANTS.index(tenant), 10 + number, *range(20, 40)]
        named = fields | ({"tenant": tenant} if "tenant" in fields else {})
        self.finish(tenant, gateway, token_request(prompt, NUM_TOKENS, **named), prompt)

    @rule(tenant=st.sampled_from(TENANTS), gateway=st.integers(0, 1))
    def use_the_key_that_all_use(self, tenant: str, gateway: int) -> None:
        request = token_request(SHARED_PROMPT, NUM_TOKENS, idempotency_key=SHARED_KEY)
        answer = self.do(read_all(self.gateways[gateway].stub.Generate(request, metadata=as_caller(tenant))))
        assert answer.accepted is not None
        request_id = answer.accepted.request_id
        assert self.by_key.setdefault((tenant, SHARED_KEY), request_id) == request_id
        owners = [owner for (owner, _), known_id in self.by_key.items() if known_id == request_id]
        assert owners == [tenant]
        self.remember(Request(request_id, tenant, ""))

    @rule(tenant=st.sampled_from(TENANTS), gateway=st.integers(0, 1))
    def converse(self, tenant: str, gateway: int) -> None:
        turn = pb.ConverseRequest(messages=[pb.ChatMessage(role="user", content=f"I am {tenant}")], sampling=SAMPLING)

        async def one_turn() -> Answer:
            call = self.gateways[gateway].stub.Converse(metadata=as_caller(tenant))
            await call.write(turn)
            await call.done_writing()
            return await read_all(call)

        self.note(tenant, self.do(one_turn()))

    @rule(tenant=st.sampled_from(TENANTS), gateway=st.integers(0, 1))
    def infer(self, tenant: str, gateway: int) -> None:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(self.gateways[gateway].channel)
        sampling = f'{{"max_tokens": {NUM_TOKENS}}}'
        request = infer_request({"text_input": f"I am {tenant}", "sampling_parameters": sampling}, model_name="tiny")
        answer = self.do(stub.ModelInfer(request, metadata=as_caller(tenant)))
        request_id = answer.parameters["request_id"].string_param
        assert request_id
        self.remember(Request(request_id, tenant, ""))

    @rule(tenant=st.sampled_from(TENANTS), gateway=st.integers(0, 1))
    def begin(self, tenant: str, gateway: int) -> None:
        if len(self.running) >= MAX_RUNNING:
            return
        prompt = [10 + TENANTS.index(tenant), 60 + len(self.requests) % 150, *range(90, 120)]
        call = self.gateways[gateway].stub.Generate(
            token_request(prompt, 2 * HELD_AT, resumable=True), metadata=as_caller(tenant)
        )
        answer = Answer()
        self.do(read_into(answer, call, until=5))
        request = self.note(tenant, answer, text_of(prompt, 5))
        self.running.append((request, call))
        assert request.owner == tenant
        self.do(self.written(request))

    # --- what tenants ask for

    @rule(
        caller=st.sampled_from(TENANTS),
        gateway=st.integers(0, 1),
        method=st.sampled_from(LOOKUPS),
        chosen=st.integers(0, 10_000),
        pretends_to_be_a_gateway=st.booleans(),
    )
    def look_up_a_foreign_id(
        self, caller: str, gateway: int, method: str, chosen: int, pretends_to_be_a_gateway: bool
    ) -> None:
        foreign = [request for request in self.requests if request.owner != caller]
        if not foreign:
            return
        request = foreign[chosen % len(foreign)]
        more = (FORWARDED_METADATA,) if pretends_to_be_a_gateway else ()
        unknown_id = secrets.token_hex(16)
        got, unknown = (
            self.do(look_up(self.gateways[gateway], method, each, caller, *more))
            for each in (request.request_id, unknown_id)
        )
        assert got.code is grpc.StatusCode.NOT_FOUND
        assert got.without(request.request_id) == unknown.without(unknown_id)

    @rule(
        caller=st.sampled_from(TENANTS),
        gateway=st.integers(0, 1),
        method=st.sampled_from(("GetRequest", "GetTimeline", "CancelRequest")),
        chosen=st.integers(0, 10_000),
    )
    def look_up_an_own_id(self, caller: str, gateway: int, method: str, chosen: int) -> None:
        own = [request for request in self.requests if request.owner == caller]
        if not own:
            return
        request = own[chosen % len(own)]
        self.do(self.written(request))
        got = self.do(look_up(self.gateways[gateway], method, request.request_id, caller))
        assert got.code is grpc.StatusCode.OK, got
        self.check_answer(caller, got)
        if method == "CancelRequest":
            self.running[:] = [each for each in self.running if each[0] is not request]

    @rule(
        caller=st.sampled_from(TENANTS),
        gateway=st.integers(0, 1),
        page_size=st.sampled_from([1, 3, 1000]),
        active_only=st.booleans(),
    )
    def list_requests(self, caller: str, gateway: int, page_size: int, active_only: bool) -> None:
        listed, token = set[str](), ""
        while True:
            message = pb.ListRequestsRequest(page_size=page_size, page_token=token, active_only=active_only)
            call = self.gateways[gateway].stub.ListRequests(message, metadata=as_caller(caller))
            page = self.do(call)
            self.check_answer(caller, Outcome(grpc.StatusCode.OK, page.SerializeToString()))
            assert {request.tenant for request in page.requests} <= {caller}
            listed |= {request.request_id for request in page.requests}
            token = page.next_page_token
            if not token:
                break
        running = {request.request_id for request, _ in self.running if request.owner == caller}
        assert running <= listed

    @rule(
        caller=st.sampled_from(TENANTS),
        other=st.sampled_from((*TENANTS, "nobody")),
        gateway=st.integers(0, 1),
        way=st.sampled_from(("Generate", "key", "Converse", "ModelInfer")),
    )
    def name_another_tenant(self, caller: str, other: str, gateway: int, way: str) -> None:
        if other == caller:
            return
        got = self.do(self.generate_as(way, other, self.gateways[gateway], caller))
        assert got.code is grpc.StatusCode.PERMISSION_DENIED, got
        self.check_answer(caller, got, may_name=other)

    @rule(caller=st.sampled_from(TENANTS), gateway=st.integers(0, 1), chosen=st.integers(0, 10_000))
    def abort_what_others_run(self, caller: str, gateway: int, chosen: int) -> None:
        """Over VllmEngine, whose ids are the clients' own and may be the same."""
        owner = TENANTS[(TENANTS.index(caller) + 1) % len(TENANTS)]
        self.do(self.run_and_abort(owner, caller, gateway))

    @rule(
        gateway=st.integers(0, 1), method=st.sampled_from(("GetRequest", "GetTimeline")), chosen=st.integers(0, 10_000)
    )
    def the_operator_sees_all(self, gateway: int, method: str, chosen: int) -> None:
        if self.requests:
            request = self.requests[chosen % len(self.requests)]
            self.do(self.written(request))
            got = self.do(look_up(self.gateways[gateway], method, request.request_id, OPERATOR))
            assert got.code is grpc.StatusCode.OK, got
            assert request.owner.encode() in got.data

    # --- how

    @property
    def gateways(self) -> list[Gateway]:
        return self.cluster.gateways

    def do(self, awaitable: Any) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(60):
                return await awaitable

        return self.loop.run_until_complete(bounded())

    def finish(self, tenant: str, gateway: int, message: pb.GenerateRequest, prompt: list[int]) -> None:
        call = self.gateways[gateway].stub.Generate(message, metadata=as_caller(tenant))
        self.note(tenant, self.do(read_all(call)), text_of(prompt, NUM_TOKENS))

    def note(self, tenant: str, answer: Answer, text: str = "") -> Request:
        assert answer.accepted is not None
        return self.remember(Request(answer.accepted.request_id, tenant, text))

    def remember(self, request: Request) -> Request:
        if request.request_id not in {known.request_id for known in self.requests}:
            self.requests.append(request)
        return request

    def check_answer(self, caller: str, got: Outcome, may_name: str = "") -> None:
        foreign = [request for request in self.requests if request.owner != caller]
        assert not [request for request in foreign if request.request_id.encode() in got.data]
        assert not [request for request in foreign if request.text and request.text.encode() in got.data]
        assert not [tenant for tenant in TENANTS if tenant not in (caller, may_name) and tenant.encode() in got.data]

    async def written(self, request: Request) -> None:
        """Waits until every gateway can find the request in the store."""
        for gateway in self.gateways:

            async def is_known(gateway: Gateway = gateway) -> bool:
                message = pb.GetRequestRequest(request_id=request.request_id)
                await gateway.stub.GetRequest(message, metadata=as_caller(request.owner))
                return True

            await eventually(is_known)

    async def generate_as(self, way: str, tenant: str, gateway: Gateway, caller: str) -> Outcome:
        metadata = as_caller(caller)
        if way == "ModelInfer":
            stub: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(gateway.channel)
            request = infer_request({"text_input": "x"}, model_name="tiny", parameters={"tenant": tenant})
            return await outcome_of(stub.ModelInfer(request, metadata=metadata))
        if way == "Converse":
            call = gateway.stub.Converse(metadata=metadata)
            messages = [pb.ChatMessage(role="user", content="x")]
            with contextlib.suppress(asyncio.InvalidStateError):  # refused already
                await call.write(pb.ConverseRequest(messages=messages, tenant=tenant, sampling=SAMPLING))
                await call.done_writing()
            return await outcome_of(call)
        key = SHARED_KEY if way == "key" else ""
        message = token_request(SHARED_PROMPT, NUM_TOKENS, tenant=tenant, idempotency_key=key)
        return await outcome_of(gateway.stub.Generate(message, metadata=metadata))

    async def run_and_abort(self, owner: str, aborter: str, number: int) -> None:
        engine = self.cluster.engine(number)
        message = engine_pb.GenerateRequest(
            request_id="chatcmpl-1",
            text=f"I am {owner}",
            stream=True,
            sampling_params=engine_pb.SamplingParams(max_tokens=2 * HELD_AT, ignore_eos=True),
        )
        call = engine.Generate(message, metadata=as_caller(owner))
        chunks = aiter(call)
        await anext(chunks)
        abort = engine_pb.AbortRequest(request_ids=["chatcmpl-1"])
        await engine.Abort(abort, metadata=as_caller(aborter))
        info = pb.ListRequestsRequest(active_only=True, page_size=1000)

        async def is_running() -> bool:
            listed = await self.gateways[number].stub.ListRequests(info, metadata=as_caller(owner))
            known = {request.request_id for request, _ in self.running}
            return any(each.request_id not in known for each in listed.requests)

        await eventually(is_running)
        assert not call.done()
        await engine.Abort(abort, metadata=as_caller(owner))
        reasons = [chunk.complete.finish_reason async for chunk in chunks if chunk.HasField("complete")]
        assert reasons == ["abort"]


def text_of(prompt: list[int], num_tokens: int) -> str:
    return str(TOKENIZER.decode(expected_token_ids(prompt, num_tokens)))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[TenantMachine]]:
    """The machine with a cluster of its own."""
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        context = guarded_cluster(monkeypatch, Keys(TENANTS))
        cluster = loop.run_until_complete(context.__aenter__())
        cluster.decode.hold(f"token:{HELD_AT}")
        running: list[tuple[Request, Any]] = []
        members = {"loop": loop, "cluster": cluster, "requests": [], "running": running, "by_key": {}}
        try:
            yield type("Machine", (TenantMachine,), members)
        finally:
            cluster.decode.release(f"token:{HELD_AT}")
            for _, call in running:
                call.cancel()
            loop.run_until_complete(context.__aexit__(None, None, None))


def run(machine: type[TenantMachine], num_lives: int) -> None:
    # Lives share a cluster, so a shorter life would say nothing about a failure.
    chosen = settings(
        max_examples=num_lives,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        database=None,
    )
    run_state_machine_as_test(machine, settings=chosen)


def test_nothing_of_one_tenant_is_in_anothers_answers(machine: type[TenantMachine]) -> None:
    run(machine, 12)
    assert len({request.owner for request in machine.requests}) == len(TENANTS)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_nothing_of_one_tenant_is_in_anothers_answers_in_hundreds_of_lives(machine: type[TenantMachine]) -> None:
    run(machine, 300)


ANNA, BERT, _ = TENANTS


async def begun(cluster: GuardedCluster, number: int, tenant: str, **fields: Any) -> tuple[str, Any]:
    """The id and the stream of a request that runs at a gateway, and that the store has."""
    gateway = cluster.gateways[number]
    message = token_request(SHARED_PROMPT, 2 * HELD_AT, **fields)
    call = gateway.stub.Generate(message, metadata=as_caller(tenant))
    answer = Answer()
    await read_into(answer, call, until=5)
    assert answer.accepted is not None
    request_id = answer.accepted.request_id

    async def is_stored() -> bool:
        other = cluster.gateways[1 - number].stub
        answer = await other.GetRequest(pb.GetRequestRequest(request_id=request_id), metadata=as_caller(tenant))
        return answer.request.state == pb.REQUEST_STATE_DECODING

    await eventually(is_stored)
    return request_id, call


@pytest.mark.parametrize("method", LOOKUPS)
async def test_a_foreign_id_costs_the_same_reads_as_an_unknown_one(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    reads: list[str] = []
    run_command = RedisConnection.run

    async def counted(self: RedisConnection, operation: Any) -> Any:
        if current_principal().key_id == BERT:
            reads.append(operation.__qualname__)
        return await run_command(self, operation)

    monkeypatch.setattr(RedisConnection, "run", counted)
    async with guarded_cluster(monkeypatch, Keys(TENANTS)) as cluster:
        cluster.decode.hold(f"token:{HELD_AT}")
        request_id, call = await begun(cluster, 0, ANNA)
        kinds: list[list[str]] = []
        for gateway, asked in ((0, request_id), (1, request_id), (0, secrets.token_hex(16))):
            reads.clear()
            got = await look_up(cluster.gateways[gateway], method, asked, BERT)
            assert got.code is grpc.StatusCode.NOT_FOUND
            kinds.append(list(reads))
        assert kinds[0] == kinds[1] == kinds[2]
        assert len(kinds[0]) == 1
        assert not call.done()
        call.cancel()
        cluster.decode.release(f"token:{HELD_AT}")


async def test_a_foreign_orphan_is_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async with guarded_cluster(monkeypatch, Keys(TENANTS)) as cluster:
        cluster.decode.hold(f"token:{HELD_AT}")
        request_id, _ = await begun(cluster, 0, ANNA, resumable=True)
        owner, other = cluster.gateways
        await owner.stop_at_once()
        cluster.decode.release(f"token:{HELD_AT}")
        assert (await look_up(other, "Resume", request_id, BERT)).code is grpc.StatusCode.NOT_FOUND
        info = await other.stub.GetRequest(pb.GetRequestRequest(request_id=request_id), metadata=as_caller(ANNA))
        assert info.request.attempt == 1
        resumed = other.stub.Resume(pb.ResumeRequest(request_id=request_id), metadata=as_caller(ANNA))
        assert (await read_all(resumed)).token_ids[0] == expected_token_ids(SHARED_PROMPT, 2 * HELD_AT)


@pytest.mark.parametrize("more", [(), (FORWARDED_METADATA,)], ids=["", "pretending to be a gateway"])
@pytest.mark.parametrize("method", ["CancelRequest", "GetTimeline"])
async def test_a_gateway_asks_the_owner_for_its_client(
    monkeypatch: pytest.MonkeyPatch, method: str, more: tuple[tuple[str, str], ...]
) -> None:
    async with guarded_cluster(monkeypatch, Keys(TENANTS)) as cluster:
        cluster.decode.hold(f"token:{HELD_AT}")
        request_id, call = await begun(cluster, 0, ANNA)
        got = await look_up(cluster.gateways[1], method, request_id, ANNA, *more)
        assert got.code is grpc.StatusCode.OK, got
        if method == "CancelRequest":
            assert (await outcome_of(call)).code is grpc.StatusCode.CANCELLED
        call.cancel()
        cluster.decode.release(f"token:{HELD_AT}")


async def test_a_gateway_streams_its_clients_request_from_the_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    async with guarded_cluster(monkeypatch, Keys(TENANTS)) as cluster:
        cluster.decode.hold(f"token:{HELD_AT}")
        request_id, call = await begun(cluster, 0, ANNA)
        message = pb.ResumeRequest(request_id=request_id)
        following = cluster.gateways[1].stub.Resume(message, metadata=as_caller(ANNA))
        answer = Answer()
        await read_into(answer, following, until=HELD_AT)
        cluster.decode.release(f"token:{HELD_AT}")
        await read_into(answer, following)
        assert answer.token_ids[0] == expected_token_ids(SHARED_PROMPT, 2 * HELD_AT)
        call.cancel()


@pytest.mark.parametrize("method", ["CancelRequest", "Resume"])
async def test_a_gateway_without_a_certificate_is_not_the_clients_mistake(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    keys = Keys(TENANTS)
    async with guarded_cluster(monkeypatch, keys) as cluster:
        cluster.decode.hold(f"token:{HELD_AT}")
        request_id, call = await begun(cluster, 0, ANNA)
        del keys.principals[GATEWAY]
        got = await look_up(cluster.gateways[1], method, request_id, ANNA)
        assert got.code is grpc.StatusCode.UNAVAILABLE
        assert b"certificates" in got.data
        call.cancel()
        cluster.decode.release(f"token:{HELD_AT}")


async def test_without_the_store_a_tenant_lists_its_own_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async with guarded_cluster(monkeypatch, Keys(TENANTS)) as cluster:
        cluster.decode.hold(f"token:{HELD_AT}")
        requests = {tenant: await begun(cluster, 0, tenant) for tenant in (ANNA, BERT)}
        with stopped(cluster.valkey):
            for tenant, (request_id, _) in requests.items():
                listed = await cluster.gateways[0].stub.ListRequests(
                    pb.ListRequestsRequest(), metadata=as_caller(tenant)
                )
                assert [each.request_id for each in listed.requests] == [request_id]
            foreign = await look_up(cluster.gateways[0], "GetRequest", requests[BERT][0], ANNA)
            unknown = await look_up(cluster.gateways[0], "GetRequest", secrets.token_hex(16), ANNA)
            assert foreign == unknown
            assert foreign.code is grpc.StatusCode.UNAVAILABLE
        for _, call in requests.values():
            call.cancel()
        cluster.decode.release(f"token:{HELD_AT}")
