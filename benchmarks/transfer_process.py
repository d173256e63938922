"""One end of a measured KV transfer, as a process: the real sender or the real receiver over a real
pool, without a model.

Takes one JSON object a line on standard input and answers each with one on standard output;
`benchmarks.transfer_pair` drives it.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
import json
import random
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash

from benchmarks.bench_credentials import BenchCredentials
from decode_worker.commands import PushEnded
from decode_worker.kv_receiver import KVReceiver, ReceiverContext
from decode_worker.receiving.write_grants import WriteGrants
from kvrelay.config.settings import BYTES_PER_MIB, TransferSettings
from kvrelay.core.job import Job, JobId, SequenceToken, Token
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.engine.native import load_library
from kvrelay.engine.paged_kv_cache import PagedKVCache
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.kv_transfer.malloc_tuning import keep_message_memory
from kvrelay.kv_transfer.shared_memory_transport import create_transport
from kvrelay.kv_transfer.shm_fd_passing import RegionServer
from kvrelay.kv_transfer.transports import NUM_TRANSFER_THREADS, PushPlan
from kvrelay.network.rpc import bind_server, create_server
from kvrelay.observability.logging import configure_logging
from kvrelay.runtime import event_loop
from kvrelay.runtime.garbage_collection import keep_what_is_loaded
from kvrelay.security.credentials import in_plain_text
from kvrelay.security.principal import Role
from prefill_worker.kv_sender import KVSender, SenderContext, TransferResult

BLOCK_SIZE = 16
BYTES_PER_KIB = 1024
BUSY_SIZE = 96
"""Side of the matrices that a paced pass multiplies: about 0.05 ms each."""


class End(Protocol):
    """The sender's or the receiver's side."""

    async def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Does what one line of input asks for."""
        raise NotImplementedError

    async def close(self) -> None: ...


class Pool:
    """A pool with room for one sequence in blocks of mixed order, as after some hours of use."""

    def __init__(self, layout: KVLayout, num_tokens: int, seed: int) -> None:
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        self.cache = PagedKVCache(layout, num_blocks, BLOCK_SIZE, kernels=load_library())
        blocks = list(range(num_blocks))
        random.Random(seed).shuffle(blocks)
        self.block_ids = tuple(blocks)
        self.layout = layout
        # Every page is touched once, here: a worker's pool is in use for hours.
        self.fill(None)

    def fill(self, seed: int | None) -> None:
        """Random bytes, or zeros without a seed."""
        generator = np.random.default_rng(seed)
        for layer in range(self.layout.num_layers):
            span = KVSpan(layer, layer + 1, 0, len(self.block_ids) * BLOCK_SIZE)
            num_bytes = span.num_bytes(self.layout)
            payload = generator.bytes(num_bytes) if seed is not None else bytes(num_bytes)
            self.cache.import_kv(payload, span, self.block_ids)

    def digest(self, num_tokens: int) -> str:
        """Of the KV of the first tokens."""
        hasher = xxhash.xxh3_128()
        for layer in range(self.layout.num_layers):
            span = KVSpan(layer, layer + 1, 0, num_tokens)
            exported = bytearray(span.num_bytes(self.layout))
            self.cache.export_kv(memoryview(exported), span, self.block_ids)
            hasher.update(exported)
        return hasher.hexdigest()


class ReceivingEnd:
    """A decode worker's receiver that listens on a free port."""

    def __init__(self, pool: Pool, model: ModelSpec, credentials: BenchCredentials | None) -> None:
        self._pool = pool
        self._grants = WriteGrants()
        self._ended: asyncio.Queue[tuple[PushEnded, float]] = asyncio.Queue()
        self._threads = ThreadPoolExecutor(NUM_TRANSFER_THREADS)
        loop = asyncio.get_running_loop()

        def submit(ended: PushEnded) -> None:
            loop.call_soon_threadsafe(self._ended.put_nowait, (ended, time.monotonic()))

        self._memory = RegionServer()
        self._receiver = KVReceiver(
            ReceiverContext(pool.cache, model, self._grants, self._threads, submit, self._memory)
        )
        self._server = create_server(takes_bulk=True)
        self._receiver.add_to(self._server)
        secure = None if credentials is None else credentials.server_credentials(Role.DECODE)
        self._port = bind_server(self._server, "127.0.0.1", 0, (), secure).port
        self._cpu_s = 0.0

    async def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        match command["do"]:
            case "listen":
                self._memory.start()
                await self._server.start()
                return {"address": f"127.0.0.1:{self._port}"}
            case "reserve":
                job = _job(command["request_id"], command["num_tokens"])
                ticket = self._grants.grant(job, self._pool.block_ids, 0)
                self._cpu_s = cpu_s()
                return {"ticket": ticket.hex()}
            case "received":
                ended, ended_at = await self._ended.get()
                return {"problem": ended.problem if ended.first_tokens is None else "", "at": ended_at, **self._cpu()}
            case "digest":
                return {"digest": self._pool.digest(command["num_tokens"])}
        raise ValueError(command)

    def _cpu(self) -> dict[str, float]:
        return {"cpu_s": cpu_s() - self._cpu_s}

    async def close(self) -> None:
        await self._server.stop(None)
        self._memory.close()
        self._threads.shutdown()


class SendingEnd:
    """A prefill worker's sender."""

    def __init__(
        self, pool: Pool, model: ModelSpec, settings: TransferSettings, credentials: BenchCredentials | None
    ) -> None:
        self._pool = pool
        self._model = model
        towards = in_plain_text if credentials is None else credentials.towards(Role.PREFILL)
        self._transport = create_transport(settings, towards)
        self._threads = ThreadPoolExecutor(NUM_TRANSFER_THREADS)
        self._context = SenderContext(
            exporter=pool.cache,
            layout=model.kv_layout,
            transport=self._transport,
            threads=self._threads,
            max_message_bytes=settings.transfer_message_kib * BYTES_PER_KIB,
            max_window_bytes=settings.transfer_window_mib * BYTES_PER_MIB,
        )

    async def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        match command["do"]:
            case "push":
                return await self._push(command)
            case "digest":
                return {"digest": self._pool.digest(command["num_tokens"])}
        raise ValueError(command)

    async def close(self) -> None:
        await self._transport.close()
        self._threads.shutdown()

    async def _push(self, command: dict[str, Any]) -> dict[str, Any]:
        num_tokens = command["num_tokens"]
        job = _job(command["request_id"], num_tokens)
        plan = PushPlan(job.job_id, bytes.fromhex(command["ticket"]), self._model.fingerprint, 0, num_tokens)
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Any] = loop.create_future()

        def on_ended(_: JobId, outcome: Any) -> None:
            loop.call_soon_threadsafe(ended.set_result, outcome)

        begin_cpu_s, begin_s = cpu_s(), time.monotonic()
        sender = KVSender(self._context, command["address"], plan, self._pool.block_ids, on_ended)
        pass_cpu_s = 0.0
        if pass_s := command.get("pass_s"):
            pass_cpu_s = await asyncio.to_thread(_compute_paced, sender, loop, self._model.kv_layout, command, pass_s)
            await asyncio.sleep(0)
        else:
            sender.announce_cached(num_tokens)
        sampled_at = time.monotonic()
        sender.finish([SequenceToken(job.job_id, 0, 0, Token(1))])
        outcome = await ended
        if not isinstance(outcome, TransferResult):
            return {"problem": str(outcome)}
        used_cpu_s = cpu_s() - begin_cpu_s - pass_cpu_s
        return {"problem": "", "cpu_s": used_cpu_s, "begin": begin_s, "sampled_at": sampled_at, **asdict(outcome)}


def _compute_paced(
    sender: KVSender, loop: asyncio.AbstractEventLoop, layout: KVLayout, command: dict[str, Any], pass_s: float
) -> float:
    """Computes as long as a prompt's pass would and announces its layers, as the engine thread
    does. Its own CPU seconds.
    """
    num_tokens, chunk_tokens = command["num_tokens"], command["chunk_tokens"]
    matrix = torch.rand(BUSY_SIZE, BUSY_SIZE)
    next_at, begin_cpu_s = time.monotonic(), time.thread_time()
    for begin in range(0, num_tokens, chunk_tokens):
        end = min(begin + chunk_tokens, num_tokens)
        for layer in range(layout.num_layers):
            next_at += pass_s * (end - begin) / num_tokens / layout.num_layers
            while time.monotonic() < next_at:
                torch.mm(matrix, matrix)
            loop.call_soon_threadsafe(sender.announce, layer, begin, end)
    return time.thread_time() - begin_cpu_s


def cpu_s() -> float:
    """CPU seconds of this process, all threads, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _job(request_id: str, num_tokens: int) -> Job:
    return Job(
        job_id=JobId(request_id, 1),
        token_ids=tuple(1 for _ in range(num_tokens)),
        num_prompt_tokens=num_tokens,
        num_sequences=1,
        sampling=SamplingParams(temperature=0.0, max_tokens=8),
        cache_salt="",
        deadline_ms=60_000,
    )


def _make_end(role: str, setup: dict[str, Any]) -> End:
    layout = KVLayout(**setup["layout"])
    model = ModelSpec("bench", "bench", layout, 10, setup["num_tokens"], (), "bench")
    pool = Pool(layout, setup["num_tokens"], seed=1 if role == "send" else 2)
    folder = setup["certificates"]
    credentials = None if folder is None else BenchCredentials(Path(folder), key="")
    if role == "receive":
        return ReceivingEnd(pool, model, credentials)
    pool.fill(seed=3)
    return SendingEnd(pool, model, TransferSettings(**setup["settings"]), credentials)


async def _serve(role: str, read: Callable[[], str]) -> None:
    torch.set_num_threads(1)
    keep_message_memory()
    end = _make_end(role, json.loads(read()))
    keep_what_is_loaded()  # as a worker does
    try:
        while line := await asyncio.to_thread(read):
            print(json.dumps(await end.answer(json.loads(line))), flush=True)
    finally:
        await end.close()


if __name__ == "__main__":
    # A loop of its own and nothing else: what it measures is this process.
    configure_logging("warning", "console", role=sys.argv[1])
    event_loop.run(_serve(sys.argv[1], sys.stdin.readline))
