"""Containers' commands as processes on loopback, where there is neither Docker nor Kubernetes."""

import json
import os
import random
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from kvrelay.runtime.child_process import ChildProcess

CALM = {"KVRELAY_REDIS_TIMEOUT_MS": "5000", "KVRELAY_LIVENESS_WINDOW_MS": "5000"}
HERE = {"KVRELAY_LOG_FORMAT": "json", "KVRELAY_HTTP_PORT": "0", "KVRELAY_ADVERTISE_ADDRESS": "127.0.0.1"}
ENGINE = {"KVRELAY_DTYPE": "float32", "KVRELAY_KV_CACHE_MIB": "16", "KVRELAY_KERNELS": "off"}


class ContainerProcesses(ABC):
    """Of kvrelay, and `redis`."""

    def __init__(self) -> None:
        self.redis_port = random.randrange(10_000, 32_768)
        self._lines: dict[str, list[str]] = {}

    @abstractmethod
    def arguments(self, name: str) -> Sequence[str]:
        """As they stand in the container's description."""

    @abstractmethod
    def variables(self, name: str) -> dict[str, str]:
        """With this machine's paths and ports."""

    @abstractmethod
    def here(self, name: str, text: str) -> str:
        """Paths and addresses of this machine in place of the container's; ports stay."""

    @asynccontextmanager
    async def running(self, name: str) -> AsyncIterator[ChildProcess]:
        command = [self.with_own_port(name, each) for each in self.arguments(name)]
        if name != "redis":
            command = [sys.executable, "-m", "kvrelay.cli", *command]
        lines = self._lines.setdefault(name, [])
        process = ChildProcess(name, command, self.environment(name), lambda _, line: lines.append(line))
        await process.start()
        try:
            yield process
        finally:
            await process.stop(10)

    def ready(self, name: str) -> dict[str, Any] | None:
        """What a process says of its ports once it serves."""
        documents = [json.loads(line) for line in self._lines[name] if line.startswith("{")]
        return next((each for each in documents if each["event"] == "ready"), None)

    def output(self) -> str:
        return "\n".join(f"{name}: {line}" for name, lines in self._lines.items() for line in lines[-20:])

    def environment(self, name: str) -> dict[str, str]:
        of_test = {name: value for name, value in os.environ.items() if not name.startswith("KVRELAY_")}
        engine = ENGINE if name in ("prefill", "decode") else {}
        return {**of_test, **self.variables(name), **CALM, **HERE, **engine, "KVRELAY_LOCAL_PREFILL_TOKENS": "0"}

    def with_own_port(self, name: str, text: str) -> str:
        text = self.here(name, text)
        if name == "redis":
            return str(self.redis_port) if text == "6379" else text.replace("0.0.0.0", "127.0.0.1")
        return "0" if re.fullmatch(r"5005\d|8000", text) else text
