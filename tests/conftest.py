"""What all tests share: the environment of the test process, and the one real model."""

import os
import signal
from pathlib import Path

import hypothesis
import pytest

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


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32, converted on first use on a machine. `make model` does that beforehand."""
    return ModelStore(default_model_dir(os.environ)).ensure_demo_model()
