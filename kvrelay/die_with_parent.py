"""Runs a command that the kernel kills when the process that started it dies, however that died. Imports nothing of ours.

    python die_with_parent.py PARENT_PID COMMAND...

It asks for the signal, makes a session of its own (so that a Ctrl-C in the terminal reaches the supervisor only, which then ends
its children in order) and becomes the command by exec; the request for the signal survives that. Doing this in the supervisor,
between fork and exec, would not be safe: gRPC's threads may hold locks at the fork. Where there is no prctl (macOS), children
outlive a parent that is killed.

The kernel counts the death of the *thread* that started the command as the parent's death: start commands from the main thread.
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
        # The parent may have died before the line above; then nobody would ever send the signal.
        if os.getppid() != parent_pid:
            os._exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
