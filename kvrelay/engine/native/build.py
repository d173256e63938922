"""Compiles the kernels for this machine's processor, once.

Their file name has a digest of sources, compiler, flags and processor.
"""

import contextlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import structlog
import xxhash

from kvrelay.errors import StartupError
from kvrelay.runtime.cache_folder import cache_folder, is_private, make_private, temporary_folder

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
# Compilers differ in the flag; the last, empty one leaves newer instructions out.
FOR_THIS_PROCESSOR: tuple[tuple[str, ...], ...] = (("-march=native",), ("-mcpu=native",), ())
COMPILERS = ("cc", "gcc", "clang")
COMPILE_TIMEOUT_S = 120

_log = structlog.get_logger(__name__)


class KernelsUnavailableError(Exception):
    """Says why."""


def build_library() -> Path:
    """Returns the library, compiled if missing. Processes may do so at once.

    It lies where no other user can write.

    Raises:
        KernelsUnavailableError: no compiler, a compile error, or no folder.
    """
    compiler = _find_compiler()
    name = f"kernels-{_digest(compiler)}.so"
    targets = [folder / name for folder in _folders()]
    for target in targets:
        if target.is_file() and is_private(target.parent) and is_private(target):
            return target
    problems = []
    for target in targets:
        if problem := _problem_of(target.parent):
            problems.append(f"{target.parent} {problem}")
            continue
        _compile(compiler, target)
        return target
    advice = "set XDG_CACHE_HOME to a folder that this user may write to and execute from"
    raise KernelsUnavailableError(
        f"there is no folder for them: {'; '.join(problems) or 'none can be written to'}; {advice}"
    )


def _folders() -> list[Path]:
    folders = []
    with contextlib.suppress(StartupError):
        folders.append(cache_folder(os.environ) / "kernels")
    if (fallback := temporary_folder()) is not None and fallback / "kernels" not in folders:
        folders.append(fallback / "kernels")
    return folders


def _problem_of(folder: Path) -> str:
    """Empty if the folder can hold the library."""
    try:
        if not make_private(folder):
            return "is another user's, or others may write to it"
        with tempfile.TemporaryFile(dir=folder):
            pass
        if os.statvfs(folder).f_flag & os.ST_NOEXEC:
            return "is mounted noexec"
    except OSError as error:
        return f"cannot be written to ({error.strerror})"
    return ""


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
            [compiler, "--version"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=COMPILE_TIMEOUT_S,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelsUnavailableError(f"{compiler} does not run: {error}") from error


def _processor() -> str:
    """What "native" refers to."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
    )


def _compile(compiler: str, target: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            problems = [
                _run(compiler, flags, made, Path(scratch)) for flags in FOR_THIS_PROCESSOR if not made.is_file()
            ]
            if not made.is_file():
                raise KernelsUnavailableError(f"{compiler} cannot compile the kernels: {problems[-1]}")
            made.chmod(0o755)  # independent of the umask
            os.replace(made, target)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelsUnavailableError(f"the kernels cannot be compiled into {target.parent}: {error}") from error
    _log.info("kernels compiled", library=str(target))


def _run(compiler: str, flags: tuple[str, ...], target: Path, scratch: Path) -> str:
    command = [compiler, *FLAGS, *flags, *(str(SOURCE_FOLDER / name) for name in SOURCES), "-o", str(target), "-lm"]
    # The output may have any encoding. TMPDIR, because the default folder may be missing.
    result = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=COMPILE_TIMEOUT_S,
        check=False,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    return result.stderr.strip()[-500:]
