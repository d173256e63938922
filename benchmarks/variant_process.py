"""An engine as a process that measures when it is told to; `benchmarks.variants` has several of
them take turns.

Reads one JSON object a line and answers each with one. The first says what to load, the others
which case to measure, in how many steps. Runs on the source tree that is its working folder, which
may be an older one: it uses what `bench engine` is made of.
"""

import json
import sys
from collections.abc import Iterable
from typing import Any


def measure_as_told(lines: Iterable[str]) -> None:
    """Until the input ends."""
    from benchmarks.engine_cases import Case, fill_pool, time_case
    from benchmarks.engine_steps import load_engine

    requests = map(json.loads, lines)
    setup: dict[str, Any] = next(requests)
    ours = load_engine(setup["model"], setup["threads"], setup["num_pool_tokens"], **setup["settings"])
    fill_pool(ours)
    _say({"ready": True})
    for request in requests:
        seconds, _ = time_case(ours, Case(*request["case"]), request["steps"])
        _say({"seconds": seconds})


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    measure_as_told(sys.stdin)
