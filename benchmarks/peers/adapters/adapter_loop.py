"""What all adapters share: the protocol with the runner, the clock, and when requests are due.
Standard library only.

An adapter is a process. It reads one JSON object per line and answers each with one:

    {"command": "load", "options": {...}}     -> {"load_s": seconds, "version": text}
    {"command": "run", "requests": [{...}]}   -> {"responses": [{"request_id", "submitted_s", "token_times_s", "token_ids"}, ...]}
    {"command": "close"}                      -> {}, and it ends
    anything that failed                      -> {"error": text}

Times are seconds of one monotonic clock. What the engine prints to standard output goes to standard
error.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TextIO

clock_s = time.perf_counter

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Request:
    """One greedy stream to generate; it ends after exactly `max_tokens`."""

    request_id: int
    token_ids: list[int]
    max_tokens: int
    at_s: float = 0.0
    """When it arrives, after the run's begin."""
    background: bool = False
    """Does not arrive any more once all other requests have ended."""


@dataclass(frozen=True, slots=True)
class Response:
    """What became of a request. Background requests that did not arrive have none."""

    request_id: int
    submitted_s: float
    token_times_s: list[float] = field(default_factory=list)
    """When each token was in the caller's hands."""
    token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Options:
    """How to load. What an adapter cannot do it refuses with ValueError."""

    model_folder: str
    """safetensors, config and tokenizer"""
    converted_folder: str
    """where GGUF files and the like of this model lie"""
    weights: str
    """f32, bf16, q8_0 or int8"""
    cores: list[int]
    """the engine's, one thread for each"""
    chunk_tokens: int | None
    """most tokens of one step; None is the engine's own default"""

    @property
    def num_threads(self) -> int:
        return len(self.cores)


class Recorder:
    """Collects one run's responses; may be called from several threads."""

    def __init__(self) -> None:
        self.begin_s = clock_s()
        self._responses: dict[int, Response] = {}

    def submit(self, request_id: int) -> None:
        """The request is handed to the engine now."""
        self._responses[request_id] = Response(request_id, clock_s())

    def receive(self, request_id: int, token_ids: Sequence[int]) -> int:
        """These tokens have arrived now; how many have in all."""
        response = self._responses[request_id]
        now_s = clock_s()
        for token_id in token_ids:
            response.token_times_s.append(now_s)
            response.token_ids.append(int(token_id))
        return len(response.token_ids)

    @property
    def responses(self) -> list[Response]:
        return list(self._responses.values())


class Arrivals:
    """Which requests of a run are due, for engines that are stepped by one loop.

    Args:
        requests: of one run.
        begin_s: the run's begin on the clock.
    """

    def __init__(self, requests: Sequence[Request], begin_s: float) -> None:
        self._waiting = sorted(requests, key=lambda request: request.at_s)
        self._begin_s = begin_s
        self._open_foreground = {request.request_id for request in requests if not request.background}

    def take_due(self, now_s: float) -> list[Request]:
        """Those that arrive now, each once."""
        due = []
        while self._waiting and self._begin_s + self._waiting[0].at_s <= now_s:
            due.append(self._waiting.pop(0))
        return due

    def end(self, request_id: int) -> None:
        """The request has all its tokens. With the last one of the foreground, nothing arrives any
        more.
        """
        self._open_foreground.discard(request_id)
        if not self._open_foreground:
            self._waiting.clear()

    def wait_s(self, now_s: float) -> float | None:
        """Seconds until the next arrival; None when there is none."""
        return max(0.0, self._begin_s + self._waiting[0].at_s - now_s) if self._waiting else None


class Adapter(Protocol):
    """One engine. `run` returns when every request that arrived has all its tokens."""

    def load(self, options: Options) -> str:
        """Loads the model; the engine's version. Raises ValueError for what the engine cannot do."""

    def run(self, requests: Sequence[Request], recorder: Recorder) -> None:
        """Generates; tells the recorder of each submission and of each token."""

    def close(self) -> None:
        """Ends what `load` started."""


class SteppedEngine(Protocol):
    """An engine that computes one step when told to."""

    def add(self, request: Request) -> None:
        """The request takes part from the next step on."""

    def step(self) -> Iterator[tuple[int, Sequence[int]]]:
        """Computes a step: request ids and their new tokens, which may be none."""


def run_stepped(engine: SteppedEngine, requests: Sequence[Request], recorder: Recorder) -> None:
    """`Adapter.run` for a stepped engine."""
    arrivals = Arrivals(requests, recorder.begin_s)
    wanted: dict[int, int] = {}
    while True:
        for request in arrivals.take_due(clock_s()):
            recorder.submit(request.request_id)
            engine.add(request)
            wanted[request.request_id] = request.max_tokens
        if wanted:
            for request_id, token_ids in engine.step():
                num_tokens = recorder.receive(request_id, token_ids)
                if token_ids and num_tokens >= wanted[request_id]:
                    del wanted[request_id]
                    arrivals.end(request_id)
        elif (wait_s := arrivals.wait_s(clock_s())) is not None:
            time.sleep(wait_s)
        else:
            return


def die_with_parent() -> None:
    """This process is killed when its parent ends, even if it is stopped then. Linux only; nothing
    elsewhere.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def use_cores(cores: Sequence[int]) -> None:
    """Binds this process, and what it starts from now on."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, cores)


def serve(adapter: Adapter, lines: TextIO, reply: Callable[[dict[str, Any]], None]) -> None:
    """Obeys the runner until it says close or goes away."""
    try:
        for line in lines:
            message = json.loads(line)
            if message["command"] == "close":
                break
            try:
                reply(_obey(adapter, message))
            except (
                Exception
            ) as error:  # whatever an engine raises is the runner's to report; this is the top of the loop
                traceback.print_exc()
                reply({"error": f"{type(error).__name__}: {error}"})
    finally:
        adapter.close()
    reply({})


def _obey(adapter: Adapter, message: dict[str, Any]) -> dict[str, Any]:
    if message["command"] == "load":
        begin_s = clock_s()
        version = adapter.load(Options(**message["options"]))
        return {"load_s": clock_s() - begin_s, "version": version}
    assert message["command"] == "run", f"no such command: {message['command']}"
    recorder = Recorder()
    adapter.run([Request(**request) for request in message["requests"]], recorder)
    return {"responses": [asdict(response) for response in recorder.responses]}


def main(adapter: Adapter) -> None:
    """The adapter's program."""
    die_with_parent()
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # engines print as they please

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    # Ctrl-C is the runner's business: it ends its adapters.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(adapter, sys.stdin, reply)
