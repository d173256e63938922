"""Makes the wall clock of a process what a file says: `time.time` is off by the seconds in it. Loaded by Python at its start."""

import os
import time

_path = os.environ.get("WALL_CLOCK_OFFSET_FILE")
_true_time = time.time


def _time() -> float:
    assert _path is not None
    try:
        with open(_path) as file:
            return _true_time() + float(file.read() or 0)
    except OSError:
        return _true_time()


if _path is not None:
    time.time = _time
