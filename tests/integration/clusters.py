"""What integration tests share: a cluster's settings, prompts, and the state that a cluster must be
in when nothing runs.

Every wait has a bound, and a cluster's processes end with the test module that started them.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from kvrelay.client import AsyncClient, Cluster, Completion, WorkerInfo, WorkerRole
from kvrelay.cluster.local_cluster import LocalCluster
from kvrelay.config.decoding_settings import DecodingSettings
from kvrelay.config.settings import (
    DecodeSettings,
    EngineSettings,
    GatewaySettings,
    PrefillSettings,
    RequestSettings,
    ServerSettings,
)
from tests.support.tiny_models import SPECIAL_TOKENS, VOCAB_SIZE

REST_TIMEOUT_S = 30.0
CALM = {"liveness_window_ms": 5000, "redis_timeout_ms": 5000}
"""Settings of all processes: one that waits for a core does not count as gone, and neither does
Redis. Deaths are noticed at once all the same.
"""


def engine(model: Path, **changes: object) -> EngineSettings:
    """An engine with one thread in float32; `changes` override."""
    values: dict[str, object] = {
        "model": str(model),
        "dtype": "float32",
        "device": "cpu",
        "num_threads": 1,
        "kv_cache_mib": 16,
    }
    return EngineSettings.model_validate(values | changes)


def cluster_of(
    prefill: Sequence[EngineSettings],
    decode: Sequence[EngineSettings],
    *,
    restart: bool = False,
    decoding: DecodingSettings | None = None,
    **requests: object,
) -> LocalCluster:
    """A cluster with a worker for each engine; `requests` are the gateway's settings."""
    server = ServerSettings.model_validate({"port": 0, **CALM})
    return LocalCluster(
        gateway=GatewaySettings(server=server, requests=RequestSettings.model_validate(requests)),
        prefill=[PrefillSettings(server=server, engine=settings) for settings in prefill],
        decode=[
            DecodeSettings(server=server, engine=settings, decoding=decoding or DecodingSettings())
            for settings in decode
        ],
        restart=restart,
        startup_timeout_s=240,
    )


def random_prompt(seed: int, num_tokens: int) -> list[int]:
    """Token ids of a tiny model's vocabulary, without special ones."""
    generator = random.Random(seed)
    return [generator.randrange(len(SPECIAL_TOKENS), VOCAB_SIZE) for _ in range(num_tokens)]


def values_under_test(request: pytest.FixtureRequest, parameter: str) -> list[str]:
    """The values that a parameter has in the module's tests that run: a cluster needs no workers
    for others.
    """
    calls = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
    return list(
        dict.fromkeys(call.params[parameter] for call in calls if call is not None and parameter in call.params)
    )


async def greedy(client: AsyncClient, prompt: Sequence[int], num_tokens: int, **options: object) -> Completion:
    """A greedy completion of exactly `num_tokens`."""
    sampling: dict[str, object] = {"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True}
    return await client.complete(token_ids=prompt, timeout_s=300, **(sampling | options))  # type: ignore[arg-type]


def token_ids(completion: Completion, sequence: int = 0) -> list[int]:
    """Generated token ids of one sequence."""
    return [token.token_id for token in completion.outputs[sequence].tokens]


def workers(cluster: Cluster, role: WorkerRole, model: str | None = None) -> list[WorkerInfo]:
    """The connected workers of a role, and of a model if one is named."""
    return [
        worker
        for worker in cluster.workers
        if worker.role is role and worker.connected and model in (None, worker.model.name)
    ]


async def wait_until(condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float = REST_TIMEOUT_S) -> None:
    """Asks again and again, for so long at the most.

    Raises:
        AssertionError: it did not come true; says what.
    """
    try:
        async with asyncio.timeout(timeout_s):
            while not await condition():  # noqa: ASYNC110 - what is asked is in another process
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s:g} s: {what}") from None


async def assert_at_rest(client: AsyncClient) -> None:
    """Checks that no worker holds anything of any request: free + cached = total (invariant I3)."""

    async def at_rest() -> bool:
        cluster = await client.cluster()
        loads = [worker.load for worker in cluster.workers if worker.connected]
        return (
            bool(loads)
            and not cluster.running_requests
            and all(load.num_running == load.num_waiting == load.num_used_blocks == 0 for load in loads)
            and all(load.num_free_blocks + load.num_cached_blocks == load.num_blocks > 0 for load in loads)
        )

    await wait_until(at_rest, "all workers at rest with free + cached = total")
