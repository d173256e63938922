"""Models of connected workers, and of workers recently away."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gateway.routing.router import WorkerView
from kvrelay.core.bounds import check_length
from kvrelay.core.member import Member, MemberRole
from kvrelay.core.model_spec import ModelSpec
from kvrelay.core.quoting import quoted, shortened
from kvrelay.errors import InvalidRequestError, ModelNotFoundError

MEMORY_S = 600.0
"""How long a model without decode workers is remembered: they may be restarting."""
MAX_REMEMBERED = 64
MAX_LISTED_CHARACTERS = 500


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """A model, and the longest sequence that all its workers can hold."""

    model: ModelSpec
    max_sequence_tokens: int

    @property
    def max_tokens(self) -> int:
        """Prompt and output together."""
        return min(self.model.max_context_tokens, self.max_sequence_tokens)


def select_model(name: str, served: Iterable[ModelLimits]) -> ModelLimits:
    """An empty name selects the only model.

    Raises:
        ModelNotFoundError: not served.
        InvalidRequestError: no name, and several are served, or a name that is too long.
    """
    check_length("model", name)
    by_name = {limits.model.name: limits for limits in served}
    names = shortened(", ".join(sorted(by_name)), MAX_LISTED_CHARACTERS)
    if not by_name:
        raise ModelNotFoundError("no model is served now: start workers, or wait until they are up")
    if not name:
        if len(by_name) > 1:
            raise InvalidRequestError("model", f"is empty, and several models are served: name one of {names}")
        return next(iter(by_name.values()))
    if name not in by_name:
        raise ModelNotFoundError(f"model {quoted(name)} is not served; these are: {names}")
    return by_name[name]


class ServedModels:
    def __init__(self, views: Callable[[], Iterable[WorkerView]], members: Callable[[], Iterable[Member]]) -> None:
        self._views = views
        self._members = members
        self._remembered: dict[str, tuple[float, ModelLimits]] = {}
        self._changed = asyncio.Event()

    def on_workers_changed(self) -> None:
        now = asyncio.get_running_loop().time()
        for limits in self.connected():
            self._remembered[limits.model.name] = (now, limits)
        while len(self._remembered) > MAX_REMEMBERED:
            self._remembered.pop(next(iter(self._remembered)))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def connected(self) -> list[ModelLimits]:
        """Returns, of a model's versions, the one with most workers."""
        by_version: dict[tuple[str, str], list[WorkerView]] = {}
        for view in self._views():
            if view.role is MemberRole.DECODE:
                by_version.setdefault((view.model.name, view.model.fingerprint), []).append(view)
        chosen: dict[str, list[WorkerView]] = {}
        for (name, _), views in sorted(by_version.items()):
            if len(views) > len(chosen.get(name, ())):
                chosen[name] = views
        # The prompt must fit every worker, because a fault may move it to any of them.
        return [
            ModelLimits(views[0].model, min(view.max_sequence_tokens for view in views)) for views in chosen.values()
        ]

    def select(self, name: str) -> ModelLimits:
        """As `select_model`, also among remembered models."""
        now = asyncio.get_running_loop().time()
        known = {limits.model.name: limits for seen, limits in self._remembered.values() if now - seen < MEMORY_S}
        connected = {limits.model.name: limits for limits in self.connected()}
        self._remembered |= {model_name: (now, limits) for model_name, limits in connected.items()}
        if not name and connected:
            return select_model(name, connected.values())
        return select_model(name, (known | connected).values())

    async def wait_and_select(self, name: str, timeout_s: float) -> ModelLimits:
        """Like `select`, but waits for workers that have a lease and no session yet."""
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
        return any(member.role is MemberRole.DECODE and name in ("", member.model) for member in self._members())
