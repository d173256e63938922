"""An engine that stands in the middle of a step for as long as a test wants."""

import asyncio
import threading
from typing import Any

import pytest

from kvrelay.worker.engine_setup import WorkerEngine

RELEASE_TIMEOUT_S = 60


class HeldSteps:
    def __init__(self, engine: WorkerEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.released = threading.Event()
        run = engine.step_runner.__class__.run

        def held(runner: Any, *arguments: Any) -> Any:
            self.begun.set()
            assert self.released.wait(RELEASE_TIMEOUT_S), "released by the test"
            return run(runner, *arguments)

        monkeypatch.setattr(engine.step_runner.__class__, "run", held)

    async def wait_until_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, RELEASE_TIMEOUT_S)
