"""An adapter as the runner has it: a process in the peer's environment that is told what to do and
stands still in between.

Knows the protocol of `adapters.adapter_loop` and how processes are stopped; nothing of what is
measured.
"""

import json
import os
import selectors
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from benchmarks.peers.adapters.adapter_loop import Options, Request, Response, clock_s

REPOSITORY = Path(__file__).resolve().parents[2]
LOAD_TIMEOUT_S = 1800.0
"""The first start of a peer compiles for minutes; the runner waits longer than any adapter does."""
RUN_TIMEOUT_S = 900.0
CLOSE_TIMEOUT_S = 30.0
_NUM_LOG_BYTES = 2000


class PeerError(RuntimeError):
    """A peer said that something failed, ended, or did not answer in time. Has the end of what it
    wrote.
    """


class PeerProcess:
    """One running adapter. As a context it is closed at the end, and killed if need be.

    Args:
        command: starts the adapter.
        environment: added to this process's.
        log: file for what the adapter and its engine write.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        self._unread = b""
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env={**os.environ, **environment},
                cwd=REPOSITORY,
                bufsize=0,
                start_new_session=True,  # a Ctrl-C reaches the runner alone, which ends its peers
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self, options: Options) -> Mapping[str, Any]:
        """Loads the model; {"load_s", "version"}. Raises PeerError."""
        return self._ask({"command": "load", "options": asdict(options)}, LOAD_TIMEOUT_S)

    def run(self, requests: Sequence[Request]) -> list[Response]:
        """Runs requests; a response for each that arrived. Raises PeerError."""
        answer = self._ask({"command": "run", "requests": [asdict(request) for request in requests]}, RUN_TIMEOUT_S)
        return [Response(**response) for response in answer["responses"]]

    def pause(self) -> None:
        """Stops the adapter and all that it started, so that it uses no core while others are
        measured.
        """
        for process in self._tree():
            _send(process, signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it go on, children first: a parent must not find that they are silent."""
        for process in reversed(self._tree()):
            _send(process, signal.SIGCONT)

    @property
    def resident_bytes(self) -> int:
        """Memory of the adapter and of all that it started, shared pages counted once for each."""
        return sum(process.memory_info().rss for process in self._tree())

    def close(self) -> None:
        """Ends it and all that it started. Idempotent."""
        if self._process.poll() is None:
            self.resume()
            tree = self._tree()
            try:
                self._ask({"command": "close"}, CLOSE_TIMEOUT_S)
                self._process.wait(CLOSE_TIMEOUT_S)
            except (PeerError, subprocess.TimeoutExpired):
                pass
            for process in tree:
                _send(process, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _ask(self, message: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            # Unbuffered pipes may take a part only.
            unsent = memoryview(json.dumps(message).encode() + b"\n")
            while unsent:
                unsent = unsent[self._process.stdin.write(unsent) :]
        except BrokenPipeError:
            raise self._error("it has ended") from None
        answer: dict[str, Any] = json.loads(self._read_line(timeout_s))
        if "error" in answer:
            raise self._error(answer["error"])
        return answer

    def _read_line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        end_s = clock_s() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(end_s - clock_s()):
                    raise self._error(f"no answer within {timeout_s:g} s")
                part = os.read(self._process.stdout.fileno(), 1 << 20)
                if not part:
                    raise self._error("it has ended")
                self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _error(self, reason: str) -> PeerError:
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - _NUM_LOG_BYTES))
            tail = log.read().decode(errors="replace")
        return PeerError(f"{reason}\n{tail}".strip())

    def _tree(self) -> list[psutil.Process]:
        """The adapter first, then all below it."""
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
