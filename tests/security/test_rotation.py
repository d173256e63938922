"""Certificates, CA and API keys change under 200 streams: none fails, none gets wrong tokens."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from kvrelay.client import TLS, AsyncClient
from kvrelay.cluster.local_cluster import LocalCluster
from kvrelay.config.security_settings import PeerSettings, SecuritySettings
from kvrelay.errors import UnauthenticatedError
from kvrelay.security import certificates
from kvrelay.security.certificates import CertificatePlan
from kvrelay.security.keys import digest_of
from kvrelay.testing.waiting import wait_until
from tests.integration.clusters import cluster_of, engine, random_prompt
from tests.support.tiny_models import make_tiny_model

pytestmark = pytest.mark.integration

NUM_STREAMS = 200
NUM_BUSY_STREAMS = 24
HURRIED_MS = 1500
NUM_PROMPTS = 8
TENANTS = ("north", "east", "south", "west")
LEAVER = "leaver"
PLAN = CertificatePlan("kvrelay.local")
TIMEOUT_S = 240.0


class Load:
    """200 streams at any time; each is compared with the tokens of an undisturbed run."""

    def __init__(self, address: str, tls: TLS, num_streams: int = NUM_STREAMS) -> None:
        self._num_streams = num_streams
        self._clients = [AsyncClient(address, api_key=tenant, tls=tls, timeout_s=TIMEOUT_S) for tenant in TENANTS]
        self._expected: dict[int, list[int]] = {}
        self.num_done = self.num_wrong = self.num_retried = 0
        self.failures: Counter[str] = Counter()
        self._stop = False

    async def _tokens(self, number: int) -> list[int]:
        client = self._clients[number % len(TENANTS)]
        prompt = random_prompt(number % NUM_PROMPTS, 12)
        completion = await client.complete(token_ids=prompt, max_tokens=24, temperature=0, ignore_eos=True)
        self.num_retried += completion.finished.phases.num_attempts > 1
        return [token.token_id for token in completion.outputs[0].tokens]

    async def learn(self) -> None:
        for number in range(NUM_PROMPTS):
            self._expected[number] = await self._tokens(number)
        assert len({tuple(tokens) for tokens in self._expected.values()}) == NUM_PROMPTS

    async def run(self) -> None:
        await asyncio.gather(*map(self._stream, range(self._num_streams)))

    async def _stream(self, number: int) -> None:
        while not self._stop:
            try:
                tokens = await self._tokens(number)
            except Exception as error:
                self.failures[f"{type(error).__name__}: {error}"] += 1
                return
            self.num_done += 1
            self.num_wrong += tokens != self._expected[number % NUM_PROMPTS]

    async def follow(self, num_streams: int | None = None) -> None:
        """Waits until more streams have ended, by default as many as there are."""
        goal = self.num_done + (num_streams or self._num_streams)
        await wait_until(lambda: self.num_done >= goal or bool(self.failures), "more streams end", TIMEOUT_S)

    async def finish(self, running: asyncio.Task[None]) -> None:
        self._stop = True
        await running
        for client in self._clients:
            await client.close()


def write_keys(path: Path, *names: str) -> None:
    entries = [{"id": name, "sha256": digest_of(name), "tenant": name} for name in names]
    new = path.with_suffix(".new")
    new.write_text(yaml.safe_dump({"keys": entries}))
    new.replace(path)


@pytest.fixture
def session_move_ms() -> int:
    return PeerSettings().session_move_ms


@pytest.fixture
async def secured(tmp_path: Path, session_move_ms: int) -> AsyncIterator[tuple[LocalCluster, Path, list[str]]]:
    folder, lines = tmp_path / "certificates", list[str]()
    certificates.make_certificates(folder, PLAN)
    write_keys(tmp_path / "keys.yaml", *TENANTS, LEAVER)
    settings = engine(make_tiny_model("llama", tmp_path / "model"))
    cluster = cluster_of([settings], [settings])
    cluster.tls_folder = str(folder)
    security = SecuritySettings(keys_file=str(tmp_path / "keys.yaml"))
    peers = PeerSettings(session_move_ms=session_move_ms)
    cluster.gateway = cluster.gateway.model_copy(update={"security": security, "peers": peers})
    cluster.on_line = lambda name, line: lines.append(f"{name}: {line}")
    async with cluster:
        yield cluster, folder, lines


async def test_everything_is_swapped_under_200_streams(
    secured: tuple[LocalCluster, Path, list[str]], tmp_path: Path
) -> None:
    cluster, folder, lines = secured
    load = Load(cluster.gateway_address, TLS(ca=folder / "ca.pem"))
    await load.learn()
    running = asyncio.create_task(load.run())
    await load.follow(10)
    for step in (certificates.renew_certificates, certificates.replace_authority):
        step(folder, PLAN)
        await load.follow()
    certificates.forget_earlier_authorities(folder)
    await load.follow()
    await withdraw_a_key(cluster, folder, tmp_path)
    await load.follow()
    await load.finish(running)
    assert (dict(load.failures), load.num_wrong) == ({}, 0)
    # With nothing to do, the sessions move to the new certificates.
    await wait_until(lambda: num_moved(lines) >= 2, "both sessions move", TIMEOUT_S)
    async with AsyncClient(
        cluster.gateway_address, api_key=TENANTS[0], tls=TLS(ca=folder / "ca.pem"), timeout_s=TIMEOUT_S
    ) as client:
        assert (await client.complete(token_ids=random_prompt(0, 12), max_tokens=4)).outputs[0].tokens


@pytest.mark.parametrize("session_move_ms", [HURRIED_MS])
async def test_a_session_that_is_never_idle_moves_at_its_limit_and_no_stream_is_lost(
    secured: tuple[LocalCluster, Path, list[str]],
) -> None:
    cluster, folder, lines = secured
    load = Load(cluster.gateway_address, TLS(ca=folder / "ca.pem"), NUM_BUSY_STREAMS)
    await load.learn()
    running = asyncio.create_task(load.run())
    await load.follow()
    for _ in range(2):
        num_before = num_moved(lines)
        certificates.renew_certificates(folder, PLAN)
        await wait_until(lambda before=num_before: num_moved(lines) >= before + 2, "both sessions move", TIMEOUT_S)  # type: ignore[misc]
        assert not running.done(), "the load still runs"
        await load.follow()
    await load.finish(running)
    assert (dict(load.failures), load.num_wrong) == ({}, 0)
    assert load.num_retried > 0, "no request ran where a session moved: none was forced"


def num_moved(lines: list[str]) -> int:
    return sum("session with worker ended" in line and "the certificates have changed" in line for line in lines)


async def withdraw_a_key(cluster: LocalCluster, folder: Path, tmp_path: Path) -> None:
    tls = TLS(ca=folder / "ca.pem")
    async with AsyncClient(cluster.gateway_address, api_key=LEAVER, tls=tls, timeout_s=TIMEOUT_S) as client:
        prompts = itertools.count()

        async def ask_again_and_again() -> None:
            while True:
                async for _ in client.generate(token_ids=random_prompt(next(prompts), 12), max_tokens=64):
                    pass

        asking = asyncio.create_task(ask_again_and_again())
        await client.complete(token_ids=random_prompt(1, 12), max_tokens=2)
        write_keys(tmp_path / "keys.yaml", *TENANTS)
        with pytest.raises(UnauthenticatedError):
            await asyncio.wait_for(asking, TIMEOUT_S)
        with pytest.raises(UnauthenticatedError):
            await client.complete(token_ids=random_prompt(1, 12), max_tokens=2)
