"""Compiles the kernels for this machine's processor, once: the result lies in the user's cache folder under a digest of all that
it depends on (sources, compiler, flags, processor), so that another machine, or a newer kvrelay, makes its own.
"""

import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import structlog
import xxhash

from kvrelay.cache_folder import cache_folder

SOURCE_FOLDER = Path(__file__).parent
SOURCES = (
    "threads.c",
    "matrices.c",
    "matrices_int8.c",
    "attention.c",
    "attention_few_rows.c",
    "attention_int8.c",
    "decoder.c",
    "linear.c",
    "kv_copy.c",
)
HEADERS = ("kernels.h", "attention.h")
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
FOR_THIS_PROCESSOR: tuple[tuple[str, ...], ...] = (("-march=native",), ("-mcpu=native",), ())
"""Compilers name it differently; the last leaves out what only newer processors have."""
COMPILERS = ("cc", "gcc", "clang")
COMPILE_TIMEOUT_S = 120

_log = structlog.get_logger(__name__)


class KernelsUnavailableError(Exception):
    """The kernels cannot be compiled here; says why."""


def build_library() -> Path:
    """The compiled library, made now if it is not there yet. Several processes may do so at once.

    Raises:
        KernelsUnavailableError: no compiler, or it does not compile them.
    """
    compiler = _find_compiler()
    target = cache_folder(os.environ) / "kernels" / f"kernels-{_digest(compiler)}.so"
    if not target.is_file():
        _compile(compiler, target)
    return target


def _find_compiler() -> str:
    for name in (os.environ.get("CC"), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    raise KernelsUnavailableError("there is no C compiler; install gcc or clang")


def _digest(compiler: str) -> str:
    digest = xxhash.xxh3_128()
    for name in (*SOURCES, *HEADERS):
        digest.update((SOURCE_FOLDER / name).read_bytes())
    digest.update(" ".join((compiler, _version(compiler), *FLAGS, _processor())).encode())
    return digest.hexdigest()


def _version(compiler: str) -> str:
    try:
        return subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelsUnavailableError(f"{compiler} does not run: {error}") from error


def _processor() -> str:
    """What "native" stands for: the processor's model and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))))


def _compile(compiler: str, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            problems = [_run(compiler, flags, made) for flags in FOR_THIS_PROCESSOR if not made.is_file()]
            if not made.is_file():
                raise KernelsUnavailableError(f"{compiler} cannot compile the kernels: {problems[-1]}")
            os.replace(made, target)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelsUnavailableError(f"the kernels cannot be compiled into {target.parent}: {error}") from error
    _log.info("kernels compiled", library=str(target))


def _run(compiler: str, flags: tuple[str, ...], target: Path) -> str:
    """Compiles into the target; the end of what the compiler said."""
    command = [compiler, *FLAGS, *flags, *(str(SOURCE_FOLDER / name) for name in SOURCES), "-o", str(target), "-lm"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    return result.stderr.strip()[-500:]
