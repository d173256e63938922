"""Stand-ins for the gateway and the workers, as processes of their own, so that LocalCluster is tested without models.

    python -m tests.fake_cluster gateway|prefill|decode     one of them; what it does is said by FAKE_* variables
    python -m tests.fake_cluster supervisor                 `serve all` with them

Fake workers announce themselves by a file in FAKE_FOLDER; the fake gateway reports those files as connected workers.
"""

import asyncio
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from kvrelay import rpc
from kvrelay.cli.supervisor import LogPrinter, run_until_signal
from kvrelay.config import GatewaySettings
from kvrelay.local_cluster import LocalCluster, Role
from kvrelay.settings_sources import read_sources
from kvrelay.signs_of_life import showing_life
from kvrelay.v1 import inference_pb2, inference_pb2_grpc
from tests.fake_inference_service import FakeInferenceService

FOLDER_VARIABLE = "FAKE_FOLDER"
WORKER_VARIABLE = "FAKE_WORKER"
ROLES = {"prefill": inference_pb2.WORKER_ROLE_PREFILL, "decode": inference_pb2.WORKER_ROLE_DECODE}


def fake_command(role: Role) -> list[str]:
    return [sys.executable, "-m", "tests.fake_cluster", role]


class FakeGateway(FakeInferenceService):
    """Reports the workers' files."""

    async def GetCluster(self, request: Any, context: Any) -> Any:
        names = os.listdir(os.environ[FOLDER_VARIABLE])
        workers = [inference_pb2.WorkerInfo(worker_id=name, role=ROLES[name.partition("-")[0]], connected=True) for name in names]
        return inference_pb2.GetClusterResponse(gateway_id="fake", workers=workers)


async def run_gateway() -> None:
    settings = read_sources({}).load("gateway", GatewaySettings).server
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = rpc.create_server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(FakeGateway(), server)
    bound = rpc.bind_server(server, settings.host, settings.port, [])
    await server.start()
    await bound.set_serving(True)
    print("gateway is up", flush=True)
    await stop.wait()
    await server.stop(0)


async def keep_showing_life(shown: threading.Event) -> None:
    async with showing_life(os.environ["KVRELAY_WATCHDOG_SOCKET"]):
        await asyncio.sleep(0)
        shown.set()
        await asyncio.Event().wait()


def run_worker(role: str) -> None:
    behaviour = os.environ.get(WORKER_VARIABLE, "")
    print(f"{role} has threads {os.environ.get('KVRELAY_NUM_THREADS')}", flush=True)
    print(f"{role} has cores {os.environ.get('KVRELAY_CORES')}", flush=True)
    if behaviour == "fail":
        print("the model folder is broken", file=sys.stderr)
        sys.exit(3)
    if behaviour == "alive":
        shown = threading.Event()
        threading.Thread(target=asyncio.run, args=(keep_showing_life(shown),), daemon=True).start()
        shown.wait()
    announcement = Path(os.environ[FOLDER_VARIABLE]) / f"{role}-{os.getpid()}"
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        if behaviour != "silent":
            announcement.touch()
        while True:
            time.sleep(60)
    finally:
        announcement.unlink(missing_ok=True)


async def run_supervisor() -> None:
    printer = LogPrinter(Console(file=sys.stderr))
    gateway = read_sources({"port": "0"}).load("gateway", GatewaySettings)
    await run_until_signal(LocalCluster(gateway=gateway, command=fake_command, on_line=printer, restart=True), printer)


if __name__ == "__main__":
    if sys.argv[1] == "gateway":
        asyncio.run(run_gateway())
    elif sys.argv[1] == "supervisor":
        asyncio.run(run_supervisor())
    else:
        run_worker(sys.argv[1])
