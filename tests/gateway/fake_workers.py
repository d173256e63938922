"""Workers without a model: they keep the session protocols over real gRPC, and their tokens are a function of prompt and place.

A test holds them at named steps (`hold`, `wait_for`, `release`), makes them fail at one (`fail_at`), or kills them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from kvrelay import wire
from kvrelay.finish_rules import finish_reason
from kvrelay.liveness import PROTOCOL_VERSION
from kvrelay.model_spec import KVLayout, ModelSpec
from kvrelay.rpc import create_server
from kvrelay.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, session_pb2, session_pb2_grpc
from kvrelay.work import FailureKind, SequenceToken, Token, Work, WorkerLoad, WorkId
from kvrelay.worker_registry import Member, MemberRole
from tests.gateway.small_tokenizer import make_tokenizer, tokenizer_files

TOKENIZER = make_tokenizer()
EOS_ID = TOKENIZER.token_to_id("<|eos|>") or 0
MODEL = ModelSpec("tiny", "llama", KVLayout(2, 2, 16, "float32"), TOKENIZER.get_vocab_size(), 512, (EOS_ID,), "f" * 32)
KV_BYTES = 4096
STEP_TIMEOUT_S = 10.0


def expected_token_ids(prompt: list[int], num_tokens: int, sequence: int = 0) -> list[int]:
    """What the fake model generates: lower case letters."""
    return [_token_id(tuple(prompt), sequence, index) for index in range(num_tokens)]


def _token_id(prompt: tuple[int, ...], sequence: int, index: int) -> int:
    digest = hashlib.sha256(repr((prompt, sequence, index)).encode()).digest()
    letter = chr(ord("a") + digest[0] % 26)
    return TOKENIZER.encode(letter, add_special_tokens=False).ids[0]


@dataclass
class Job:
    """What a fake worker holds of one work."""

    work: Work
    ticket: bytes = b""
    running: set[int] = field(default_factory=set)
    task: asyncio.Task[None] | None = None


class FakeWorker:
    """What both kinds have in common."""

    role: MemberRole

    def __init__(self, cluster: FakeCluster, model: ModelSpec, files: dict[str, bytes]) -> None:
        self.worker_id = f"{self.role.value}-{secrets.token_hex(4)}"
        self.address = ""
        self.jobs: dict[WorkId, Job] = {}
        self.num_works = 0
        self.num_cancels = 0
        self.model = model
        self.files = files
        self._silent = False
        self.load = WorkerLoad(num_free_blocks=100, num_blocks=100)
        self.max_sequence_tokens = 512
        self._cluster = cluster
        self._server = create_server()
        self._outboxes: list[asyncio.Queue[Any]] = []
        self._gates: dict[str, asyncio.Event] = {}
        self._reached: dict[str, asyncio.Event] = {}
        self._failures: dict[str, list[FailureKind]] = {}

    async def start(self) -> None:
        session_pb2_grpc.add_ModelServiceServicer_to_server(_ModelService(self), self._server)
        self._add_service(self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    def _add_service(self, server: grpc.aio.Server) -> None:
        raise NotImplementedError

    async def kill(self) -> None:
        """Breaks all streams at once."""
        self._cluster.workers.remove(self)
        for job in list(self.jobs.values()):
            self._drop(job.work.work_id)
        await self._server.stop(0)

    @property
    def member(self) -> Member:
        return Member(self.worker_id, self.role, self.address, self.model.name, self.model.fingerprint)

    # --- faults ---------------------------------------------------------------------------------------------------------------

    def hold(self, step: str) -> None:
        """Stops before the step until `release`."""
        self._gates[step] = asyncio.Event()
        self._reached[step] = asyncio.Event()

    async def wait_for(self, step: str) -> None:
        """Waits until the held step is reached."""
        async with asyncio.timeout(STEP_TIMEOUT_S):
            await self._reached[step].wait()

    def release(self, step: str) -> None:
        self._gates.pop(step).set()

    def fail_at(self, step: str, kind: FailureKind, times: int = 1) -> None:
        """Answers WorkFailed instead of the step."""
        self._failures.setdefault(step, []).extend([kind] * times)

    async def _step(self, step: str, job: Job) -> bool:
        """Whether the work goes on."""
        if step in self._gates:
            self._reached[step].set()
            await self._gates[step].wait()
        if self._failures.get(step):
            self._fail(job, self._failures[step].pop(0))
            return False
        return job.work.work_id in self.jobs

    def _fail(self, job: Job, kind: FailureKind) -> None:
        if job.work.work_id in self.jobs:
            self._forget(job.work.work_id)
            failed = session_pb2.WorkFailed(
                work_id=wire.work_id_to_pb(job.work.work_id), kind=wire.failure_kind_to_pb(kind), message="as scripted"
            )
            self._send(work_failed=failed)

    def fall_silent(self) -> None:
        """Keeps its streams open and says nothing more, as a process that hangs."""
        self._silent = True

    # --- work -----------------------------------------------------------------------------------------------------------------

    def _take(self, work: Work) -> Job:
        assert work.work_id not in self.jobs
        assert 0 < work.deadline_ms <= 3_600_000
        self.num_works += 1
        job = Job(work, running=set(work.sequences))
        self.jobs[work.work_id] = job
        return job

    def _drop(self, work_id: WorkId) -> None:
        job = self.jobs.pop(work_id, None)
        if job is not None and job.task is not None:
            job.task.cancel()

    def _forget(self, work_id: WorkId) -> None:
        """From within the job's own task."""
        self.jobs.pop(work_id, None)

    def _cancel(self, message: session_pb2.CancelWork) -> None:
        self.num_cancels += 1
        self._drop(wire.work_id_from_pb(message.work_id))

    def _token(self, work: Work, sequence: int, index: int) -> SequenceToken:
        prompt = work.token_ids[: work.num_prompt_tokens]
        token_id = _token_id(prompt, sequence, index)
        reason = finish_reason(token_id, index, work.num_prompt_tokens, work.sampling, self.model)
        return SequenceToken(work.work_id, sequence, index, Token(token_id), reason)

    def _send(self, **message: Any) -> None:
        for outbox in () if self._silent else self._outboxes:
            outbox.put_nowait(message)

    # --- session --------------------------------------------------------------------------------------------------------------

    async def serve(self, requests: AsyncIterator[Any], response_type: Any) -> AsyncIterator[Any]:
        outbox: asyncio.Queue[Any] = asyncio.Queue()
        hello = await anext(aiter(requests))
        assert hello.hello.protocol_version == PROTOCOL_VERSION
        self._outboxes.append(outbox)
        yield response_type(hello=self._hello(), load=self._load())
        reading = asyncio.create_task(self._read(requests))
        try:
            while True:
                yield response_type(**await outbox.get(), load=self._load())
        finally:
            self._outboxes.remove(outbox)
            reading.cancel()
            for work_id in list(self.jobs):
                self._drop(work_id)

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for request in requests:
                name = request.WhichOneof("message")
                if name == "heartbeat":
                    self._send(heartbeat_ack=session_pb2.HeartbeatAck(number=request.heartbeat.number))
                elif name != "heartbeat_ack":
                    self._obey(name, getattr(request, name))

    def _obey(self, name: str, message: Any) -> None:
        raise NotImplementedError

    def _hello(self) -> session_pb2.WorkerHello:
        return session_pb2.WorkerHello(
            worker_id=self.worker_id,
            protocol_version=PROTOCOL_VERSION,
            model=wire.model_to_pb(self.model),
            block_size=16,
            max_sequence_tokens=self.max_sequence_tokens,
        )

    def _load(self) -> session_pb2.WorkerLoad:
        num_tokens = sum(len(job.work.token_ids) for job in self.jobs.values())
        return wire.load_to_pb(replace(self.load, num_running=len(self.jobs), num_queued_prompt_tokens=num_tokens))


class FakePrefillWorker(FakeWorker):
    """Steps: prefill_done, push, transfer_done."""

    role = MemberRole.PREFILL

    def _add_service(self, server: grpc.aio.Server) -> None:
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(_PrefillService(self), server)

    def _obey(self, name: str, message: Any) -> None:
        if name == "cancel_work":
            self._cancel(message)
            return
        job = self._take(wire.work_from_pb(message))
        job.task = asyncio.create_task(self._run(job, message.ticket, message.push_address))

    async def _run(self, job: Job, ticket: bytes, push_address: str) -> None:
        work = job.work
        tokens = [self._token(work, sequence, work.first_index) for sequence in work.sequences]
        work_id = wire.work_id_to_pb(work.work_id)
        if not await self._step("prefill_done", job):
            return
        done = prefill_pb2.PrefillDone(
            work_id=work_id, tokens=[wire.sequence_token_to_pb(token) for token in tokens], queue_ms=1, prefill_ms=2
        )
        report_late = "report" in self._gates
        if not report_late:
            self._send(prefill_done=done)
        kv_bytes = 0
        if not all(token.finish_reason for token in tokens):
            if not await self._step("push", job):
                return
            if not await self._cluster.push(push_address, work.work_id, ticket, tokens):
                self._fail(job, FailureKind.TRANSFER)
                return
            kv_bytes = KV_BYTES
        if report_late:
            if not await self._step("report", job):
                return
            self._send(prefill_done=done)
        if not await self._step("transfer_done", job):
            return
        self._forget(work.work_id)
        self._send(transfer_done=prefill_pb2.TransferDone(work_id=work_id, kv_bytes=kv_bytes, transfer_ms=3, exposed_ms=1))


class FakeDecodeWorker(FakeWorker):
    """Steps: reserved, prompt, decode_started, token:INDEX."""

    role = MemberRole.DECODE

    def __init__(self, cluster: FakeCluster, model: ModelSpec, files: dict[str, bytes]) -> None:
        super().__init__(cluster, model, files)
        self.num_cached_tokens = 0
        self.reserved_prompts: list[tuple[int, ...]] = []
        self.finished_sequences: list[int] = []

    def _add_service(self, server: grpc.aio.Server) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(_DecodeService(self), server)

    def _obey(self, name: str, message: Any) -> None:
        if name == "cancel_work":
            self._cancel(message)
        elif name == "reserve":
            assert message.fingerprint == self.model.fingerprint
            job = self._take(wire.work_from_pb(message))
            self.reserved_prompts.append(job.work.token_ids)
            job.task = asyncio.create_task(self._reserve(job))
        elif name == "run_prompt":
            job = self.jobs[wire.work_id_from_pb(message.work_id)]
            job.task = asyncio.create_task(self._run_prompt(job))
        elif name == "finish_sequence":
            self.finished_sequences.append(message.sequence)
            found = self.jobs.get(wire.work_id_from_pb(message.work_id))
            if found is not None:
                found.running.discard(message.sequence)

    async def _reserve(self, job: Job) -> None:
        if not await self._step("reserved", job):
            return
        job.ticket = secrets.token_bytes(16)
        self._send(
            reserved=decode_pb2.Reserved(
                work_id=wire.work_id_to_pb(job.work.work_id),
                ticket=job.ticket,
                push_address=self.address,
                num_cached_tokens=self.num_cached_tokens,
            )
        )

    async def _run_prompt(self, job: Job) -> None:
        if await self._step("prompt", job):
            await self._decode(job, job.work.first_index, 0)

    def push(self, work_id: WorkId, ticket: bytes, tokens: list[SequenceToken]) -> bool:
        """A prefill worker delivers."""
        job = self.jobs.get(work_id)
        if job is None or job.ticket != ticket:
            return False
        for token in tokens:
            if token.finish_reason is not None:
                job.running.discard(token.sequence)
        job.task = asyncio.create_task(self._decode(job, job.work.first_index + 1, KV_BYTES))
        return True

    async def _decode(self, job: Job, index: int, kv_bytes: int) -> None:
        if not await self._step("decode_started", job):
            return
        work_id = wire.work_id_to_pb(job.work.work_id)
        self._send(decode_started=decode_pb2.DecodeStarted(work_id=work_id, kv_bytes=kv_bytes, prefill_ms=2, queue_ms=1))
        while job.running:
            if not await self._step(f"token:{index}", job):
                return
            tokens = [self._token(job.work, sequence, index) for sequence in sorted(job.running)]
            job.running -= {token.sequence for token in tokens if token.finish_reason is not None}
            output = decode_pb2.StepOutput(tokens=[wire.sequence_token_to_pb(token) for token in tokens])
            self._send(step_output=output)
            index += 1
            await asyncio.sleep(0)
        self._forget(job.work.work_id)


class FakeCluster:
    """All fake workers of a test; they find each other by address."""

    def __init__(self) -> None:
        self.workers: list[FakeWorker] = []

    async def add_prefill(self, model: ModelSpec = MODEL, files: dict[str, bytes] | None = None) -> FakePrefillWorker:
        worker = FakePrefillWorker(self, model, tokenizer_files() if files is None else files)
        await worker.start()
        self.workers.append(worker)
        return worker

    async def add_decode(self, model: ModelSpec = MODEL, files: dict[str, bytes] | None = None) -> FakeDecodeWorker:
        worker = FakeDecodeWorker(self, model, tokenizer_files() if files is None else files)
        await worker.start()
        self.workers.append(worker)
        return worker

    async def push(self, address: str, work_id: WorkId, ticket: bytes, tokens: list[SequenceToken]) -> bool:
        for worker in self.workers:
            if worker.address == address and isinstance(worker, FakeDecodeWorker):
                return worker.push(work_id, ticket, tokens)
        return False

    def held(self) -> list[WorkId]:
        """Works that any worker still holds."""
        return [work_id for worker in self.workers for work_id in worker.jobs]

    async def stop(self) -> None:
        for worker in list(self.workers):
            await worker.kill()


class _ModelService(session_pb2_grpc.ModelServiceServicer):
    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    async def GetTokenizer(self, request: Any, context: Any) -> AsyncIterator[session_pb2.GetTokenizerResponse]:
        for name, content in self._worker.files.items():
            for begin in range(0, len(content), 4096):
                yield session_pb2.GetTokenizerResponse(file_name=name, content=content[begin : begin + 4096])


class _PrefillService(prefill_pb2_grpc.PrefillServiceServicer):
    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        return self._worker.serve(request_iterator, prefill_pb2.PrefillServiceSessionResponse)


class _DecodeService(decode_pb2_grpc.DecodeServiceServicer):
    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        return self._worker.serve(request_iterator, decode_pb2.DecodeServiceSessionResponse)
