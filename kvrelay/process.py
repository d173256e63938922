"""What all processes share: settings, set-up, signals, exit."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from typing import TypeVar

from kvrelay.config.base import Settings
from kvrelay.config.settings import ServerSettings
from kvrelay.config.sources import read_sources
from kvrelay.errors import StartupError
from kvrelay.observability.logging import configure_logging
from kvrelay.runtime.fault_points import enable_fault_points

SettingsT = TypeVar("SettingsT", bound=Settings)


def run_main(name: str, section: str, settings_type: type[SettingsT], run: Callable[[SettingsT], None]) -> int:
    try:
        sources = read_sources({})
        sources.print_notes()
        run(sources.load(section, settings_type))
    except StartupError as failure:
        print(f"kvrelay {name}: {failure.message}", file=sys.stderr)
        return 1
    return 0


def set_up_process(settings: ServerSettings, role: str) -> None:
    configure_logging(settings.log_level, settings.log_format, role=role)
    enable_fault_points(settings.fault_points)


def exit_process() -> None:
    """Ends at once, as a crash does."""
    os._exit(1)


def stop_on_signals() -> asyncio.Event:
    """A second signal exits at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            exit_process()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop
