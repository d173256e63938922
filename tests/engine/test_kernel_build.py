"""Compiling the kernels: once, for this machine, and with a sentence where it cannot be done."""

import _ctypes
import ctypes
import errno
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvrelay.engine.native import library
from kvrelay.engine.native.build import KernelsUnavailableError, _find_compiler, build_library
from kvrelay.engine.native.library import load_own
from kvrelay.engine.native.variant_choice import Variant, variants_to_build
from tests.support import left_out

QUICK_COMPILER = 'exec cc "$@" -O0'
"""How fast kernels are is not the question here."""
STAND_IN = 'test "$1" = --version && echo 1.0 && exit 0; while [ "$1" != -o ]; do shift; done; echo kernels > "$2"'
"""Writes something in the library's place: how it is compiled is not the question."""
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason=left_out.C_COMPILER)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kvrelay" / "kernels"


def fake_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = folder / "fakecc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(path))


@needs_compiler
def test_kernels_are_compiled_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, monkeypatch, QUICK_COMPILER)
    first = build_library()
    made_ns = first.stat().st_mtime_ns
    assert build_library() == first
    assert first.stat().st_mtime_ns == made_ns
    assert list(cache.iterdir()) == [first]


def test_processes_that_start_at_once_compile_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    fake_compiler(tmp_path, monkeypatch, f'case "$*" in *-shared*) echo linked >> "{calls}";; esac; {STAND_IN}')
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: build_library(), range(4)))) == 1
    assert calls.read_text().splitlines() == ["linked"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where kernels lie when the cache folder cannot be used."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder / f"kvrelay-{os.getuid()}" / "kernels"


def test_kernels_lie_among_temporary_files_where_there_is_no_cache_folder(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    fake_compiler(tmp_path, monkeypatch, STAND_IN)
    made = build_library()
    assert made.parent == temporary
    assert build_library() == made


def test_a_library_that_others_could_have_put_there_is_not_loaded(
    cache: Path, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(tmp_path, monkeypatch, STAND_IN)
    planted = build_library()
    planted.chmod(0o666)
    made = build_library()
    assert made == planted, "its folder is this user's alone, so it is made anew there"
    assert not made.stat().st_mode & 0o022


@pytest.mark.skipif(os.getuid() != 0, reason=left_out.not_for("users who cannot give files away"))
def test_a_folder_of_another_user_is_left_alone(
    cache: Path, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True)
    os.chown(cache, 12345, 12345)
    fake_compiler(tmp_path, monkeypatch, STAND_IN)
    assert build_library().parent == temporary
    assert list(cache.iterdir()) == []


def test_what_others_may_write_to_is_not_loaded_at_the_last_moment_either(tmp_path: Path) -> None:
    path = tmp_path / "kernels.so"
    path.write_bytes(b"\x7fELF")
    path.chmod(0o666)
    with pytest.raises(PermissionError, match="others may write to it"):
        load_own(path)


def test_a_library_in_a_folder_where_others_could_write_is_made_anew(
    cache: Path, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(tmp_path, monkeypatch, STAND_IN)
    planted = build_library()
    planted.write_text("planted")
    cache.chmod(0o777)
    assert build_library().read_text() == "kernels\n"
    assert not cache.stat().st_mode & 0o022


def test_a_link_is_not_loaded_whoever_owns_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\x7fELF")
    (tmp_path / "kernels.so").symlink_to(tmp_path / "file")
    with pytest.raises(OSError, match=r"kernels\.so") as refused:
        load_own(tmp_path / "kernels.so")
    assert refused.value.errno == errno.ELOOP


def test_the_file_that_was_looked_at_is_the_one_that_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one may take its name meanwhile."""
    extension = importlib.util.find_spec("_ctypes_test") or importlib.util.find_spec("yaml._yaml")
    assert extension is not None
    assert extension.origin is not None
    path = tmp_path / "kernels.so"
    shutil.copy(extension.origin, path)

    def is_own_and_replaced(status: os.stat_result) -> bool:
        path.unlink()
        path.write_bytes(b"planted")
        return True

    monkeypatch.setattr(library, "is_own", is_own_and_replaced)
    # The linker knows libraries by the descriptors that they were opened by.
    _ctypes.dlclose(load_own(path)._handle)


def test_without_any_folder_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setattr(tempfile, "gettempdir", none)
    fake_compiler(tmp_path, monkeypatch, STAND_IN)
    with pytest.raises(
        KernelsUnavailableError, match=r"/dev/null/kvrelay/kernels cannot be written to.*set XDG_CACHE_HOME"
    ):
        build_library()


def test_without_a_compiler_the_error_says_what_to_install(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(cache))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(KernelsUnavailableError, match="install gcc or clang"):
        build_library()


def test_what_the_compiler_complains_of_is_said(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(
        tmp_path, monkeypatch, 'test "$1" = --version && echo 1.0 && exit 0; echo "no such header" >&2; exit 1'
    )
    with pytest.raises(KernelsUnavailableError, match="cannot compile the kernels: no such header"):
        build_library()
    assert not list(cache.iterdir())


@needs_compiler
def test_a_variant_whose_instructions_the_compiler_does_not_know_is_left_out(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = 'for flag; do case "$flag" in -mamx*|-mavx512*|-mavxvnni) echo "unknown flag" >&2; exit 1;; esac; done; '
    fake_compiler(tmp_path, monkeypatch, refuse + QUICK_COMPILER)
    library = ctypes.CDLL(str(build_library()))
    assert hasattr(library, "run_decoder_portable")
    assert not hasattr(library, "run_decoder_amx")
    assert not hasattr(library, "run_decoder_avxvnni")


@needs_compiler
def test_every_variant_is_there_whose_instructions_the_compiler_knows(tmp_path: Path) -> None:
    """One that does not compile for another reason would only be logged."""
    own = ctypes.CDLL(str(build_library()))
    source = tmp_path / "empty.c"
    source.write_text("int nothing;\n")

    def is_known(variant: Variant) -> bool:
        command = [_find_compiler(), *variant.flags, "-c", str(source), "-o", str(tmp_path / "empty.o")]
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0

    for variant in variants_to_build(platform.machine()):
        assert hasattr(own, f"run_decoder_{variant.name}") == is_known(variant), variant.name


def test_machines_with_other_processors_share_the_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the variants for all, so the name has nothing of the processor."""
    fake_compiler(tmp_path, monkeypatch, STAND_IN)
    made = build_library()
    monkeypatch.setattr(platform, "processor", lambda: "another")
    assert build_library() == made
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert build_library() != made, "another architecture has its own"
