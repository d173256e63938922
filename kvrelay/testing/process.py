"""One process of a fault cluster: signals, named faults, and what is in front of it."""

import asyncio
import os
import signal
from collections.abc import Mapping
from typing import Any

from kvrelay.fault_points import FaultAction
from kvrelay.local_cluster import LocalCluster
from kvrelay.testing.faults import ArmedFault, FaultControl
from kvrelay.testing.process_files import num_connections_to, num_descriptors, resident_bytes, state_of
from kvrelay.testing.proxy import FaultProxy, Link
from kvrelay.testing.waiting import wait_until

SIGNAL_TIMEOUT_S = 10.0
TERMINATE_TIMEOUT_S = 40.0
RESTART_TIMEOUT_S = 60.0


class FaultProcess:
    """A gateway or worker by its name, which stays the same over restarts.

    Args:
        name: gateway, gateway-1, prefill-0, decode-0, ...
        cluster: that started it.
        control: of its fault points.
        proxy: in front of it.
    """

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
        """State letter in /proc/PID/stat; None when it is gone."""
        return state_of(self.pid)

    @property
    def is_running(self) -> bool:
        return self.state not in (None, "Z")

    @property
    def num_restarts(self) -> int:
        return self._cluster.num_restarts(self.name)

    @property
    def log_tail(self) -> str:
        """The end of its output."""
        return self._cluster.tail(self.name)

    # --- signals --------------------------------------------------------------------------------------------------------------

    async def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        await self._cluster.kill(self.name, signal.SIGKILL)

    async def stop(self) -> None:
        """SIGSTOP; returns when it is in state T."""
        pid = self.pid
        await self._cluster.kill(self.name, signal.SIGSTOP)
        await wait_until(lambda: state_of(pid) == "T", f"{self.name} is stopped", SIGNAL_TIMEOUT_S)

    async def resume(self) -> None:
        """SIGCONT; returns when it is no more in state T."""
        pid = self.pid
        await self._cluster.kill(self.name, signal.SIGCONT)
        await wait_until(lambda: state_of(pid) != "T", f"{self.name} goes on", SIGNAL_TIMEOUT_S)

    async def terminate(self, timeout_s: float = TERMINATE_TIMEOUT_S) -> None:
        """SIGTERM; returns when it has drained and ended."""
        pid = self.pid
        await self._cluster.kill(self.name, signal.SIGTERM)
        await wait_until(lambda: state_of(pid) in (None, "Z"), f"{self.name} ends after SIGTERM", timeout_s)

    async def wait_until_gone(self, timeout_s: float = SIGNAL_TIMEOUT_S) -> None:
        """Waits until its current run has ended, by a fault for instance."""
        pid = self.pid
        await wait_until(lambda: state_of(pid) in (None, "Z"), f"{self.name} is gone", timeout_s)

    async def start_again(self) -> None:
        """Starts it anew after its end, in a cluster that does not restart by itself. Does not wait until it serves."""
        await self.wait_until_gone()
        await asyncio.sleep(0)
        await self._cluster.start_again(self.name)

    async def wait_until_restarted(self, num_restarts: int, timeout_s: float = RESTART_TIMEOUT_S) -> None:
        """Waits until the supervisor has started it once more than so often; does not wait until it serves."""
        await wait_until(lambda: self.num_restarts > num_restarts, f"{self.name} is started again", timeout_s)

    def fill_log(self) -> int:
        """Makes the pipe full that the process logs into, until `drain_log`; how many bytes it took."""
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
        """Reads its output again."""
        self._cluster.read_output(self.name, True)

    # --- faults ---------------------------------------------------------------------------------------------------------------

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
        """Makes the process fail when it reaches a step; docs/reliability.md names the steps.

        Args:
            point: the step, such as decode.step_begins.
            action: what happens.
            at: at which time it is reached, counted from now.
            times: how often it happens in a row, over restarts too; None: for ever.
            match: counts only where it is about something whose repr has this in it, such as a request's id or tenant.
            wait_ms: most time of FaultAction.WAIT.
            claim: path of a file; of the processes that have the same, only the one fires that makes it.
        """
        return self.control.arm(point, action, at=at, times=times, match=match, wait_ms=wait_ms, claim=claim)

    def link_from(self, source: str) -> Link:
        """What passes between another process, by its name, and this one; "client" for clients of a gateway."""
        return self.proxy.link(source)

    # --- looking --------------------------------------------------------------------------------------------------------------

    async def snapshot(self) -> Mapping[str, Any]:
        """Tasks, live objects and threads; see `FaultControl.snapshot`."""
        return await self.control.snapshot(self.pid)

    def num_descriptors(self) -> int:
        return num_descriptors(self.pid)

    def num_connections_to(self, port: int) -> int:
        """Established TCP connections to this port of any host."""
        return num_connections_to(self.pid, port)

    def resident_bytes(self) -> int:
        return resident_bytes(self.pid)
