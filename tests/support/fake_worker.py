"""A stand-in process for a worker: `python -m tests.support.fake_worker prefill|decode`.

Announces itself by a file in FAKE_FOLDER, then does what FAKE_WORKER says. Imports almost nothing,
so that it starts at once.
"""

import asyncio
import os
import signal
import sys
import threading
import time
from pathlib import Path

FOLDER_VARIABLE = "FAKE_FOLDER"
WORKER_VARIABLE = "FAKE_WORKER"


async def keep_showing_life(shown: threading.Event) -> None:
    from kvrelay.runtime.watchdog import send_keepalives

    async with send_keepalives(os.environ["KVRELAY_WATCHDOG_SOCKET"]):
        await asyncio.sleep(0)
        shown.set()
        await asyncio.Event().wait()


def run_worker(role: str) -> None:
    behaviour = os.environ.get(WORKER_VARIABLE, "")
    print(f"{role} has threads {os.environ.get('KVRELAY_NUM_THREADS')}", flush=True)
    print(f"{role} has cores {os.environ.get('KVRELAY_CORES')}", flush=True)
    if behaviour == "fail":
        print("the model folder is broken", file=sys.stderr)
        sys.exit(3)
    if behaviour == "alive":
        shown = threading.Event()
        threading.Thread(target=asyncio.run, args=(keep_showing_life(shown),), daemon=True).start()
        shown.wait()
    announcement = Path(os.environ[FOLDER_VARIABLE]) / f"{role}-{os.getpid()}"
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        if behaviour != "silent":
            announcement.touch()
        while True:
            time.sleep(60)
    finally:
        announcement.unlink(missing_ok=True)


if __name__ == "__main__":
    run_worker(sys.argv[1])
