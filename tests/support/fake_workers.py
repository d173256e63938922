"""Workers without a model that speak the real session protocols over gRPC.

Their tokens are a function of prompt and index. A test holds them at named steps (`hold`,
`wait_for`, `release`), makes them fail at one (`fail_at`), or kills them.
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

from kvrelay.core.finish_rules import finish_reason
from kvrelay.core.job import FailureKind, Job, JobId, SequenceToken, Token, WorkerLoad
from kvrelay.core.liveness import PROTOCOL_VERSION
from kvrelay.core.member import Member, MemberRole
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.network.rpc import create_server
from kvrelay.security.cluster_key import ProveWorker, WorkerProof, prove_nothing
from kvrelay.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, session_pb2, session_pb2_grpc
from kvrelay.wire import convert
from tests.support.small_tokenizer import make_tokenizer, tokenizer_files

TOKENIZER = make_tokenizer()
EOS_ID = TOKENIZER.token_to_id("<|eos|>") or 0
MODEL = ModelSpec("tiny", "llama", KVLayout(2, 2, 16, "float32"), TOKENIZER.get_vocab_size(), 512, (EOS_ID,), "f" * 32)
KV_BYTES = 4096
STEP_TIMEOUT_S = 30.0


def expected_token_ids(prompt: list[int], num_tokens: int, sequence: int = 0) -> list[int]:
    """The fake model's output: lower case letters."""
    return [_token_id(tuple(prompt), sequence, index) for index in range(num_tokens)]


def _token_id(prompt: tuple[int, ...], sequence: int, index: int) -> int:
    digest = hashlib.sha256(repr((prompt, sequence, index)).encode()).digest()
    letter = chr(ord("a") + digest[0] % 26)
    return TOKENIZER.encode(letter, add_special_tokens=False).ids[0]


@dataclass
class HeldJob:
    """What a fake worker holds of one job."""

    job: Job
    ticket: bytes = b""
    running: set[int] = field(default_factory=set)
    task: asyncio.Task[None] | None = None


class FakeWorker:
    """What both kinds have in common."""

    role: MemberRole

    def __init__(self, cluster: FakeCluster, model: ModelSpec, files: dict[str, bytes]) -> None:
        self.worker_id = f"{self.role.value}-{secrets.token_hex(4)}"
        self.address = ""
        self.jobs: dict[JobId, HeldJob] = {}
        self.num_jobs = 0
        self.samplings: list[SamplingParams] = []
        """Of all jobs, in order."""
        self.num_cancels = 0
        self.salt = ""
        """Of the last job."""
        self.wants_cache_changes = False
        """The last gateway that greeted."""
        self.model = model
        self.files = files
        self._silent = False
        self.load = WorkerLoad(num_free_blocks=100, num_blocks=100)
        self.max_sequence_tokens = 512
        self.prove: ProveWorker = prove_nothing
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
        for held_job in list(self.jobs.values()):
            self._drop(held_job.job.job_id)
        await self._server.stop(0)

    @property
    def member(self) -> Member:
        return Member(self.worker_id, self.role, self.address, self.model.name, self.model.fingerprint)

    # --- faults -----------------------------------------------------------------------------------

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
        """Answers JobFailed instead of the step."""
        self._failures.setdefault(step, []).extend([kind] * times)

    async def _step(self, step: str, held_job: HeldJob) -> bool:
        """Whether the job goes on."""
        if step in self._gates:
            self._reached[step].set()
            await self._gates[step].wait()
        if self._failures.get(step):
            self._fail(held_job, self._failures[step].pop(0))
            return False
        return held_job.job.job_id in self.jobs

    def _fail(self, held_job: HeldJob, kind: FailureKind) -> None:
        if held_job.job.job_id in self.jobs:
            self._forget(held_job.job.job_id)
            failed = session_pb2.JobFailed(
                job_id=convert.job_id_to_pb(held_job.job.job_id),
                kind=convert.failure_kind_to_pb(kind),
                message="as scripted",
            )
            self._send(job_failed=failed)

    def tell_cache(self, published: bytes = b"", evicted: bytes = b"", *, forgets_all: bool = False) -> None:
        changes = session_pb2.CacheChanges(published=published, evicted=evicted, forgets_all=forgets_all)
        self._send(cache_changes=changes)

    def fall_silent(self) -> None:
        """Keeps its streams open and sends nothing more, like a hanging process."""
        self._silent = True

    # --- jobs -------------------------------------------------------------------------------------

    def _take(self, job: Job) -> HeldJob:
        assert job.job_id not in self.jobs
        assert 0 < job.deadline_ms <= 3_600_000
        self.num_jobs += 1
        self.samplings.append(job.sampling)
        self.salt = job.cache_salt
        held_job = HeldJob(job, running=set(job.sequences))
        self.jobs[job.job_id] = held_job
        return held_job

    def _drop(self, job_id: JobId) -> None:
        held_job = self.jobs.pop(job_id, None)
        if held_job is not None and held_job.task is not None:
            held_job.task.cancel()

    def _forget(self, job_id: JobId) -> None:
        """Called from the job's own task."""
        self.jobs.pop(job_id, None)

    def _cancel(self, message: session_pb2.CancelJob) -> None:
        self.num_cancels += 1
        self._drop(convert.job_id_from_pb(message.job_id))

    def _token(self, job: Job, sequence: int, index: int) -> SequenceToken:
        prompt = job.token_ids[: job.num_prompt_tokens]
        token_id = _token_id(prompt, sequence, index)
        reason = finish_reason(token_id, index, job.num_prompt_tokens, job.sampling, self.model)
        return SequenceToken(job.job_id, sequence, index, Token(token_id), reason)

    def _send(self, **message: Any) -> None:
        for outbox in () if self._silent else self._outboxes:
            outbox.put_nowait(message)

    # --- session ----------------------------------------------------------------------------------

    async def serve(self, requests: AsyncIterator[Any], response_type: Any) -> AsyncIterator[Any]:
        outbox: asyncio.Queue[Any] = asyncio.Queue()
        hello = await anext(aiter(requests))
        assert hello.hello.protocol_version == PROTOCOL_VERSION
        self.wants_cache_changes = hello.hello.wants_cache_changes
        self._outboxes.append(outbox)
        proof = self.prove(hello.hello.nonce, hello.hello.dialled_address)
        yield response_type(hello=self._hello(proof), load=self._load())
        reading = asyncio.create_task(self._read(requests))
        try:
            while True:
                yield response_type(**await outbox.get(), load=self._load())
        finally:
            self._outboxes.remove(outbox)
            reading.cancel()
            for job_id in list(self.jobs):
                self._drop(job_id)

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

    def _hello(self, proof: WorkerProof) -> session_pb2.WorkerHello:
        return session_pb2.WorkerHello(
            worker_id=self.worker_id,
            protocol_version=PROTOCOL_VERSION,
            model=convert.model_to_pb(self.model),
            block_size=16,
            max_sequence_tokens=self.max_sequence_tokens,
            nonce=proof.nonce,
            proof=proof.digest,
        )

    def _load(self) -> session_pb2.WorkerLoad:
        num_tokens = sum(len(held_job.job.token_ids) for held_job in self.jobs.values())
        return convert.load_to_pb(replace(self.load, num_running=len(self.jobs), num_queued_prompt_tokens=num_tokens))


class FakePrefillWorker(FakeWorker):
    """Steps: prefill_done, push, transfer_done."""

    role = MemberRole.PREFILL
    wire_ms = 2.0
    """What each transfer takes; all but 2 ms after the first token."""

    def _add_service(self, server: grpc.aio.Server) -> None:
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(_PrefillService(self), server)

    def _obey(self, name: str, message: Any) -> None:
        if name == "cancel_job":
            self._cancel(message)
            return
        held_job = self._take(convert.job_from_pb(message))
        held_job.task = asyncio.create_task(self._run(held_job, message.ticket, message.push_address))

    async def _run(self, held_job: HeldJob, ticket: bytes, push_address: str) -> None:
        job = held_job.job
        tokens = [self._token(job, sequence, job.first_index) for sequence in job.sequences]
        job_id = convert.job_id_to_pb(job.job_id)
        if not await self._step("prefill_done", held_job):
            return
        done = prefill_pb2.PrefillDone(
            job_id=job_id, tokens=[convert.sequence_token_to_pb(token) for token in tokens], queue_ms=1, prefill_ms=2
        )
        report_late = "report" in self._gates
        if not report_late:
            self._send(prefill_done=done)
        kv_bytes = 0
        if not all(token.finish_reason for token in tokens):
            if not await self._step("push", held_job):
                return
            if not await self._cluster.push(push_address, job.job_id, ticket, tokens):
                self._fail(held_job, FailureKind.TRANSFER)
                return
            kv_bytes = KV_BYTES
        if report_late:
            if not await self._step("report", held_job):
                return
            self._send(prefill_done=done)
        if not await self._step("transfer_done", held_job):
            return
        self._forget(job.job_id)
        sent = prefill_pb2.TransferDone(job_id=job_id, kv_bytes=kv_bytes, wire_ms=self.wire_ms)
        sent.transfer_ms, sent.exposed_ms = self.wire_ms + 1, self.wire_ms - 1
        self._send(transfer_done=sent)


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
        if name == "cancel_job":
            self._cancel(message)
        elif name == "reserve":
            assert message.fingerprint == self.model.fingerprint
            held_job = self._take(convert.job_from_pb(message))
            self.reserved_prompts.append(held_job.job.token_ids)
            held_job.task = asyncio.create_task(self._reserve(held_job))
        elif name == "run_prompt":
            held_job = self.jobs[convert.job_id_from_pb(message.job_id)]
            held_job.task = asyncio.create_task(self._run_prompt(held_job))
        elif name == "finish_sequence":
            self.finished_sequences.append(message.sequence)
            found = self.jobs.get(convert.job_id_from_pb(message.job_id))
            if found is not None:
                found.running.discard(message.sequence)

    async def _reserve(self, held_job: HeldJob) -> None:
        if not await self._step("reserved", held_job):
            return
        held_job.ticket = secrets.token_bytes(16)
        self._send(
            reserved=decode_pb2.Reserved(
                job_id=convert.job_id_to_pb(held_job.job.job_id),
                ticket=held_job.ticket,
                push_address=self.address,
                num_cached_tokens=self.num_cached_tokens,
            )
        )

    async def _run_prompt(self, held_job: HeldJob) -> None:
        if await self._step("prompt", held_job):
            await self._decode(held_job, held_job.job.first_index, 0)

    def push(self, job_id: JobId, ticket: bytes, tokens: list[SequenceToken]) -> bool:
        """A prefill worker delivers."""
        held_job = self.jobs.get(job_id)
        if held_job is None or held_job.ticket != ticket:
            return False
        for token in tokens:
            if token.finish_reason is not None:
                held_job.running.discard(token.sequence)
        held_job.task = asyncio.create_task(self._decode(held_job, held_job.job.first_index + 1, KV_BYTES))
        return True

    async def _decode(self, held_job: HeldJob, index: int, kv_bytes: int) -> None:
        if not await self._step("decode_started", held_job):
            return
        job_id = convert.job_id_to_pb(held_job.job.job_id)
        self._send(decode_started=decode_pb2.DecodeStarted(job_id=job_id, kv_bytes=kv_bytes, prefill_ms=2, queue_ms=1))
        while held_job.running:
            if not await self._step(f"token:{index}", held_job):
                return
            tokens = [self._token(held_job.job, sequence, index) for sequence in sorted(held_job.running)]
            held_job.running -= {token.sequence for token in tokens if token.finish_reason is not None}
            output = decode_pb2.StepOutput(tokens=[convert.sequence_token_to_pb(token) for token in tokens])
            self._send(step_output=output)
            index += 1
            await asyncio.sleep(0)
        self._forget(held_job.job.job_id)


class FakeCluster:
    """All fake workers of a test, by address."""

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

    async def push(self, address: str, job_id: JobId, ticket: bytes, tokens: list[SequenceToken]) -> bool:
        for worker in self.workers:
            if worker.address == address and isinstance(worker, FakeDecodeWorker):
                return worker.push(job_id, ticket, tokens)
        return False

    def held(self) -> list[JobId]:
        """Jobs that any worker still holds."""
        return [job_id for worker in self.workers for job_id in worker.jobs]

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
