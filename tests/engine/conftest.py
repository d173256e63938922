import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import logging as transformers_logging


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this run's tiny models are kept."""
    return tmp_path_factory.mktemp("tiny_models")


@pytest.fixture(scope="session", autouse=True)
def quiet_transformers() -> Iterator[None]:
    """One thread, for the machine is shared, and no progress bars between the dots."""
    logging: Any = transformers_logging
    num_threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    yield
    torch.set_num_threads(num_threads)
