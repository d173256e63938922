"""Which models can be asked for: those of connected workers, and for a while those whose workers are away. Knows no request."""

import asyncio
from collections.abc import Callable, Iterable

from gateway.request_validation import ModelLimits, select_model
from gateway.router import WorkerView
from kvrelay.errors import ModelNotFoundError
from kvrelay.worker_registry import Member, MemberRole

MEMORY_S = 600.0
"""How long a model is remembered whose decode workers are all gone: they may be restarting."""
MAX_REMEMBERED = 64


class ServedModels:
    """Models by name.

    Args:
        views: the connected workers now.
        members: the workers with a lease now.
    """

    def __init__(self, views: Callable[[], Iterable[WorkerView]], members: Callable[[], Iterable[Member]]) -> None:
        self._views = views
        self._members = members
        self._remembered: dict[str, tuple[float, ModelLimits]] = {}
        self._changed = asyncio.Event()

    def note_workers_changed(self) -> None:
        """A worker was connected."""
        now = asyncio.get_running_loop().time()
        for limits in self.connected():
            self._remembered[limits.model.name] = (now, limits)
        while len(self._remembered) > MAX_REMEMBERED:
            self._remembered.pop(next(iter(self._remembered)))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def connected(self) -> list[ModelLimits]:
        """Models that a connected decode worker serves, by name; of several versions the one with the most workers."""
        by_version: dict[tuple[str, str], list[WorkerView]] = {}
        for view in self._views():
            if view.role is MemberRole.DECODE:
                by_version.setdefault((view.model.name, view.model.fingerprint), []).append(view)
        chosen: dict[str, list[WorkerView]] = {}
        for (name, _), views in sorted(by_version.items()):
            if len(views) > len(chosen.get(name, ())):
                chosen[name] = views
        # The prompt must fit wherever it is put, also after a fault.
        return [ModelLimits(views[0].model, min(view.max_sequence_tokens for view in views)) for views in chosen.values()]

    def select(self, name: str) -> ModelLimits:
        """The model of that name; the only one when the name is empty.

        Raises:
            ModelNotFoundError: neither connected nor remembered.
            InvalidRequestError: the name is empty and several are served.
        """
        now = asyncio.get_running_loop().time()
        known = {limits.model.name: limits for seen, limits in self._remembered.values() if now - seen < MEMORY_S}
        connected = {limits.model.name: limits for limits in self.connected()}
        self._remembered |= {model_name: (now, limits) for model_name, limits in connected.items()}
        if not name and connected:
            return select_model(name, connected.values())
        return select_model(name, (known | connected).values())

    async def wait_and_select(self, name: str, timeout_s: float) -> ModelLimits:
        """The same, but waits for workers that have a lease and are not connected yet.

        Raises:
            ModelNotFoundError, InvalidRequestError: as `select`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    changed = self._changed
                    try:
                        return self.select(name)
                    except ModelNotFoundError:
                        if not self._is_announced(name):
                            raise
                    await changed.wait()
        except TimeoutError:
            return self.select(name)

    def _is_announced(self, name: str) -> bool:
        """Whether a worker with a lease says that it serves the model."""
        return any(member.role is MemberRole.DECODE and name in ("", member.model) for member in self._members())
