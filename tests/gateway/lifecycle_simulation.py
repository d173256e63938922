"""A cluster in miniature around one RequestLifecycle: workers that keep the protocol, FIFO sessions, and a random scheduler.

Everything that the lifecycle promises is asserted while it runs; `random` decides the order of events and which faults happen.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from gateway import lifecycle_messages as m
from gateway.request_lifecycle import RequestLifecycle
from kvrelay.request_state import RequestState, check_edge, is_terminal
from kvrelay.sampling_params import SamplingParams
from kvrelay.work import FailureKind, FinishReason, SequenceToken, Token, Work, WorkId

PROMPT = (5, 6, 7)
_FAILURES = [kind for kind in FailureKind if kind not in (FailureKind.INVALID, FailureKind.DEADLINE)]


def token_id_of(sequence: int, index: int) -> int:
    """The model: a token is a function of its place."""
    return 1000 * (sequence + 1) + index


@dataclass
class WorkerJob:
    """What a simulated worker holds of one work."""

    work: Work
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
    jobs: dict[WorkId, WorkerJob] = field(default_factory=dict)
    commands: deque[m.Action] = field(default_factory=deque)
    events: deque[m.Event] = field(default_factory=deque)
    alive: bool = True
    num_cancels: dict[WorkId, int] = field(default_factory=dict)


class Simulation:
    """One request among random workers.

    Args:
        random: decides everything.
        lengths: number of tokens after which each sequence ends by itself.
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
        self.emitted: list[list[int]] = [list(ids) for ids in self.lifecycle.emitted]
        self.stopped: set[int] = set()
        self.ended: set[int] = set()
        self.finishes: list[m.Finish] = []
        self.timers: list[int] = []
        self.waiting = False
        self.state = (RequestState.QUEUED, self.lifecycle.attempt)
        self.fault_budget = 5
        self.num_faults: dict[str, int] = {}
        self._number = 0
        self._answers: deque[m.Event] = deque()
        for decodes in (True, True, False, False):
            self.add_worker(decodes)

    # --- the world ------------------------------------------------------------------------------------------------------------

    def add_worker(self, decodes: bool) -> None:
        self._number += 1
        worker = SimulatedWorker(f"{'d' if decodes else 'p'}{self._number}", decodes)
        self.workers[worker.worker_id] = worker

    def run(self, max_steps: int = 3000) -> None:
        """Runs until the request ends and everything in flight has arrived."""
        self.feed(m.Start())
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
            if worker.events:
                steps.append(partial(self._deliver, worker))
            jobs = worker.jobs.values() if worker.alive else ()
            steps.extend(partial(self._progress, worker, job) for job in jobs)
        if self.waiting:
            steps.append(lambda: self.feed(m.RouteAgain()))
        if self.timers and not any(worker.events for worker in self.workers.values()):
            steps.append(lambda: self.feed(m.TimerFired(self.timers.pop())))
        if self.faults and self.fault_budget and self.random.random() < 0.08:
            steps = [self._fault]
        if steps:
            self.random.choice(steps)()

    def _in_flight(self) -> bool:
        return any(worker.commands or worker.events for worker in self.workers.values() if worker.alive)

    # --- workers --------------------------------------------------------------------------------------------------------------

    def _obey(self, worker: SimulatedWorker) -> None:
        command = worker.commands.popleft()
        if not worker.alive:
            return
        match command:
            case m.SendReserve(_, work):
                assert worker.decodes
                assert work.work_id not in worker.jobs
                worker.jobs[work.work_id] = WorkerJob(work, next_index=dict.fromkeys(work.sequences, work.first_index + 1))
                cached = self.random.randrange(len(work.token_ids))
                worker.events.append(m.Reserved(worker.worker_id, work.work_id, b"t", worker.worker_id, cached))
            case m.SendStartPrefill(_, work, _, push_address, _):
                assert not worker.decodes
                worker.jobs[work.work_id] = WorkerJob(work, target=push_address)
            case m.SendRunPrompt(_, work_id):
                job = worker.jobs.get(work_id)
                if job is not None:
                    job.next_index = dict.fromkeys(job.work.sequences, job.work.first_index)
                    job.started = True
                    worker.events.append(m.DecodeStarted(worker.worker_id, work_id))
            case m.SendCancel(_, work_id):
                worker.num_cancels[work_id] = worker.num_cancels.get(work_id, 0) + 1
                worker.jobs.pop(work_id, None)
            case m.SendFinishSequence(_, work_id, sequence):
                job = worker.jobs.get(work_id)
                if job is not None:
                    assert job.started, "told before the sequence runs"
                    job.next_index.pop(sequence, None)
                    self._drop_if_over(worker, job)

    def _progress(self, worker: SimulatedWorker, job: WorkerJob) -> None:
        if worker.decodes:
            self._decode_step(worker)
        elif not job.first_sampled:
            self._sample_first(worker, job)
        elif not job.pushed:
            self._push(worker, job)

    def _token(self, work: Work, sequence: int, index: int) -> SequenceToken:
        length = self.lengths[sequence]
        reason = FinishReason.STOP if index + 1 == length else None
        return SequenceToken(work.work_id, sequence, index, Token(token_id_of(sequence, index)), reason)

    def _sample_first(self, worker: SimulatedWorker, job: WorkerJob) -> None:
        work = job.work
        tokens = tuple(self._token(work, sequence, work.first_index) for sequence in work.sequences)
        # The report and the push race: sometimes all KV is delivered before the report is on its way.
        if self.random.random() < 0.3:
            self._push(worker, job)
        if work.work_id not in worker.jobs:
            return
        job.first_sampled = True
        worker.events.append(m.PrefillDone(worker.worker_id, work.work_id, tokens))
        if all(token.finish_reason for token in tokens) or job.pushed:
            worker.events.append(m.TransferDone(worker.worker_id, work.work_id))
            del worker.jobs[work.work_id]

    def _push(self, worker: SimulatedWorker, job: WorkerJob) -> None:
        work = job.work
        if all(work.first_index + 1 == self.lengths[sequence] for sequence in work.sequences):
            return
        target = self.workers[job.target or ""]
        reserved = target.jobs.get(work.work_id) if target.alive else None
        if reserved is None:
            worker.events.append(m.WorkFailed(worker.worker_id, work.work_id, FailureKind.TRANSFER, "no reservation"))
            del worker.jobs[work.work_id]
            return
        job.pushed = True
        reserved.started = True
        for sequence in work.sequences:
            if work.first_index + 1 == self.lengths[sequence]:
                del reserved.next_index[sequence]
        target.events.append(m.DecodeStarted(target.worker_id, work.work_id, kv_bytes=10))
        if job.first_sampled:
            worker.events.append(m.TransferDone(worker.worker_id, work.work_id, 10))
            del worker.jobs[work.work_id]

    def _decode_step(self, worker: SimulatedWorker) -> None:
        tokens = []
        for job in list(worker.jobs.values()):
            if not job.started:
                continue
            for sequence, index in list(job.next_index.items()):
                token = self._token(job.work, sequence, index)
                tokens.append(token)
                job.next_index[sequence] = index + 1
                if token.finish_reason is not None:
                    del job.next_index[sequence]
            self._drop_if_over(worker, job)
        if tokens:
            worker.events.append(m.DecodeTokens(worker.worker_id, tuple(tokens)))

    def _drop_if_over(self, worker: SimulatedWorker, job: WorkerJob) -> None:
        if job.started and not job.next_index:
            worker.jobs.pop(job.work.work_id, None)

    # --- faults ---------------------------------------------------------------------------------------------------------------

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
                if worker.events and worker.alive:
                    worker.events.appendleft(worker.events[0])
            case "skip":
                self._skip_token(worker)
            case "stop":
                self._find_stop()
            case "cancel":
                self.feed(m.CancelRequested())
            case "deadline":
                self.feed(m.DeadlinePassed())

    def _kill(self, worker: SimulatedWorker) -> None:
        if not worker.alive:
            return
        worker.alive = False
        worker.jobs.clear()
        # What it sent may still arrive, or some of it.
        for _ in range(self.random.randrange(len(worker.events) + 1)):
            worker.events.pop()
        worker.events.append(m.WorkerLost(worker.worker_id, self.random.choice([m.Blame.NONE, m.Blame.SUSPECT])))
        if not worker.decodes:
            self._break_pushes_of(worker)
        self.add_worker(worker.decodes)

    def _break_pushes_of(self, worker: SimulatedWorker) -> None:
        for other in self.workers.values():
            for job in list(other.jobs.values()):
                if other.decodes and not job.started and self.random.random() < 0.5:
                    other.events.append(m.WorkFailed(other.worker_id, job.work.work_id, FailureKind.TRANSFER, "push broke"))
                    del other.jobs[job.work.work_id]

    def _fail_job(self, worker: SimulatedWorker) -> None:
        if worker.alive and worker.jobs:
            work_id = self.random.choice(list(worker.jobs))
            del worker.jobs[work_id]
            worker.events.append(m.WorkFailed(worker.worker_id, work_id, self.random.choice(_FAILURES), "fault"))

    def _skip_token(self, worker: SimulatedWorker) -> None:
        running = [job for job in worker.jobs.values() if job.started and job.next_index and worker.decodes]
        if running and worker.alive:
            job = self.random.choice(running)
            for sequence, index in list(job.next_index.items()):
                if index + 2 < self.lengths[sequence]:
                    job.next_index[sequence] = index + 1

    def _find_stop(self) -> None:
        candidates = [s for s in range(len(self.lengths)) if self.emitted[s] and s not in self.ended | self.stopped]
        if candidates and not self.finishes:
            sequence = self.random.choice(candidates)
            self.stopped.add(sequence)
            self.feed(m.StopFound(sequence))

    # --- the gateway ----------------------------------------------------------------------------------------------------------

    def _deliver(self, worker: SimulatedWorker) -> None:
        self.feed(worker.events.popleft())

    def feed(self, event: m.Event) -> None:
        self._answers.append(event)
        while self._answers:
            for action in self.lifecycle.handle(self._answers.popleft()):
                self._act(action)

    def _act(self, action: m.Action) -> None:
        assert not self.finishes, f"{action} after Finish"
        match action:
            case m.Route():
                self._route(action)
            case m.SendReserve(worker_id) | m.SendStartPrefill(worker_id) | m.SendRunPrompt(worker_id):
                self.workers[worker_id].commands.append(action)
            case m.SendCancel(worker_id) | m.SendFinishSequence(worker_id):
                self.workers[worker_id].commands.append(action)
            case m.Emit(token):
                self._check_token(token)
            case m.SetState(state, attempt):
                self._check_state(state, attempt)
            case m.RetryLater():
                assert action.delay_ms > 0
                self.waiting = True
            case m.StartTimer(attempt):
                self.timers.append(attempt)
            case m.Finish():
                assert is_terminal(action.state)
                self._check_state(action.state, self.lifecycle.attempt)
                self.finishes.append(action)

    def _route(self, action: m.Route) -> None:
        self.waiting = False
        allowed = [
            worker for worker in self.workers.values() if worker.alive and worker.worker_id not in action.excluded_worker_ids
        ]
        decode = [worker.worker_id for worker in allowed if worker.decodes]
        prefill: list[str | None] = [worker.worker_id for worker in allowed if not worker.decodes]
        if not decode or self.random.random() < 0.05:
            self._answers.append(m.NoWorker(action.work.work_id))
            return
        chosen = self.random.choice(decode)
        peers = [worker_id for worker_id in prefill if (chosen, worker_id) not in action.avoided_pairs]
        peer = None if action.work.runs_alone else self.random.choice([*peers, *peers, None])
        self._answers.append(m.Routed(action.work.work_id, chosen, peer))

    # --- checks ---------------------------------------------------------------------------------------------------------------

    def _check_token(self, token: SequenceToken) -> None:
        assert token.work_id.attempt == self.state[1], "I5"
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
        """Nothing is held by anybody, nobody was cancelled twice, and success means whole sequences."""
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
    request = m.LifecycleRequest(
        "a" * 32, PROMPT, SamplingParams(n=num_sequences, max_tokens=50, seed=1), "", attempt, emitted, finished
    )
    return RequestLifecycle(request, lambda *where: where[-1] < local_prefill_tokens, max_attempts)
