"""Stand-in processes for gateway and workers, to test LocalCluster without models.

python -m tests.support.fake_cluster gateway        shows fake workers' files as connected workers
python -m tests.support.fake_cluster supervisor     `serve all` with them
"""

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from kvrelay.config.settings import GatewaySettings
from kvrelay.config.sources import read_sources
from kvrelay.network import rpc
from kvrelay.v1 import inference_pb2, inference_pb2_grpc
from tests.support.fake_inference_service import FakeInferenceService
from tests.support.fake_worker import FOLDER_VARIABLE

if TYPE_CHECKING:
    from kvrelay.cluster.local_cluster import Role

ROLES = {"prefill": inference_pb2.WORKER_ROLE_PREFILL, "decode": inference_pb2.WORKER_ROLE_DECODE}


def fake_command(role: "Role") -> list[str]:
    return [
        sys.executable,
        "-m",
        "tests.support.fake_cluster" if role == "gateway" else "tests.support.fake_worker",
        role,
    ]


class FakeGateway(FakeInferenceService):
    """Reports the workers' files."""

    async def GetCluster(self, request: Any, context: Any) -> Any:
        names = os.listdir(os.environ[FOLDER_VARIABLE])
        workers = [
            inference_pb2.WorkerInfo(worker_id=name, role=ROLES[name.partition("-")[0]], connected=True)
            for name in names
        ]
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


async def run_supervisor() -> None:
    # Imported here, because gateways are processes that start faster without it.
    from rich.console import Console

    from kvrelay.cli.serve.supervisor import LogPrinter, run_until_signal
    from kvrelay.cluster.local_cluster import LocalCluster

    printer = LogPrinter(Console(file=sys.stderr))
    gateway = read_sources({"port": "0"}).load("gateway", GatewaySettings)
    await run_until_signal(LocalCluster(gateway=gateway, command=fake_command, on_line=printer, restart=True), printer)


if __name__ == "__main__":
    if sys.argv[1] == "gateway":
        asyncio.run(run_gateway())
    else:
        asyncio.run(run_supervisor())
