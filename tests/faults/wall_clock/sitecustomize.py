"""Makes the wall clock of a process what a file says: `time.time` is off by the seconds in it.
Loaded by Python at its start.

gRPC reads the clock in Python where it says how much time a call has left, and in C where that call
has its deadline: only one of the two can jump here, and so none does.
"""

import os
import sys
import time

_path = os.environ.get("WALL_CLOCK_OFFSET_FILE")
_true_time = time.time


def _time() -> float:
    assert _path is not None
    # the handler that asks gRPC, whose own code has no frame
    if sys._getframe(1).f_code.co_name == "_deadline":
        return _true_time()
    try:
        with open(_path) as file:
            return _true_time() + float(file.read() or 0)
    except OSError:
        return _true_time()


if _path is not None:
    time.time = _time
