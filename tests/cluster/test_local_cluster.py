"""A local cluster's processes: started, watched, started again, and never left behind. With
stand-ins for gateway and workers.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvrelay.client import Cluster
from kvrelay.cluster import local_cluster, member_settings
from kvrelay.cluster.local_cluster import AnySettings, LocalCluster
from kvrelay.cluster.readiness import ask_cluster
from kvrelay.config.security_settings import SecuritySettings
from kvrelay.config.settings import DecodeSettings, GatewaySettings, PrefillSettings, ServerSettings
from kvrelay.errors import StartupError, UnavailableError
from kvrelay.runtime.cpu_cores import ProcessorShare, format_cores
from kvrelay.runtime.supervision import keep_running
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.state.redis_connection import RedisConnection
from tests.support.fake_cluster import fake_command
from tests.support.fake_worker import FOLDER_VARIABLE, WORKER_VARIABLE
from tests.support.ipv6 import needs_ipv6

FREE_PORT = GatewaySettings().model_copy(update={"server": GatewaySettings().server.model_copy(update={"port": 0})})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
async def no_process_is_left() -> AsyncIterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child not in before]
    assert left == []


def make_cluster(
    *,
    restart: bool = False,
    num_prefill: int = 1,
    num_decode: int = 1,
    startup_timeout_s: float = 90,
    gateway: GatewaySettings = FREE_PORT,
) -> tuple[LocalCluster, list[tuple[str, str]]]:
    lines: list[tuple[str, str]] = []
    cluster = LocalCluster(
        gateway=gateway,
        prefill=[PrefillSettings()],
        decode=[DecodeSettings()] * num_decode,
        restart=restart,
        startup_timeout_s=startup_timeout_s,
        on_line=lambda name, line: lines.append((name, line)),
        command=fake_command,
    )
    return cluster, lines


async def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # processes and files have no event to wait for
            await asyncio.sleep(0.02)


async def test_a_cluster_is_up_when_entered_and_gone_when_left() -> None:
    cluster, lines = make_cluster(num_decode=2)
    async with cluster:
        assert cluster.names == ["gateway", "prefill-0", "decode-0", "decode-1"]
        processes = [psutil.Process(cluster.pid(name)) for name in cluster.names]
        assert cluster.valkey is not None
        processes.append(psutil.Process(cluster.valkey.pid))
        assert len((await cluster.wait_until_ready()).workers) == 3
    assert not any(process.is_running() for process in processes)
    assert ("gateway", "gateway is up") in lines


async def test_a_port_stays_a_process_s_own_while_that_is_away() -> None:
    cluster, _ = make_cluster()
    async with cluster:
        port = cluster.gateway.server.port
        await cluster.kill("gateway")
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        await cluster.start_again("gateway")
        await cluster.wait_until_ready()
    with socket.socket() as other:
        # connections that have just ended do not count
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))


@pytest.mark.parametrize(("is_own_redis", "has_key"), [(True, False), (False, False), (False, True)])
async def test_a_gateway_takes_any_workers_only_at_a_redis_of_others(
    tmp_path: Path, is_own_redis: bool, has_key: bool
) -> None:
    """Workers that join it have no key of the cluster, unless a file is named."""
    cluster, _ = make_cluster()
    told: dict[str, Any] = {}

    def keep(name: str, settings: AnySettings) -> AnySettings:
        told[name] = settings
        return settings

    cluster.adjust = keep
    if has_key:
        key_file = tmp_path.with_suffix(".key")  # beside the folder that the stand-ins look into
        key_file.touch(0o600)
        key_file.write_text("k" * 64)
        security = SecuritySettings(cluster_key_file=str(key_file))
        cluster.gateway = cluster.gateway.model_copy(update={"security": security})
    redis = EmbeddedValkey()
    await redis.start()
    try:
        if not is_own_redis:
            cluster.redis_url = redis.url
        async with cluster:
            assert told["gateway"].peers.any_workers is not (is_own_redis or has_key)
            assert (told["decode-0"].security.cluster_key_file is None) is not is_own_redis
    finally:
        await redis.stop()


async def test_workers_divide_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_settings, "processor_share", lambda: ProcessorShare((0, 1, 4, 5, 6), None))
    cluster, lines = make_cluster(num_decode=1)
    async with cluster:
        pass
    assert ("prefill-0", f"prefill has cores {format_cores((0, 1))}") in lines
    assert ("decode-0", f"decode has cores {format_cores((4, 5, 6))}") in lines


async def test_workers_that_are_more_than_cores_have_a_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_settings, "processor_share", lambda: ProcessorShare((0, 1), None))
    cluster, lines = make_cluster(num_decode=2)
    async with cluster:
        pass
    assert ("prefill-0", "prefill has threads 1") in lines


async def test_a_process_that_ends_while_starting_is_named_with_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKER_VARIABLE, "fail")
    cluster, _ = make_cluster(restart=True)
    with pytest.raises(
        StartupError, match=r"(prefill|decode)-0 ended with code 3 while starting(.|\n)*the model folder is broken"
    ):
        await cluster.start()


async def test_a_cluster_that_does_not_get_ready_is_given_up_after_its_time() -> None:
    cluster, _ = make_cluster(startup_timeout_s=0.001)
    with pytest.raises(StartupError, match=r"not ready within 0\.001 s: its gateway did not answer"):
        await cluster.start()


async def test_a_cluster_that_does_not_get_ready_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    ask, answers = ask_cluster, 0

    async def ask_until_answered(*asked: Any) -> Cluster | None:
        nonlocal answers
        if answers:
            # as if its time were over now: how long a gateway takes until it answers is the
            # machine's
            raise TimeoutError
        answer = await ask(*asked)
        answers += answer is not None
        return answer

    monkeypatch.setattr(local_cluster, "ask_cluster", ask_until_answered)
    monkeypatch.setenv(WORKER_VARIABLE, "silent")
    cluster, _ = make_cluster()
    with pytest.raises(
        StartupError, match="not ready within 90 s: its gateway was connected to 0 prefill and 0 decode workers"
    ):
        await cluster.start()


async def test_a_killed_worker_is_started_again() -> None:
    cluster, lines = make_cluster(restart=True)
    async with cluster:
        first_pid = cluster.pid("decode-0")
        await cluster.kill("decode-0")
        await until(lambda: cluster.num_restarts("decode-0") == 1)
        assert cluster.pid("decode-0") != first_pid
        assert cluster.num_restarts("prefill-0") == 0
        await cluster.wait_until_ready()
    assert any(name == "decode-0" and line.startswith("ended by SIGKILL; starting again in") for name, line in lines)


async def test_a_process_that_hangs_is_killed_and_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKER_VARIABLE, "alive")
    cluster, lines = make_cluster(restart=True)
    cluster.hang_timeout_s = 5.0
    async with cluster:
        await cluster.kill("decode-0", signal.SIGSTOP)
        stopped = psutil.Process(cluster.pid("decode-0"))
        await until(lambda: stopped.status() == psutil.STATUS_STOPPED)
        await until(lambda: cluster.num_restarts("decode-0") == 1)
        assert cluster.num_restarts("prefill-0") == 0, "it goes on giving signs of life"
        assert cluster.num_restarts("gateway") == 0, "it has given none, and so may still be starting"
    assert any(name == "decode-0" and line.startswith("gave no sign of life") for name, line in lines)


async def test_a_killed_valkey_is_started_again_under_the_same_url() -> None:
    cluster, lines = make_cluster(restart=True)
    async with cluster:
        assert cluster.valkey is not None
        url, first_pid = cluster.valkey.url, cluster.valkey.pid
        os.kill(first_pid, signal.SIGKILL)
        await until(lambda: any(name == "valkey" and line.startswith("ended by SIGKILL") for name, line in lines))
        async with RedisConnection(url, timeout_ms=20_000) as connection, asyncio.timeout(60):
            while True:
                with contextlib.suppress(UnavailableError):
                    await connection.ping()
                    break
                await asyncio.sleep(0.05)
        await until(lambda: cluster.valkey is not None and cluster.valkey._process is not None)
        assert cluster.valkey.url == url
        assert cluster.valkey.pid != first_pid


async def test_a_process_that_cannot_be_started_is_tried_again() -> None:
    starts: list[int] = []
    lines: list[str] = []
    endings = iter((3, None))

    async def wait() -> int:
        ending = next(endings)
        return ending if ending is not None else await asyncio.get_running_loop().create_future()

    async def start_again() -> None:
        starts.append(1)
        if len(starts) == 1:
            raise StartupError("no room")

    running = asyncio.create_task(keep_running("it", wait, start_again, lambda _, line: lines.append(line)))
    await until(lambda: len(starts) == 2)
    running.cancel()
    assert lines[0].startswith("ended with code 3; starting again in")
    assert lines[1].startswith("cannot be started (no room); starting again in")


async def test_a_process_that_fails_again_and_again_is_waited_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, lines = make_cluster(restart=True)
    async with cluster:
        environment = cluster._members["decode-0"].environment
        environment[WORKER_VARIABLE] = "fail"
        await cluster.kill("decode-0")
        await until(lambda: sum("starting again" in line for _, line in lines) >= 3)
    delays_s = [float(line.split(" in ")[1].split()[0]) for _, line in lines if "starting again" in line]
    assert delays_s[0] <= 0.5 < delays_s[2]


async def test_without_restart_a_killed_worker_stays_away_and_another_may_be_added(folder: Path) -> None:
    cluster, _ = make_cluster()
    async with cluster:
        await cluster.kill("decode-0")
        name = await cluster.add_worker(DecodeSettings())
        assert name == "decode-1"
        await until(lambda: (folder / f"decode-{cluster.pid(name)}").exists())
        assert cluster.num_restarts("decode-0") == 0


async def test_a_process_that_ignores_sigterm_is_killed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKER_VARIABLE, "stubborn")
    cluster, lines = make_cluster()
    async with cluster:
        pass
    assert any("killed" in line for name, line in lines if name == "decode-0")


async def test_a_taken_port_is_named_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        gateway = FREE_PORT.model_copy(update={"server": FREE_PORT.server.model_copy(update={"port": port})})
        cluster, _ = make_cluster(gateway=gateway)
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{port}.*--port"):
            await cluster.start()


@needs_ipv6
@pytest.mark.parametrize(("host", "own_host"), [("::", "[::1]")])
async def test_a_cluster_on_ipv6_is_reached_there(host: str, own_host: str) -> None:
    gateway = FREE_PORT.model_copy(
        update={"server": FREE_PORT.server.model_copy(update={"host": host, "http_port": 0})}
    )
    cluster, _ = make_cluster(gateway=gateway)
    async with cluster:
        assert cluster.gateway_address.startswith(f"{own_host}:")
        assert cluster.http_addresses["gateway"].startswith(f"{own_host}:")


async def test_workers_beside_a_valkey_of_their_own_are_dialled_on_loopback_whatever_the_hosts_name_is() -> None:
    worker = PrefillSettings(server=ServerSettings(host="0.0.0.0"))
    cluster, _ = make_cluster()
    cluster.prefill = [worker]
    addresses: dict[str, str] = {}

    def note(name: str, settings: AnySettings) -> AnySettings:
        addresses[name] = settings.server.address_of(50051)
        return settings

    cluster.adjust = note
    async with cluster:
        assert addresses["prefill-0"] == "127.0.0.1:50051"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_no_process_outlives_its_supervisor(number: signal.Signals) -> None:
    supervisor = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.fake_cluster", "supervisor", stderr=asyncio.subprocess.PIPE
    )
    assert supervisor.stderr is not None
    try:
        async with asyncio.timeout(90):
            output = b""
            while b"ready" not in output:
                output += await supervisor.stderr.readline()
        children = psutil.Process(supervisor.pid).children(recursive=True)
        assert len(children) == 4  # Valkey, gateway, prefill, decode
        supervisor.send_signal(number)
        rest = await supervisor.stderr.read()
        await supervisor.wait()
        await until(lambda: not any(child.is_running() for child in children))
        if number != signal.SIGKILL:
            assert supervisor.returncode == 0
            assert b"ending" in rest
    finally:
        if supervisor.returncode is None:
            supervisor.kill()
            await supervisor.wait()
