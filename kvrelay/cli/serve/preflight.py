"""Finds everything that is missing before a process starts or a model is fetched."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from kvrelay.config.settings import DecodeSettings, EngineSettings, GatewaySettings, PrefillSettings, ServerSettings
from kvrelay.errors import KvrelayError, StartupError
from kvrelay.models.store import ModelStore, default_model_dir
from kvrelay.network.listening import check_port
from kvrelay.runtime.extras import missing_extra, missing_libraries

_NEEDED_TO_RUN = {"torch", "transformers", "safetensors", "numpy"}
"""The other libraries of the extra `worker` only convert models."""


class Preflight:
    """Collects problems: `checks.ports(...)`, `checks.models(...)`, then `checks.raise_problems()`."""

    def __init__(self) -> None:
        self._problems: list[str] = []

    def raise_problems(self) -> None:
        """Raises one StartupError with all problems."""
        problems = list(dict.fromkeys(self._problems))
        if len(problems) == 1:
            raise StartupError(problems[0])
        if problems:
            raise StartupError(
                "".join([f"{len(problems)} things are in the way:", *(f"\n  - {each}" for each in problems)])
            )

    def libraries(self, extra: str, what: str, only: Iterable[str] | None = None) -> None:
        missing = [library for library in missing_libraries(extra) if only is None or library in only]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            self._problems.append(
                f"{what} needs {' and '.join(missing)}, which {verb} not installed; {missing_extra(extra)}"
            )

    def worker_libraries(self) -> None:
        self.libraries("worker", "a worker", _NEEDED_TO_RUN)

    def valkey(self) -> None:
        from kvrelay.state.embedded_valkey import find_binary

        self._collect(find_binary)

    def ports(self, host: str, ports: Iterable[tuple[str, int | None]]) -> None:
        """Each is free and used once. `ports` pairs flags with ports."""
        chosen: dict[int, str] = {}
        for flag, port in ports:
            if not port:
                continue
            if port in chosen:
                self._problems.append(f"{chosen[port]} and {flag} are both {port}; choose another, or 0 for a free one")
                continue
            chosen[port] = flag
            self._check_port(host, port, flag)

    def models(self, engines: Iterable[EngineSettings], *, makes_demo: bool = True) -> None:
        """Each is here or can be made from files here. Asks no hub."""
        for engine in engines:
            store = store_of(engine)
            self._collect(lambda store=store, name=engine.model: store.check(name, makes_demo=makes_demo))  # type: ignore[misc]

    def redis_url(self, settings: ServerSettings) -> None:
        self._collect(settings.required_redis_url)

    def _check_port(self, host: str, port: int, flag: str) -> None:
        self._collect(lambda: check_port(host, port, flag))

    def _collect(self, check: Callable[[], object]) -> None:
        try:
            check()
        except KvrelayError as error:
            self._problems.append(error.message)


def check_cluster(
    gateway: GatewaySettings,
    prefill: Iterable[PrefillSettings],
    decode: Iterable[DecodeSettings],
    redis_url: str | None,
    openai_port: int | None,
) -> None:
    """Raises StartupError with everything that is missing."""
    checks = Preflight()
    checks.worker_libraries()
    if openai_port is not None:
        checks.libraries("openai", "--openai-port")
    if redis_url is None:
        checks.valkey()
    server = gateway.server
    checks.ports(
        server.host, [("--port", server.port), ("--http-port", server.http_port), ("--openai-port", openai_port)]
    )
    checks.models([*(each.engine for each in prefill), *(each.engine for each in decode)])
    checks.raise_problems()


def check_worker(settings: PrefillSettings | DecodeSettings) -> None:
    """Raises as `check_cluster`."""
    checks = Preflight()
    checks.worker_libraries()
    checks.redis_url(settings.server)
    server = settings.server
    checks.ports(server.host, [("--port", server.port), ("--http-port", server.http_port)])
    checks.models([settings.engine], makes_demo=False)
    checks.raise_problems()


def store_of(settings: EngineSettings) -> ModelStore:
    if settings.model_dir:
        return ModelStore(Path(os.path.expanduser(settings.model_dir)))
    return ModelStore(default_model_dir(os.environ))
