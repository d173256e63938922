"""Checks a secured cluster at rest: requests are their tenants' alone, only strangers were refused,
and nothing was sent in plain text.
"""

import asyncio
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from kvrelay.client import AsyncClient
from kvrelay.errors import KvrelayError, RequestNotFoundError, UnauthenticatedError
from kvrelay.security.audit import OTHER_TENANT, REFUSED
from kvrelay.testing.security import Security, TenantsClient
from kvrelay.testing.waiting import wait_until

if TYPE_CHECKING:
    from kvrelay.testing.fault_cluster import FaultCluster

NUM_READERS = 8


async def check_tenants(cluster: "FaultCluster", security: Security, timeout_s: float) -> None:
    check = TenantCheck(security)
    problems: list[str] = ["no look was finished"]

    async def keeps_apart() -> bool:
        problems[:] = await check.look(cluster)
        return not problems

    try:
        await wait_until(keeps_apart, "tenants are apart", timeout_s)
    except AssertionError:
        raise AssertionError(f"not apart within {timeout_s:g} s: {'; '.join(problems[:10])}") from None
    plain = plain_connections(cluster)
    assert not plain, f"in plain text: {plain}"
    security.forget_checked(check.probed)


def plain_connections(cluster: "FaultCluster") -> list[str]:
    return [
        f"{link.num_plain} connections of {link.source} to {name}"
        for name, process in cluster.processes.items()
        for link in process.proxy.links()
        if link.num_plain
    ]


class TenantCheck:
    """Asks about each request once it can; a request without a problem is not asked about again."""

    def __init__(self, security: Security) -> None:
        self._security = security
        self._left = dict(security.unchecked())
        """Tenants of requests that are still to be probed."""
        self.probed = frozenset(self._left)
        self._refused: set[str] = set()
        """Probed requests that are still kept, so that an audit log must tell of the refusal."""

    async def look(self, cluster: "FaultCluster") -> list[str]:
        """The problems as they are now."""
        problems: list[str] = []
        waiting = list(self._left.items())

        async def read(client: TenantsClient) -> None:
            while waiting:
                problems.extend(await self._probe_one(client, *waiting.pop()))

        async with TenantsClient(cluster.addresses, self._security) as client:
            await asyncio.gather(*(read(client) for _ in range(NUM_READERS)))
        return problems + self._problems_of_audit(cluster.processes)

    async def _probe_one(self, client: TenantsClient, request_id: str, tenant: str) -> list[str]:
        kept = await _tenant_seen(client, request_id)
        own = await _tenant_seen(client.of(tenant), request_id)
        foreign = await _tenant_seen(client.of(self._security.another(tenant)), request_id)
        if kept not in (tenant, None) or own != kept or foreign is not None:
            return [f"{request_id} of {tenant} is kept as {kept}'s; the tenant sees {own}, another {foreign}"]
        del self._left[request_id]
        if own is not None:
            self._refused.add(request_id)
        return []

    def _problems_of_audit(self, names: Iterable[str]) -> list[str]:
        told: set[str] = set()
        problems = []
        for line in itertools.chain.from_iterable(_lines(self._security, name) for name in names):
            if line["decision"] != REFUSED:
                continue
            if line["reason"] == OTHER_TENANT:
                told.add(str(line["request_id"]))
            elif not (self._security.has_withdrawn and line["reason"] == UnauthenticatedError.reason):
                problems.append(f"{line['who']} was refused {line['method']}: {line['reason']}")
        return problems + [f"no audit log tells of the refusal about {each}" for each in sorted(self._refused - told)]


async def _tenant_seen(client: AsyncClient, request_id: str) -> str | None:
    """None if the request does not exist for the caller, or is forgotten."""
    try:
        return (await client.get_request(request_id, timeout_s=5.0)).tenant
    except RequestNotFoundError:
        return None
    except KvrelayError as error:
        return f"an error, {error.message}"


def _lines(security: Security, name: str) -> Iterator[Mapping[str, object]]:
    path = security.audit_log(name)
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        yield json.loads(line)
