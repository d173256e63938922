"""One process of a fault cluster: signals, faults, measurements."""

import asyncio
import os
import signal
from collections.abc import Mapping
from typing import Any

from kvrelay.cluster.local_cluster import LocalCluster
from kvrelay.runtime.fault_points import FaultAction
from kvrelay.testing.faults import ArmedFault, FaultControl
from kvrelay.testing.process_files import num_connections_to, num_descriptors, resident_bytes, state_of
from kvrelay.testing.proxy import FaultProxy, Link
from kvrelay.testing.waiting import wait_until

SIGNAL_TIMEOUT_S = 30.0
TERMINATE_TIMEOUT_S = 40.0
RESTART_TIMEOUT_S = 60.0


class FaultProcess:
    """A gateway or worker. Its name, such as gateway-1 or decode-0, survives restarts."""

    def __init__(self, name: str, cluster: LocalCluster, control: FaultControl, proxy: FaultProxy) -> None:
        self.name = name
        self.control = control
        self.proxy = proxy
        self._cluster = cluster

    @property
    def pid(self) -> int:
        """Of its current run."""
        return self._cluster.pid(self.name)

    @property
    def state(self) -> str | None:
        """State letter of /proc/PID/stat; None when it is gone."""
        return state_of(self.pid)

    @property
    def is_running(self) -> bool:
        return self.state not in (None, "Z")

    @property
    def num_restarts(self) -> int:
        return self._cluster.num_restarts(self.name)

    @property
    def log_tail(self) -> str:
        return self._cluster.tail(self.name)

    # --- signals ----------------------------------------------------------------------------------

    async def kill(self) -> None:
        """Sends SIGKILL and waits until it is gone."""
        await self._cluster.kill(self.name, signal.SIGKILL)

    async def stop(self) -> None:
        """Sends SIGSTOP and waits until it is stopped."""
        pid = self.pid
        await self._cluster.kill(self.name, signal.SIGSTOP)
        await wait_until(lambda: state_of(pid) == "T", f"{self.name} is stopped", SIGNAL_TIMEOUT_S)

    async def resume(self) -> None:
        """Sends SIGCONT and waits until it runs."""
        pid = self.pid
        await self._cluster.kill(self.name, signal.SIGCONT)
        await wait_until(lambda: state_of(pid) != "T", f"{self.name} goes on", SIGNAL_TIMEOUT_S)

    async def terminate(self, timeout_s: float = TERMINATE_TIMEOUT_S) -> None:
        """Sends SIGTERM and waits until it has drained and ended."""
        pid = self.pid
        await self._cluster.kill(self.name, signal.SIGTERM)
        await wait_until(lambda: state_of(pid) in (None, "Z"), f"{self.name} ends after SIGTERM", timeout_s)

    async def wait_until_gone(self, timeout_s: float = SIGNAL_TIMEOUT_S) -> None:
        """Waits for the end of its current run."""
        pid = self.pid
        await wait_until(lambda: state_of(pid) in (None, "Z"), f"{self.name} is gone", timeout_s)

    async def start_again(self) -> None:
        """Starts it after its end. Does not wait until it serves."""
        await self.wait_until_gone()
        await asyncio.sleep(0)
        await self._cluster.start_again(self.name)

    async def wait_until_restarted(self, num_restarts: int, timeout_s: float = RESTART_TIMEOUT_S) -> None:
        """Waits for one more restart by the supervisor, not until it serves."""
        await wait_until(lambda: self.num_restarts > num_restarts, f"{self.name} is started again", timeout_s)

    def fill_log(self) -> int:
        """Fills the pipe of its log until `drain_log`; returns the bytes."""
        self._cluster.read_output(self.name, False)
        descriptor = os.open(f"/proc/{self.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
        num_bytes = 0
        try:
            while True:
                num_bytes += os.write(descriptor, b"x" * 4095 + b"\n")
        except BlockingIOError:
            return num_bytes
        finally:
            os.close(descriptor)

    def drain_log(self) -> None:
        self._cluster.read_output(self.name, True)

    # --- faults -----------------------------------------------------------------------------------

    def arm(
        self,
        point: str,
        action: FaultAction = FaultAction.KILL,
        *,
        at: int = 1,
        times: int | None = 1,
        match: str = "",
        wait_ms: int = 10_000,
        claim: str | None = None,
    ) -> ArmedFault:
        """Makes it fail at a step; docs/guides/test-your-cluster.md names the steps.

        Args:
            at: which time the step is reached, from now.
            times: how often in a row, over restarts too; None means always.
            match: only where the repr of the step's subject contains this, such as a request id.
            claim: a path. Of all processes with the same one, only the creator of the file fires.
        """
        return self.control.arm(point, action, at=at, times=times, match=match, wait_ms=wait_ms, claim=claim)

    def link_from(self, source: str) -> Link:
        """The link from another process, or from "client"."""
        return self.proxy.link(source)

    # --- looking ----------------------------------------------------------------------------------

    async def snapshot(self) -> Mapping[str, Any]:
        return await self.control.snapshot(self.pid)

    def num_descriptors(self) -> int:
        return num_descriptors(self.pid)

    def num_connections_to(self, port: int) -> int:
        return num_connections_to(self.pid, port)

    def resident_bytes(self) -> int:
        return resident_bytes(self.pid)
