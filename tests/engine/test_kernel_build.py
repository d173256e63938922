"""Compiling the kernels: once, for this machine, and with a sentence where it cannot be done."""

import shutil
import stat
from pathlib import Path

import pytest

from kvrelay.engine.native.build import KernelsUnavailableError, build_library

QUICK_COMPILER = 'exec cc "$@" -O0'
"""How fast kernels are is not the question here."""
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


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


def test_without_a_compiler_the_error_says_what_to_install(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(cache))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(KernelsUnavailableError, match="install gcc or clang"):
        build_library()


def test_what_the_compiler_complains_of_is_said(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, monkeypatch, 'test "$1" = --version && echo 1.0 && exit 0; echo "no such header" >&2; exit 1')
    with pytest.raises(KernelsUnavailableError, match="cannot compile the kernels: no such header"):
        build_library()
    assert not list(cache.iterdir())


@needs_compiler
def test_a_compiler_that_does_not_know_the_processor_compiles_for_all(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(tmp_path, monkeypatch, 'for flag; do case "$flag" in -m*native) exit 1;; esac; done; ' + QUICK_COMPILER)
    assert build_library().is_file()
