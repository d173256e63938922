"""What all tests share: the environment of the test process, the one real model, and how they are divided among processes."""

import os
import signal
from pathlib import Path

import hypothesis
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from kvrelay.garbage_collection import keep_what_is_loaded, pause_collection
from kvrelay.model_store import ModelStore, default_model_dir

# Read when torch and the hub's library are first imported, which is later: test processes share few cores, and no test may
# look for a model hub.
for _name, _value in (
    ("OMP_NUM_THREADS", "1"),
    ("TOKENIZERS_PARALLELISM", "false"),
    ("HF_HUB_OFFLINE", "1"),
    ("TQDM_DISABLE", "1"),
):
    os.environ.setdefault(_name, _value)


# How long an example takes says nothing where tests share cores with others.
hypothesis.settings.register_profile("shared cores", deadline=None)
hypothesis.settings.load_profile("shared cores")


# A shell that runs the tests in the background has them ignore Ctrl-C, and every process that they start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Tests, and all that they import, stay until the end: nobody need look for garbage among them, again and again.
pause_collection()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    keep_what_is_loaded()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32, converted on first use on a machine. `make model` does that beforehand."""
    return ModelStore(default_model_dir(os.environ)).ensure_demo_model()


LONGEST = ("tests/integration/", "tests/faults/", "tests/simulation/", "tests/engine/", "tests/test_local_cluster.py")
"""Where the tests are that take longest. They come first, so that no process is left alone with one of them at the end."""
SHARED_CLUSTER = "tests/faults/"
"""A folder whose tests share one cluster."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


class FilesInOrder(LoadFileScheduling):  # type: ignore[misc]  # xdist is not typed
    """Each file as a whole in one process, in the order in which they were collected; files that share a cluster in the same."""

    def _split_scope(self, nodeid: str) -> str:
        return SHARED_CLUSTER if nodeid.startswith(SHARED_CLUSTER) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    if config.option.dist != "loadfile":
        return None
    config.option.loadscopereorder = False
    return FilesInOrder(config, log)
