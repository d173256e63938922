"""kvrelay's service: a gateway, a prefill worker and a decode worker as processes, asked through
kvrelay's own client.
"""

import asyncio
import contextlib
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.peers.adapters.adapter_loop import Options, Recorder, Request, clock_s, main, use_cores
from benchmarks.peers.adapters.kvrelay_settings import engine_settings

KV_CACHE_MIB = 1024
TIMEOUT_S = 600.0
STOPPED_MS = 3_600_000
"""The whole cluster is stopped while others are measured: nobody in it may take that for a death.
"""


class ServiceAdapter:
    def __init__(self) -> None:
        self._cluster: Any = None
        self._client: Any = None
        self._loop = asyncio.Runner()

    def load(self, options: Options) -> str:
        if options.num_threads < 2:
            raise ValueError("two workers need two cores")
        use_cores(options.cores)
        return self._loop.run(self._load(options))

    async def _load(self, options: Options) -> str:
        import kvrelay
        from kvrelay.client import AsyncClient
        from kvrelay.cluster.local_cluster import LocalCluster
        from kvrelay.config.settings import DecodeSettings, GatewaySettings, PrefillSettings, ServerSettings

        self._folder = tempfile.TemporaryDirectory()
        # A board of its own: a cluster that is stopped while others are measured must not be asked
        # for its cores.
        engine = engine_settings(options, kv_cache_mib=KV_CACHE_MIB, core_sharing_file=f"{self._folder.name}/cores")
        server = ServerSettings(liveness_window_ms=STOPPED_MS, lease_ms=STOPPED_MS, log_level="warning")
        self._cluster = LocalCluster(
            gateway=GatewaySettings(server=server),
            prefill=[PrefillSettings(server=server, engine=engine)],
            decode=[DecodeSettings(server=server, engine=engine)],
        )
        await self._cluster.start()
        self._client = AsyncClient(self._cluster.gateway_address, timeout_s=TIMEOUT_S)
        return kvrelay.__version__

    def run(self, requests: Sequence[Request], recorder: Recorder) -> None:
        self._loop.run(self._run(requests, recorder))

    async def _run(self, requests: Sequence[Request], recorder: Recorder) -> None:
        foreground = [asyncio.create_task(self._follow(each, recorder)) for each in requests if not each.background]
        foreground_ended = asyncio.Event()
        background = [self._follow_later(each, recorder, foreground_ended) for each in requests if each.background]
        later = asyncio.gather(*background)
        try:
            await asyncio.gather(*foreground)
        finally:
            foreground_ended.set()
            await later

    async def _follow_later(self, request: Request, recorder: Recorder, foreground_ended: asyncio.Event) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._loop.get_loop().time() + recorder.begin_s + request.at_s - clock_s()):
                await foreground_ended.wait()
        if not foreground_ended.is_set():
            await self._follow(request, recorder)

    async def _follow(self, request: Request, recorder: Recorder) -> None:
        recorder.submit(request.request_id)
        stream = self._client.generate(
            token_ids=request.token_ids,
            max_tokens=request.max_tokens,
            temperature=0.0,
            ignore_eos=True,
            timeout_s=TIMEOUT_S,
        )
        async with stream:
            async for delta in stream:
                recorder.receive(request.request_id, [token.token_id for token in delta.tokens])

    def close(self) -> None:
        self._loop.run(self._close())
        self._loop.close()

    async def _close(self) -> None:
        if self._client is not None:
            await self._client.close()
        if self._cluster is not None:
            await self._cluster.stop()
            self._folder.cleanup()


if __name__ == "__main__":
    main(ServiceAdapter())
