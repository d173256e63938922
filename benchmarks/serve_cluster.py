"""Clusters for `bench serve`: a running one by its address, one from settings, and the same cores as a colocated one."""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from kvrelay.config import ClusterSettings, DecodeSettings, EngineSettings, GatewaySettings, PrefillSettings
from kvrelay.local_cluster import LocalCluster
from kvrelay.settings_sources import SettingsSources

WorkerSettingsT = TypeVar("WorkerSettingsT", PrefillSettings, DecodeSettings)


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """What to start on this machine. Every worker has `num_threads` threads of its own."""

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
    def num_threads(self) -> int:
        """Of all workers together."""
        return sum(engine.num_threads or 0 for engine in self.engines)


def plan_from(sources: SettingsSources) -> ClusterPlan:
    """The cluster that the settings describe; threads that are not set are the machine's cores shared out.

    Raises:
        ConfigError: a setting is wrong.
    """
    cluster = sources.load("cluster", ClusterSettings)
    gateway = sources.load("gateway", GatewaySettings)
    gateway = gateway.model_copy(update={"server": gateway.server.model_copy(update={"port": 0})})
    num_threads = max(1, _num_cores() // (cluster.num_prefill + cluster.num_decode))
    prefill = with_threads(sources.load("prefill", PrefillSettings), num_threads)
    decode = with_threads(sources.load("decode", DecodeSettings), num_threads)
    name = f"{cluster.num_prefill} prefill + {cluster.num_decode} decode" if cluster.num_prefill else "colocated"
    return ClusterPlan(name, gateway, (prefill,) * cluster.num_prefill, (decode,) * cluster.num_decode, cluster.startup_timeout_s)


def colocated_plans(plan: ClusterPlan, chunks: list[int]) -> list[ClusterPlan]:
    """Clusters without prefill workers on as many threads: one worker with all of them, and as many workers as now, each with
    its share; with each of the chunk sizes for prompts among decoding sequences."""
    num_workers = len(plan.prefill) + len(plan.decode)
    plans = []
    for chunk in chunks:
        for count in sorted({1, num_workers}):
            worker = with_chunk(_set_threads(plan.decode[0], max(1, plan.num_threads // count)), chunk)
            name = f"{count} colocated, chunk {chunk}"
            plans.append(replace(plan, name=name, prefill=(), decode=(worker,) * count))
    return plans


def with_chunk(settings: DecodeSettings, chunk: int) -> DecodeSettings:
    """Prompts in chunks of so many tokens, whether sequences decode or not."""
    decoding = settings.decoding.model_copy(update={"local_prefill_chunk_tokens": chunk})
    engine = settings.engine.model_copy(update={"prefill_chunk_tokens": max(chunk, settings.engine.prefill_chunk_tokens)})
    return settings.model_copy(update={"decoding": decoding, "engine": engine})


def with_threads(settings: WorkerSettingsT, num_threads: int) -> WorkerSettingsT:
    """With so many threads, unless the settings say how many."""
    return settings if settings.engine.num_threads is not None else _set_threads(settings, num_threads)


def _set_threads(settings: WorkerSettingsT, num_threads: int) -> WorkerSettingsT:
    return settings.model_copy(update={"engine": settings.engine.model_copy(update={"num_threads": num_threads})})


@asynccontextmanager
async def running(plan: ClusterPlan) -> AsyncIterator[str]:
    """The address of a cluster that lives as long as the context."""
    cluster = LocalCluster(
        gateway=plan.gateway, prefill=plan.prefill, decode=plan.decode, startup_timeout_s=plan.startup_timeout_s
    )
    async with cluster:
        yield cluster.gateway_address


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
