"""Compiles the kernels in all variants into one library, once.

Its file name has a digest of sources, compiler and flags, not of the processor: machines may share
the folder.
"""

import contextlib
import fcntl
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog
import xxhash

from kvrelay.engine.native.variant_choice import Variant, variants_to_build
from kvrelay.errors import StartupError
from kvrelay.runtime.cache_folder import cache_folder, is_private, make_private, temporary_folder

SOURCE_FOLDER = Path(__file__).parent
SHARED_SOURCES = ("threads.c", "processor.c")
VARIANT_SOURCE = "variant.c"  # includes the others
# No multiply-add is fused unless the code says so: variants give the same bits.
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fPIC", "-pthread")
COMPILERS = ("cc", "gcc", "clang")
COMPILE_TIMEOUT_S = 120
LOOK_INTERVAL_S = 0.05

_log = structlog.get_logger(__name__)


class KernelsUnavailableError(Exception):
    """Says why."""


def build_library(machine: str = "") -> Path:
    """Returns the library, compiled if missing. Processes may do so at once.

    It lies where no other user can write.

    Args:
        machine: that $CC compiles for; empty: this one.

    Raises:
        KernelsUnavailableError: no compiler, a compile error, or no folder.
    """
    machine = machine or platform.machine()
    compiler = _find_compiler()
    name = f"kernels-{_digest(machine, compiler, _version(compiler))}.so"
    targets = [folder / name for folder in _folders()]
    for target in targets:
        if target.is_file() and is_private(target.parent) and is_private(target):
            return target
    problems = []
    for target in targets:
        was_open = target.parent.exists() and not is_private(target.parent)
        if problem := _problem_of(target.parent):
            problems.append(f"{target.parent} {problem}")
            continue
        with _one_at_a_time(target.parent):
            # Another process may have made it, and in an open folder so may another user.
            if was_open or not (target.is_file() and is_private(target)):
                _compile(compiler, variants_to_build(machine), target)
        return target
    advice = "set XDG_CACHE_HOME to a folder that this user may write to and execute from"
    raise KernelsUnavailableError(
        f"there is no folder for them: {'; '.join(problems) or 'none can be written to'}; {advice}"
    )


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keeps the workers of a first start from compiling the same. Waits as long as a compiler may."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline_s = time.monotonic() + COMPILE_TIMEOUT_S
        while not _locked(descriptor) and time.monotonic() < deadline_s:
            time.sleep(LOOK_INTERVAL_S)
        yield
    finally:
        os.close(descriptor)  # ends the lock


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


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
    raise KernelsUnavailableError("there is no C compiler; install gcc or clang, or a wheel of kvrelay with kernels")


def sources_digest(machine: str) -> str:
    """Of all that a library is made of but the compiler."""
    return _digest(machine)


def _digest(machine: str, *compiler: str) -> str:
    digest = xxhash.xxh3_128()
    for path in sorted([*SOURCE_FOLDER.rglob("*.c"), *SOURCE_FOLDER.rglob("*.h")]):
        digest.update(path.read_bytes())
    variants = [f"{each.name} {each.header} {' '.join(each.flags)}" for each in variants_to_build(machine)]
    digest.update(" ".join((*compiler, machine, *FLAGS, *variants)).encode())
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


def _compile(compiler: str, variants: tuple[Variant, ...], target: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = _link(compiler, _compile_parts(compiler, variants, Path(scratch)), Path(scratch) / target.name)
            made.chmod(0o755)  # independent of the umask
            os.replace(made, target)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelsUnavailableError(f"the kernels cannot be compiled into {target.parent}: {error}") from error
    _log.info("kernels compiled", library=str(target))


def _compile_parts(compiler: str, variants: tuple[Variant, ...], scratch: Path) -> list[Path]:
    """Leaves out variants whose instructions the compiler does not know."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shared = [pool.submit(_object, compiler, Path(name), (), scratch) for name in SHARED_SOURCES]
        objects = {each: pool.submit(_variant_object, compiler, each, scratch) for each in variants}
    parts = [future.result() for future in shared]
    for variant, future in objects.items():
        if variant.needs and isinstance(error := future.exception(), KernelsUnavailableError):
            _log.info("a variant of the kernels is left out", variant=variant.name, why=str(error))
        else:
            parts.append(future.result())
    return parts


def _variant_object(compiler: str, variant: Variant, scratch: Path) -> Path:
    defines = (f"-DVARIANT={variant.name}", f'-DVARIANT_HEADER="variants/{variant.header}"')
    return _object(compiler, Path(VARIANT_SOURCE), (*defines, *variant.flags), scratch, variant.name)


def _object(compiler: str, source: Path, flags: tuple[str, ...], scratch: Path, name: str = "") -> Path:
    made = scratch / f"{name or source.stem}.o"
    return _run(compiler, (*FLAGS, *flags, "-c", str(SOURCE_FOLDER / source)), made, scratch)


def _link(compiler: str, parts: list[Path], made: Path) -> Path:
    return _run(compiler, ("-shared", "-pthread", *map(str, parts)), made, made.parent, "-lm")


def _run(compiler: str, arguments: tuple[str, ...], made: Path, scratch: Path, *libraries: str) -> Path:
    # The output may have any encoding. TMPDIR, because the default folder may be missing.
    result = subprocess.run(
        [compiler, *arguments, "-o", str(made), *libraries],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=COMPILE_TIMEOUT_S,
        check=False,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    if not made.is_file():
        raise KernelsUnavailableError(f"{compiler} cannot compile the kernels: {result.stderr.strip()[-500:]}")
    return made
