"""The long scenarios, in a size that a soak can afford; docs/reference/reliability.md has the
figures of the full ones.
"""

from typing import Any

import pytest

from kvrelay.testing.__main__ import main
from kvrelay.testing.scenarios.detection import HARMS, detection
from kvrelay.testing.scenarios.disconnects import disconnects
from kvrelay.testing.scenarios.kill_matrix import kill_matrix
from kvrelay.testing.scenarios.overload import overload
from kvrelay.testing.scenarios.random_faults import random_faults
from kvrelay.testing.scenarios.redis_stopped import redis_full, redis_stopped
from kvrelay.testing.scenarios.rolling_restart import rolling_restart
from kvrelay.testing.scenarios.soak import soak
from kvrelay.testing.scenarios.sole_decode_worker import sole_decode_worker
from kvrelay.testing.scenarios.withdrawal import withdrawal
from kvrelay.testing.scenarios.zombies import zombies

pytestmark = [pytest.mark.integration, pytest.mark.soak, pytest.mark.timeout(3000)]

WITHDRAWN_MS = 3000
"""Most time until every gateway refuses a withdrawn key."""


both_modes = pytest.mark.parametrize("secured", [False, True], ids=["plain", "secured"])
"""As it starts by default, and with everything switched on that protects it."""


@both_modes
async def test_kill_matrix(secured: bool) -> None:
    figures = await kill_matrix(secured=secured)
    figures["_report"].check()
    assert figures["kills"] >= 2
    assert figures["retried"] > 0


async def test_sole_decode_worker() -> None:
    figures = await sole_decode_worker()
    figures["_report"].check()
    assert figures["kills"] == 3
    assert figures["retried"] > 0


@both_modes
async def test_rolling_restart(secured: bool) -> None:
    figures = await rolling_restart(num_rounds=1, secured=secured)
    figures["_report"].check()
    assert figures["restarts"] == 6
    check_stored(figures)


async def test_zombies() -> None:
    figures = await zombies(num_stops=20)
    figures["_report"].check()
    assert figures["stops"] == 20
    assert figures["stops_by_role"].keys() == {"decode", "prefill", "gateway"}
    assert figures["retried"] > 0
    check_stored(figures)


@both_modes
async def test_redis_stopped(secured: bool) -> None:
    figures = await redis_stopped(redis_timeout_ms=2000, secured=secured)
    figures["_report"].check()
    assert figures["ended_meanwhile"] > 0
    check_stored(figures)


async def test_redis_full() -> None:
    figures = await redis_full(redis_timeout_ms=2000)
    figures["_report"].check()
    assert figures["refused"] > 0
    check_stored(figures)


def check_stored(figures: dict[str, Any]) -> None:
    """Redis has all outputs as the clients got them."""
    assert figures["stored"] > 0
    assert (figures["stored_wrong"], figures["not_stored"]) == (0, 0)


async def test_disconnects() -> None:
    figures = await disconnects()
    assert figures["points"] >= 12
    assert figures["p99_ms"] < 250


async def test_detection() -> None:
    figures = await detection(num_rounds=1)
    assert figures["losses"] == 2 * len(HARMS)
    assert figures["killed_worst_ms"] < 200
    assert max(figures[f"{kind}_worst_ms"] for kind in HARMS) < 2000


async def test_withdrawal() -> None:
    figures = await withdrawal(num_rounds=3)
    assert figures["withdrawals"] == 3
    assert figures["stream_ended_worst_ms"] < WITHDRAWN_MS
    assert figures["refused_worst_ms"] < WITHDRAWN_MS


async def test_overload() -> None:
    # Longer requests than the default: what a refusal costs the client is not to count here.
    figures = await overload(seconds=10.0, num_tokens=300)
    assert figures["goodput_share"] >= 0.9
    assert figures["refused"] > 0
    assert (figures["refused_without_retry_info"], figures["failed"]) == (0, 0)


@both_modes
async def test_random_faults(secured: bool) -> None:
    num_retried = 0
    for seed in range(5):  # on a fast machine, few faults meet 300 streams
        figures = await random_faults(num_streams=300, seed=seed, secured=secured)
        check_streams(figures)
        if num_retried := figures["retried"]:
            break
    assert num_retried > 0


async def test_soak() -> None:
    figures = await soak(minutes=1.0, num_warm_up_streams=100)
    check_streams(figures)
    assert figures["growth_percent"].keys() == {"gateway", "prefill-0", "decode-0"}


def check_streams(figures: dict[str, Any]) -> None:
    """Streams under random faults, and no violation."""
    assert figures["streams"] > 0
    assert figures["faults"] > 0
    assert (figures["errors"], figures["violations"]) == ({}, [])


def test_the_command_names_every_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "kill-matrix" in capsys.readouterr().out
