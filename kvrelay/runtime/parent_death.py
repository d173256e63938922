"""Runs a command that the kernel kills when the process that started it dies.

    python parent_death.py PARENT_PID COMMAND...

It is a process because gRPC's threads may hold locks between fork and exec. Start it from the main
thread: the kernel watches the starting *thread*. Without prctl (macOS), children survive.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent_pid, command = int(sys.argv[1]), sys.argv[2:]
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # If the parent died before the line above, the kernel never sends the signal.
        if os.getppid() != parent_pid:
            os._exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
