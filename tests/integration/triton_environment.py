"""Where Triton's own client is installed for tests: it wants another protobuf than kvrelay, so it
cannot stand beside it.

A folder in the user's cache has it with its protobuf; all else that it needs comes from the
environment of the tests. It is made once on a machine.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from kvrelay.runtime.cache_folder import cache_folder

REQUIREMENTS = ("tritonclient==2.73.0", "protobuf==6.33.6", "python-rapidjson==1.25", "ml_dtypes==0.5.4")
INSTALL_TIMEOUT_S = 300


def triton_client_folder() -> Path:
    """The folder, made when it is not there.

    Raises:
        subprocess.CalledProcessError: the package index does not have it, or cannot be reached; pip
        has said which.
    """
    version = f"{REQUIREMENTS[0].replace('==', '-')}-python{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache_folder(os.environ) / "test-clients" / version
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            pip = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-qq",
                "--no-input",
                "--disable-pip-version-check",
                "--no-deps",
            ]
            command = [*pip, "--target", str(unfinished), *REQUIREMENTS]
            subprocess.run(command, check=True, timeout=INSTALL_TIMEOUT_S)
            unfinished.rename(folder)
    return folder


def triton_environment(folder: Path) -> Mapping[str, str]:
    """Environment variables of a Python that finds the client in the folder."""
    return os.environ | {"PYTHONPATH": str(folder)}
