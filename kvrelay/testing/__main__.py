"""`python -m kvrelay.testing SCENARIO` runs a scenario and prints its figures; fails after a
loss.
"""

import argparse
import asyncio
import inspect
import json
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from kvrelay.testing.scenarios.detection import detection
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

Scenario = Callable[..., Coroutine[Any, Any, dict[str, Any]]]
SCENARIOS: dict[str, Scenario] = {
    "kill-matrix": kill_matrix,
    "sole-decode-worker": sole_decode_worker,
    "rolling-restart": rolling_restart,
    "zombies": zombies,
    "redis-stopped": redis_stopped,
    "redis-full": redis_full,
    "disconnects": disconnects,
    "detection": detection,
    "overload": overload,
    "withdrawal": withdrawal,
    "random-faults": random_faults,
    "soak": soak,
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvrelay.testing", description=__doc__)
    commands = parser.add_subparsers(dest="scenario", required=True)
    for name, scenario in SCENARIOS.items():
        description = " ".join((scenario.__doc__ or "").split("\n\n")[0].split())
        command = commands.add_parser(name, help=description, description=description)
        for parameter in inspect.signature(scenario).parameters.values():
            flag = "--" + parameter.name.replace("_", "-")
            if isinstance(parameter.default, bool):
                command.add_argument(flag, action="store_true")
            elif isinstance(parameter.default, int | float | str):
                command.add_argument(
                    flag, type=type(parameter.default), default=parameter.default, help="default: %(default)s"
                )
    options = vars(parser.parse_args(arguments))
    name = options.pop("scenario")
    figures = asyncio.run(SCENARIOS[name](**options))
    figures.pop("_report", None)
    print(json.dumps({"scenario": name, **figures}, indent=1))
    return 1 if any(figures.get(name) for name in ("failed", "wrong", "stored_wrong", "not_stored")) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
