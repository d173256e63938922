"""A small cluster around one RequestLifecycle: workers, FIFO sessions and a random scheduler.

Asserts the lifecycle's promises while it runs; `random` orders events and picks faults.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from gateway.lifecycle import events
from gateway.lifecycle.generation_request import GenerationRequest
from gateway.lifecycle.lifecycle import RequestLifecycle
from kvrelay.core.job import FailureKind, FinishReason, Job, JobId, SequenceToken, Token
from kvrelay.core.request_state import RequestState, check_edge, is_terminal
from kvrelay.core.sampling_params import SamplingParams

PROMPT = (5, 6, 7)
_FAILURES = [kind for kind in FailureKind if kind not in (FailureKind.INVALID, FailureKind.DEADLINE)]


def token_id_of(sequence: int, index: int) -> int:
    """The model: a token is a function of its index."""
    return 1000 * (sequence + 1) + index


@dataclass
class WorkerJob:
    """What a simulated worker holds of one job."""

    job: Job
    target: str | None = None
    """The decode worker to push to."""
    pushed: bool = False
    first_sampled: bool = False
    started: bool = False
    next_index: dict[int, int] = field(default_factory=dict)


@dataclass
class SimulatedWorker:
    worker_id: str
    decodes: bool
    jobs: dict[JobId, WorkerJob] = field(default_factory=dict)
    commands: deque[events.Action] = field(default_factory=deque)
    outbox: deque[events.Event] = field(default_factory=deque)
    alive: bool = True
    num_cancels: dict[JobId, int] = field(default_factory=dict)


class Simulation:
    """One request among random workers.

    Args:
        lengths: tokens after which each sequence ends by itself.
        faults: which faults may happen; see `_fault`.
    """

    def __init__(
        self, random: Random, lengths: list[int], faults: frozenset[str], lifecycle: RequestLifecycle | None = None
    ) -> None:
        self.random = random
        self.lengths = lengths
        self.faults = faults
        self.lifecycle = lifecycle or make_lifecycle(len(lengths), local_prefill_tokens=random.choice([0, 2, 100]))
        self.workers: dict[str, SimulatedWorker] = {}
        self.emitted: list[list[int]] = [list(ids) for ids in self.lifecycle._outputs.emitted]
        self.stopped: set[int] = set()
        self.ended: set[int] = set()
        self.finishes: list[events.Finish] = []
        self.timers: list[int] = []
        self.waiting = False
        self.state = (RequestState.QUEUED, self.lifecycle.attempt)
        self.fault_budget = 5
        self.num_faults: dict[str, int] = {}
        self._number = 0
        self._answers: deque[events.Event] = deque()
        for decodes in (True, True, False, False):
            self.add_worker(decodes)

    # --- the world --------------------------------------------------------------------------------

    def add_worker(self, decodes: bool) -> None:
        self._number += 1
        worker = SimulatedWorker(f"{'d' if decodes else 'p'}{self._number}", decodes)
        self.workers[worker.worker_id] = worker

    def run(self, max_steps: int = 3000) -> None:
        """Runs until the request ends and everything in flight has arrived."""
        self.feed(events.Started())
        for _ in range(max_steps):
            if self.finishes and not self._in_flight():
                break
            self.step()
        else:
            raise AssertionError(f"no end in {max_steps} steps: {self.lifecycle.state} {self.state}")
        self.check_end()

    def step(self) -> None:
        steps: list[Callable[[], None]] = []
        for worker in self.workers.values():
            if worker.commands:
                steps.append(partial(self._obey, worker))
            if worker.outbox:
                steps.append(partial(self._deliver, worker))
            jobs = worker.jobs.values() if worker.alive else ()
            steps.extend(partial(self._progress, worker, worker_job) for worker_job in jobs)
        if self.waiting:
            steps.append(lambda: self.feed(events.RouteAgain()))
        if self.timers and not any(worker.outbox for worker in self.workers.values()):
            steps.append(lambda: self.feed(events.TimerFired(self.timers.pop())))
        if self.faults and self.fault_budget and self.random.random() < 0.08:
            steps = [self._fault]
        if steps:
            self.random.choice(steps)()

    def _in_flight(self) -> bool:
        return any(worker.commands or worker.outbox for worker in self.workers.values() if worker.alive)

    # --- workers ----------------------------------------------------------------------------------

    def _obey(self, worker: SimulatedWorker) -> None:
        command = worker.commands.popleft()
        if not worker.alive:
            return
        match command:
            case events.SendReserve(_, job):
                assert worker.decodes
                assert job.job_id not in worker.jobs
                worker.jobs[job.job_id] = WorkerJob(job, next_index=dict.fromkeys(job.sequences, job.first_index + 1))
                cached = self.random.randrange(len(job.token_ids))
                worker.outbox.append(events.Reserved(worker.worker_id, job.job_id, b"t", worker.worker_id, cached))
            case events.SendStartPrefill(_, job, _, push_address, _):
                assert not worker.decodes
                worker.jobs[job.job_id] = WorkerJob(job, target=push_address)
            case events.SendRunPrompt(_, job_id):
                worker_job = worker.jobs.get(job_id)
                if worker_job is not None:
                    worker_job.next_index = dict.fromkeys(worker_job.job.sequences, worker_job.job.first_index)
                    worker_job.started = True
                    worker.outbox.append(events.DecodeStarted(worker.worker_id, job_id))
            case events.SendCancel(_, job_id):
                worker.num_cancels[job_id] = worker.num_cancels.get(job_id, 0) + 1
                worker.jobs.pop(job_id, None)
            case events.SendFinishSequence(_, job_id, sequence):
                worker_job = worker.jobs.get(job_id)
                if worker_job is not None:
                    assert worker_job.started, "told before the sequence runs"
                    worker_job.next_index.pop(sequence, None)
                    self._drop_if_over(worker, worker_job)

    def _progress(self, worker: SimulatedWorker, worker_job: WorkerJob) -> None:
        if worker.decodes:
            self._decode_step(worker)
        elif not worker_job.first_sampled:
            self._sample_first(worker, worker_job)
        elif not worker_job.pushed:
            self._push(worker, worker_job)

    def _token(self, job: Job, sequence: int, index: int) -> SequenceToken:
        length = self.lengths[sequence]
        reason = FinishReason.STOP if index + 1 == length else None
        return SequenceToken(job.job_id, sequence, index, Token(token_id_of(sequence, index)), reason)

    def _sample_first(self, worker: SimulatedWorker, worker_job: WorkerJob) -> None:
        job = worker_job.job
        tokens = tuple(self._token(job, sequence, job.first_index) for sequence in job.sequences)
        # The report and the push race: sometimes all KV arrives before the report is sent.
        if self.random.random() < 0.3:
            self._push(worker, worker_job)
        if job.job_id not in worker.jobs:
            return
        worker_job.first_sampled = True
        worker.outbox.append(events.PrefillDone(worker.worker_id, job.job_id, tokens))
        if all(token.finish_reason for token in tokens) or worker_job.pushed:
            worker.outbox.append(events.TransferDone(worker.worker_id, job.job_id))
            del worker.jobs[job.job_id]

    def _push(self, worker: SimulatedWorker, worker_job: WorkerJob) -> None:
        job = worker_job.job
        if all(job.first_index + 1 == self.lengths[sequence] for sequence in job.sequences):
            return
        target = self.workers[worker_job.target or ""]
        reserved = target.jobs.get(job.job_id) if target.alive else None
        if reserved is None:
            worker.outbox.append(events.JobFailed(worker.worker_id, job.job_id, FailureKind.TRANSFER, "no reservation"))
            del worker.jobs[job.job_id]
            return
        worker_job.pushed = True
        reserved.started = True
        for sequence in job.sequences:
            if job.first_index + 1 == self.lengths[sequence]:
                del reserved.next_index[sequence]
        target.outbox.append(events.DecodeStarted(target.worker_id, job.job_id, kv_bytes=10))
        if worker_job.first_sampled:
            worker.outbox.append(events.TransferDone(worker.worker_id, job.job_id, 10))
            del worker.jobs[job.job_id]

    def _decode_step(self, worker: SimulatedWorker) -> None:
        tokens = []
        for worker_job in list(worker.jobs.values()):
            if not worker_job.started:
                continue
            for sequence, index in list(worker_job.next_index.items()):
                token = self._token(worker_job.job, sequence, index)
                tokens.append(token)
                worker_job.next_index[sequence] = index + 1
                if token.finish_reason is not None:
                    del worker_job.next_index[sequence]
            self._drop_if_over(worker, worker_job)
        if tokens:
            worker.outbox.append(events.DecodeTokens(worker.worker_id, tuple(tokens)))

    def _drop_if_over(self, worker: SimulatedWorker, worker_job: WorkerJob) -> None:
        if worker_job.started and not worker_job.next_index:
            worker.jobs.pop(worker_job.job.job_id, None)

    # --- faults -----------------------------------------------------------------------------------

    def _fault(self) -> None:
        name = self.random.choice(sorted(self.faults))
        worker = self.random.choice(list(self.workers.values()))
        self.fault_budget -= 1
        self.num_faults[name] = self.num_faults.get(name, 0) + 1
        match name:
            case "kill":
                self._kill(worker)
            case "fail":
                self._fail_job(worker)
            case "repeat":
                if worker.outbox and worker.alive:
                    worker.outbox.appendleft(worker.outbox[0])
            case "skip":
                self._skip_token(worker)
            case "stop":
                self._find_stop()
            case "cancel":
                self.feed(events.CancelRequested())
            case "deadline":
                self.feed(events.DeadlinePassed())

    def _kill(self, worker: SimulatedWorker) -> None:
        if not worker.alive:
            return
        worker.alive = False
        worker.jobs.clear()
        # Some or all of its messages may still arrive.
        for _ in range(self.random.randrange(len(worker.outbox) + 1)):
            worker.outbox.pop()
        worker.outbox.append(
            events.WorkerLost(
                worker.worker_id, self.random.choice([events.CrashVerdict.NONE, events.CrashVerdict.SUSPECTED])
            )
        )
        if not worker.decodes:
            self._break_pushes_of(worker)
        self.add_worker(worker.decodes)

    def _break_pushes_of(self, worker: SimulatedWorker) -> None:
        for other in self.workers.values():
            for worker_job in list(other.jobs.values()):
                if other.decodes and not worker_job.started and self.random.random() < 0.5:
                    other.outbox.append(
                        events.JobFailed(other.worker_id, worker_job.job.job_id, FailureKind.TRANSFER, "push broke")
                    )
                    del other.jobs[worker_job.job.job_id]

    def _fail_job(self, worker: SimulatedWorker) -> None:
        if worker.alive and worker.jobs:
            job_id = self.random.choice(list(worker.jobs))
            del worker.jobs[job_id]
            worker.outbox.append(events.JobFailed(worker.worker_id, job_id, self.random.choice(_FAILURES), "fault"))

    def _skip_token(self, worker: SimulatedWorker) -> None:
        running = [
            worker_job
            for worker_job in worker.jobs.values()
            if worker_job.started and worker_job.next_index and worker.decodes
        ]
        if running and worker.alive:
            worker_job = self.random.choice(running)
            for sequence, index in list(worker_job.next_index.items()):
                if index + 2 < self.lengths[sequence]:
                    worker_job.next_index[sequence] = index + 1

    def _find_stop(self) -> None:
        candidates = [s for s in range(len(self.lengths)) if self.emitted[s] and s not in self.ended | self.stopped]
        if candidates and not self.finishes:
            sequence = self.random.choice(candidates)
            self.stopped.add(sequence)
            self.feed(events.StopFound(sequence))

    # --- the gateway ------------------------------------------------------------------------------

    def _deliver(self, worker: SimulatedWorker) -> None:
        self.feed(worker.outbox.popleft())

    def feed(self, event: events.Event) -> None:
        self._answers.append(event)
        while self._answers:
            for action in self.lifecycle.handle(self._answers.popleft()):
                self._act(action)

    def _act(self, action: events.Action) -> None:
        assert not self.finishes, f"{action} after Finish"
        match action:
            case events.Route():
                self._route(action)
            case events.SendReserve(worker_id) | events.SendStartPrefill(worker_id) | events.SendRunPrompt(worker_id):
                self.workers[worker_id].commands.append(action)
            case events.SendCancel(worker_id) | events.SendFinishSequence(worker_id):
                self.workers[worker_id].commands.append(action)
            case events.Emit(token):
                self._check_token(token)
            case events.SetState(state, attempt):
                self._check_state(state, attempt)
            case events.RetryLater():
                assert action.delay_ms > 0
                self.waiting = True
            case events.StartTimer(attempt):
                self.timers.append(attempt)
            case events.Finish():
                assert is_terminal(action.state)
                self._check_state(action.state, self.lifecycle.attempt)
                self.finishes.append(action)

    def _route(self, action: events.Route) -> None:
        self.waiting = False
        allowed = [
            worker
            for worker in self.workers.values()
            if worker.alive and worker.worker_id not in action.excluded_worker_ids
        ]
        decode = [worker.worker_id for worker in allowed if worker.decodes]
        prefill: list[str | None] = [worker.worker_id for worker in allowed if not worker.decodes]
        if not decode or self.random.random() < 0.05:
            self._answers.append(events.NoWorker(action.job.job_id))
            return
        chosen = self.random.choice(decode)
        peers = [worker_id for worker_id in prefill if (chosen, worker_id) not in action.avoided_pairs]
        peer = None if action.job.isolated else self.random.choice([*peers, *peers, None])
        self._answers.append(events.Routed(action.job.job_id, chosen, peer))

    # --- checks -----------------------------------------------------------------------------------

    def _check_token(self, token: SequenceToken) -> None:
        assert token.job_id.attempt == self.state[1], "I5"
        assert token.sequence not in self.stopped | self.ended
        assert token.index == len(self.emitted[token.sequence]), "I1"
        assert token.token.token_id == token_id_of(token.sequence, token.index), "I2"
        self.emitted[token.sequence].append(token.token.token_id)
        if token.finish_reason is not None:
            self.ended.add(token.sequence)

    def _check_state(self, state: RequestState, attempt: int) -> None:
        assert check_edge(*self.state, state, attempt), f"I7: {self.state} to {state} {attempt}"
        self.state = (state, attempt)

    def check_end(self) -> None:
        """No worker holds anything or was cancelled twice, and success means complete sequences."""
        assert len(self.finishes) == 1
        for worker in self.workers.values():
            assert not (worker.alive and worker.jobs), f"{worker.worker_id} still holds {list(worker.jobs)}"
            assert all(count == 1 for count in worker.num_cancels.values())
        finish = self.finishes[0]
        if finish.state is RequestState.SUCCEEDED:
            for sequence, length in enumerate(self.lengths):
                if sequence not in self.stopped:
                    assert len(self.emitted[sequence]) == length
        assert (finish.error is None) == (finish.state is RequestState.SUCCEEDED)


def make_lifecycle(
    num_sequences: int,
    *,
    local_prefill_tokens: int = 0,
    max_attempts: int = 8,
    emitted: tuple[tuple[int, ...], ...] = (),
    finished: frozenset[int] = frozenset(),
    attempt: int = 1,
) -> RequestLifecycle:
    sampling = SamplingParams(n=num_sequences, max_tokens=50, seed=1)
    request = GenerationRequest(
        request_id="a" * 32,
        model="",
        fingerprint="",
        prompt_token_ids=PROMPT,
        sampling=sampling,
        tenant="",
        submit_time=0.0,
        deadline=0.0,
        attempt=attempt,
        emitted=emitted,
        finished_sequences=finished,
    )
    return RequestLifecycle(request, lambda *where: where[-1] < local_prefill_tokens, max_attempts)
