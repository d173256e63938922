"""The table itself: what it says of the methods that would open a cluster to strangers."""

import pytest

from kvrelay.security.method_rules import GRPC_RULES, HTTP_RULES
from kvrelay.security.principal import Role

WORKERS = (Role.PREFILL, Role.DECODE)
OPEN_CALL = "/grpc.health.v1.Health/Check"


@pytest.mark.parametrize(
    ("process", "method", "roles"),
    [
        (Role.DECODE, "/kvrelay.v1.DecodeService/Session", {Role.GATEWAY}),
        (Role.PREFILL, "/kvrelay.v1.PrefillService/Session", {Role.GATEWAY, Role.DECODE}),
        (Role.DECODE, "/kvrelay.v1.KVTransferService/Push", {Role.PREFILL}),
        (Role.DECODE, "/kvrelay.v1.KVTransferService/OfferSharedMemory", {Role.PREFILL}),
        (Role.GATEWAY, "/kvrelay.v1.InferenceService/GetCluster", {Role.OPERATOR, Role.GATEWAY}),
        (Role.GATEWAY, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", {Role.OPERATOR}),
        *((worker, "/kvrelay.v1.ModelService/GetTokenizer", {Role.GATEWAY}) for worker in WORKERS),
    ],
)
def test_a_method_within_the_cluster_is_for_its_processes_only(process: Role, method: str, roles: set[Role]) -> None:
    assert GRPC_RULES[process][method].roles == roles
    assert not GRPC_RULES[process][method].is_open


@pytest.mark.parametrize("process", GRPC_RULES)
def test_nothing_but_health_is_open(process: Role) -> None:
    # smg alone calls a front's relay, and asks no health service there.
    open_calls = [] if process is Role.FRONT else [OPEN_CALL]
    assert [method for method, rule in GRPC_RULES[process].items() if rule.is_open] == open_calls
    open_routes = {"GET /health", "GET /readiness"} if process is Role.FRONT else {"GET /healthz"}
    assert {route for route, rule in HTTP_RULES[process].items() if rule.is_open} == open_routes


@pytest.mark.parametrize("process", GRPC_RULES)
def test_front_alone_speaks_vllm_engine_but_for_calls_with_its_clients_keys(process: Role) -> None:
    calls = {
        method.rpartition("/")[2]: rule.roles for method, rule in GRPC_RULES[process].items() if "/vllm." in method
    }
    with_keys = {name for name, roles in calls.items() if roles != {Role.FRONT}}
    assert with_keys == ({"Generate", "Abort", "Embed"} if process is Role.GATEWAY else set())
    assert all(calls[name] == {Role.CLIENT, Role.OPERATOR, Role.FRONT} for name in with_keys)
    assert len(calls) >= 8


def test_what_a_client_may_do_over_http_is_the_api_of_a_front() -> None:
    """Not the page, which shows all tenants."""
    for_clients = {
        (process, route)
        for process in HTTP_RULES
        for route, rule in HTTP_RULES[process].items()
        if Role.CLIENT in rule.roles and not rule.is_open
    }
    assert {process for process, _ in for_clients} == {Role.FRONT}
    assert all(route.partition(" ")[2].startswith("/v1/") for _, route in for_clients)


def test_workers_take_no_clients() -> None:
    for worker in WORKERS:
        for method, rule in GRPC_RULES[worker].items():
            assert rule.is_open or Role.CLIENT not in rule.roles or method.startswith("/grpc.health."), method
