"""Tests that this machine cannot run: the reasons of skips, and a summary of them after a run.

`needs` names what is missing and how to get it. With `--no-skips`, as in CI, these skips fail the
run, and so does every other reason except `not_for`, for tests that mean nothing here.
"""

from collections import Counter
from collections.abc import Iterable

import pytest

_NEEDS = "needs "
_NOT_FOR = "not for "
_PREFIX = "Skipped: "


def needs(what: str, how: str) -> str:
    """The reason of a skip that an installation removes."""
    return f"{_NEEDS}{what}: {how}"


def not_for(what: str) -> str:
    """The reason of a justified skip, such as `not_for("machines with CUDA")`."""
    return f"{_NOT_FOR}{what}"


REDIS_SERVER = needs("Debian's redis-server", "apt-get install redis-server")
CHROMIUM = needs("Chromium", "apt-get install chromium")
C_COMPILER = needs("a C compiler", "apt-get install gcc libc6-dev")
ARM = needs(
    "a compiler and an emulator for ARM", "apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
)
ATHERIS = needs("atheris", "make install")
DEMO_MODEL = needs("the demo model", "make model")
MEMFD = not_for("systems without memfd")


def reasons_of(reports: Iterable[pytest.TestReport | pytest.CollectReport]) -> Counter[str]:
    """Number of skips by reason."""
    return Counter(_reason(report) for report in reports)


def line_of(reasons: Counter[str]) -> str:
    """What was skipped and how to get it; empty if nothing is missing."""
    missing = {reason: number for reason, number in reasons.items() if reason.startswith(_NEEDS)}
    parts = [
        f"{number} {'tests need' if number > 1 else 'test needs'} {reason[len(_NEEDS) :]}"
        for reason, number in missing.items()
    ]
    return f"left out: {'; '.join(parts)}" if parts else ""


def forbidden(reasons: Counter[str]) -> list[str]:
    """Reasons with which a run with --no-skips fails."""
    return [f"{number} skipped: {reason}" for reason, number in reasons.items() if not reason.startswith(_NOT_FOR)]


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """A skip's longrepr is (path, line, reason)."""
    place = report.longrepr
    text = str(place[2]) if isinstance(place, tuple) else str(place)
    return text.removeprefix(_PREFIX)
