"""The long scenarios, in a size that a soak can afford; docs/reliability.md has the figures of the full ones."""

import pytest

from kvrelay.testing.__main__ import main
from kvrelay.testing.scenarios.disconnects import disconnects
from kvrelay.testing.scenarios.kill_matrix import kill_matrix, rolling_restart, sole_decode_worker, zombies
from kvrelay.testing.scenarios.redis_stopped import redis_stopped

pytestmark = [pytest.mark.integration, pytest.mark.soak, pytest.mark.timeout(3000)]


async def test_kill_matrix() -> None:
    figures = await kill_matrix()
    figures["_report"].check()
    assert figures["kills"] >= 2
    assert figures["retried"] > 0


async def test_sole_decode_worker() -> None:
    figures = await sole_decode_worker()
    figures["_report"].check()
    assert figures["kills"] == 3


async def test_rolling_restart() -> None:
    figures = await rolling_restart()
    figures["_report"].check()
    assert figures["restarts"] >= 6


async def test_zombies() -> None:
    figures = await zombies(num_stops=20)
    figures["_report"].check()
    assert figures["stops"] == 20
    assert figures["retried"] > 0


async def test_redis_stopped() -> None:
    figures = await redis_stopped()
    figures["_report"].check()
    assert figures["recovery_s"] < 1.0


async def test_disconnects() -> None:
    figures = await disconnects()
    assert figures["points"] >= 12
    assert figures["p99_ms"] < 250


def test_the_command_names_every_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "kill-matrix" in capsys.readouterr().out
