"""An engine that is an HTTP server: started here, asked over loopback with one thread per stream.
Standard library only.
"""

import http.client
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.peers.adapters.adapter_loop import Recorder, Request, clock_s, die_with_parent, use_cores

STARTUP_TIMEOUT_S = 1500.0
RESPONSE_TIMEOUT_S = 600.0
STOP_GRACE_S = 10.0
_POLL_INTERVAL_S = 0.2

Body = dict[str, Any]


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class HttpServer:
    """A server process that answers GET /health with 200 once it is ready.

    Args:
        command: starts it; `{port}` in it stands for its port.
        cores: it is bound to them; this process, its client, is not.
        environment: added to this process's.
    """

    def __init__(self, command: Sequence[str], cores: Sequence[int], environment: Mapping[str, str]) -> None:
        self._port = free_port()

        def prepare() -> None:
            die_with_parent()
            use_cores(cores)

        self._process = subprocess.Popen(
            [part.replace("{port}", str(self._port)) for part in command],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            preexec_fn=prepare,  # this process has one thread
        )

    def wait_until_ready(self) -> None:
        """Raises RuntimeError when it ends instead, TimeoutError when it takes too long."""
        end_s = clock_s() + STARTUP_TIMEOUT_S
        while not self._is_healthy():
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with code {self._process.returncode}")
            if clock_s() > end_s:
                raise TimeoutError(f"the server was not ready within {STARTUP_TIMEOUT_S:g} s")
            time.sleep(_POLL_INTERVAL_S)

    def stream(self, path: str, body: Body) -> Iterator[Body]:
        """Posts a JSON body; the events of the answer as they arrive.

        Raises:
            RuntimeError: the server refused, or ended the answer with an error.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=RESPONSE_TIMEOUT_S)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise RuntimeError(f"{path} answered {answer.status}: {answer.read(500).decode(errors='replace')}")
            for line in answer:
                if not line.startswith(b"data:") or line.startswith(b"data: [DONE]"):
                    continue
                event: Body = json.loads(line.removeprefix(b"data:"))
                if "error" in event:
                    raise RuntimeError(f"{path}: {event['error']}")
                yield event
        finally:
            connection.close()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL."""
        self._process.terminate()
        try:
            self._process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5.0)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def run_threads(
    requests: Sequence[Request], recorder: Recorder, stream: Callable[[Request], Iterator[Sequence[int]]]
) -> None:
    """`Adapter.run` for an engine whose streams are read one by one; `stream` yields a request's
    tokens as they arrive.

    Raises:
        RuntimeError: a stream has another number of tokens than asked for; or whatever `stream`
            raises.
    """
    foreground_ended = threading.Event()

    def follow(request: Request) -> None:
        wait_s = recorder.begin_s + request.at_s - clock_s()
        if request.background:
            if foreground_ended.wait(max(0.0, wait_s)):
                return
        elif wait_s > 0:
            time.sleep(wait_s)
        recorder.submit(request.request_id)
        num_tokens = 0
        for token_ids in stream(request):
            num_tokens = recorder.receive(request.request_id, token_ids)
        if num_tokens != request.max_tokens:
            raise RuntimeError(f"{num_tokens} tokens came instead of {request.max_tokens}")

    with ThreadPoolExecutor(len(requests)) as pool:
        futures = [(request.background, pool.submit(follow, request)) for request in requests]
        try:
            for background, future in futures:
                if not background:
                    future.result()
        finally:
            foreground_ended.set()
        for _, future in futures:
            future.result()
