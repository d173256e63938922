"""What all tests share: the environment of the test process, the one real model, and how they are
divided among processes.
"""

import os
import signal
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest
import structlog
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from kvrelay.models.store import ModelStore, default_model_dir
from kvrelay.runtime.garbage_collection import keep_what_is_loaded, pause_collection
from tests.support.left_out import forbidden, line_of, reasons_of

# Read when torch and the hub's library are first imported, which is later: test processes share few
# cores, and no test may look for a model hub.
for _name, _value in (
    ("OMP_NUM_THREADS", "1"),
    ("TOKENIZERS_PARALLELISM", "false"),
    ("HF_HUB_OFFLINE", "1"),
    ("TQDM_DISABLE", "1"),
):
    os.environ.setdefault(_name, _value)


# What a user or a CI has set for colours and widths, or for a kvrelay of their own, is about their
# terminals and clusters; the processes that tests start would heed it too. (typer takes
# GITHUB_ACTIONS for a terminal with colours.)
_OF_TERMINALS = {
    "FORCE_COLOR",
    "NO_COLOR",
    "CLICOLOR_FORCE",
    "PY_COLORS",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
    "GITHUB_ACTIONS",
}
_OF_TERMINALS |= {"COLUMNS", "LINES", "TERMINAL_WIDTH"}
for _name in [*os.environ]:
    if _name in _OF_TERMINALS or (_name.startswith("KVRELAY_") and _name != "KVRELAY_MODEL_DIR"):
        del os.environ[_name]


# How long an example takes says nothing where tests share cores with others.
hypothesis.settings.register_profile("shared cores", deadline=None)
hypothesis.settings.load_profile("shared cores")


# Where something logs an exception, structlog would draw every frame with all its locals: seconds
# in which the loop of a test stands still. Processes that serve log by
# kvrelay.observability.logging, which does not do that either.
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
)


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """What a test configures for its logs, as a process does at its start, holds for itself alone."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


# A shell that runs the tests in the background has them ignore Ctrl-C, and every process that they
# start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Tests, and all that they import, stay until the end: nobody need look for garbage among them,
# again and again.
pause_collection()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips", action="store_true", help="fail when a test is skipped for something that could be installed"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if (
        session.config.getoption("--no-skips")
        and session.exitstatus == pytest.ExitCode.OK
        and forbidden(_skips(session.config))
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> Generator[None]:
    """Behind all else that is summed up, but for the line with the counts."""
    yield
    reasons = _skips(config)
    if config.getoption("--no-skips"):
        for line in forbidden(reasons):
            terminalreporter.write_line(f"--no-skips: {line}", red=True)
    elif line := line_of(reasons):
        terminalreporter.write_line(line, yellow=True)


def _skips(config: pytest.Config) -> Counter[str]:
    """Empty in a process of pytest-xdist, which reports to another."""
    reporter: pytest.TerminalReporter | None = config.pluginmanager.get_plugin("terminalreporter")
    return reasons_of(reporter.stats.get("skipped", ())) if reporter is not None else Counter()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    keep_what_is_loaded()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32, converted on first use on a machine. `make model`
    does that beforehand.
    """
    return ModelStore(default_model_dir(os.environ)).ensure_demo_model()


LONGEST = (
    *("tests/integration/", "tests/faults/", "tests/simulation/", "tests/engine/", "tests/gateway/", "tests/fuzz/"),
    *("tests/cluster/", "tests/state/", "tests/worker/", "tests/examples/"),
)
"""Where the tests are that take longest. They come first, so that no process is left alone with one
of them at the end.
"""
SHARED_CLUSTER = "tests/faults/"
"""A folder whose tests share one cluster."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


class FilesInOrder(LoadFileScheduling):  # type: ignore[misc]  # xdist is not typed
    """Each file as a whole in one process, in the order in which they were collected; files that
    share a cluster in the same.
    """

    def _split_scope(self, nodeid: str) -> str:
        return SHARED_CLUSTER if nodeid.startswith(SHARED_CLUSTER) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    if config.option.dist != "loadfile":
        return None
    config.option.loadscopereorder = False
    return FilesInOrder(config, log)
