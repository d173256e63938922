"""Clusters for `bench serve`: a running one by its address, one from settings, and the same cores
as a colocated one.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from kvrelay.cluster.local_cluster import LocalCluster
from kvrelay.config.settings import ClusterSettings, DecodeSettings, EngineSettings, GatewaySettings, PrefillSettings
from kvrelay.config.sources import SettingsSources
from kvrelay.core.prompt_pace import FIRST_CHUNK_TOKENS


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """What to start on this machine. Workers without a number of threads divide its cores, and lend
    each other idle ones.
    """

    name: str
    gateway: GatewaySettings
    prefill: tuple[PrefillSettings, ...]
    decode: tuple[DecodeSettings, ...]
    startup_timeout_s: float

    @property
    def engines(self) -> list[EngineSettings]:
        """Of all workers."""
        return [worker.engine for worker in self.prefill] + [worker.engine for worker in self.decode]

    @property
    def num_threads(self) -> int | None:
        """Of all workers together; None where they divide the machine's cores."""
        numbers = [engine.num_threads for engine in self.engines]
        return None if None in numbers else sum(number or 0 for number in numbers)


def plan_from(sources: SettingsSources) -> ClusterPlan:
    """The cluster that the settings describe.

    Raises:
        ConfigError: a setting is wrong.
    """
    cluster = sources.load("cluster", ClusterSettings)
    gateway = sources.load("gateway", GatewaySettings)
    gateway = gateway.model_copy(update={"server": gateway.server.model_copy(update={"port": 0})})
    prefill, decode = sources.load("prefill", PrefillSettings), sources.load("decode", DecodeSettings)
    name = f"{cluster.num_prefill} prefill + {cluster.num_decode} decode" if cluster.num_prefill else "colocated"
    return ClusterPlan(
        name, gateway, (prefill,) * cluster.num_prefill, (decode,) * cluster.num_decode, cluster.startup_timeout_s
    )


def colocated_plans(plan: ClusterPlan, chunks: list[int]) -> list[ClusterPlan]:
    """Clusters without prefill workers on the same cores: one worker with all of them, and as many
    workers as now, each with its share; with each of the chunk sizes for prompts among decoding
    sequences."""
    num_workers = len(plan.prefill) + len(plan.decode)
    plans = []
    for chunk in chunks:
        for count in sorted({1, num_workers}):
            num_threads = plan.num_threads and max(1, plan.num_threads // count)
            worker = with_chunk(_with_threads(plan.decode[0], num_threads), chunk)
            name = f"{count} colocated, chunk {chunk}"
            plans.append(replace(plan, name=name, prefill=(), decode=(worker,) * count))
    return plans


def with_chunk(settings: DecodeSettings, chunk: int) -> DecodeSettings:
    """Prompts in chunks of so many tokens, whether sequences decode or not."""
    decoding = settings.decoding.model_copy(update={"local_prefill_chunk_tokens": chunk})
    full_chunk = max(chunk, settings.engine.prefill_chunk_tokens or FIRST_CHUNK_TOKENS)
    engine = settings.engine.model_copy(update={"prefill_chunk_tokens": full_chunk})
    return settings.model_copy(update={"decoding": decoding, "engine": engine})


def _with_threads(settings: DecodeSettings, num_threads: int | None) -> DecodeSettings:
    return settings.model_copy(update={"engine": settings.engine.model_copy(update={"num_threads": num_threads})})


@asynccontextmanager
async def running(plan: ClusterPlan) -> AsyncIterator[str]:
    """The address of a cluster that lives as long as the context."""
    cluster = LocalCluster(
        gateway=plan.gateway, prefill=plan.prefill, decode=plan.decode, startup_timeout_s=plan.startup_timeout_s
    )
    async with cluster:
        yield cluster.gateway_address
