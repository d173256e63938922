"""Wheels with compiled kernels run where there is no compiler, with the bits of compiled ones.

They are loaded only where no other user could have put them.
"""

import json
import os
import platform
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvrelay.engine.native.variant_choice import variants_to_build
from tests.engine.test_kernel_build import needs_compiler
from tests.project.test_wheel import install, run
from tests.support import left_out
from tools.build_wheel import WheelError, build_wheel, check_library, tag_of

ARM_COMPILER = "aarch64-linux-gnu-gcc"
MACHINE = platform.machine()
COMPUTE = """
import hashlib, json, torch
from kvrelay.engine.native import available_variants, load_library
from kvrelay.engine.native.library import MatrixKind
from kvrelay.engine.native.packing import WeightArena, pack_matrix

digest = hashlib.sha256()
library = load_library()
for variant in available_variants():
    kernels = load_library(variant)
    for kind in (MatrixKind.F32, MatrixKind.INT8, MatrixKind.BF16):
        numbers = torch.Generator().manual_seed(1)
        weight, inputs = torch.randn(40, 128, generator=numbers), torch.randn(9, 128, generator=numbers)
        weight = weight.bfloat16() if kind is MatrixKind.BF16 else weight
        packed, outputs = pack_matrix(weight, None, WeightArena(1 << 16), kernels, kind), torch.zeros(9, 40)
        kernels.run_linear(packed.matrix, 9, inputs.data_ptr(), outputs.data_ptr())
        digest.update(outputs.numpy().tobytes())
print(json.dumps([library and library.description, available_variants(), digest.hexdigest()]))
"""

pytestmark = needs_compiler


@dataclass(frozen=True)
class Place:
    """An environment that has the wheel, without a compiler on its path."""

    folder: Path

    @property
    def kernels(self) -> Path:
        (found,) = self.folder.glob("venv/lib/*/site-packages/kvrelay/engine/native/prebuilt/*.so")
        return found

    def compute(self) -> tuple[list[Any], str]:
        """What COMPUTE prints, and the log."""
        nothing = {"PATH": str(self.folder / "venv" / "bin"), "CC": "", "PYTHONPATH": ""}
        return compute(self.folder / "venv" / "bin" / "python", self.folder, nothing)

    @property
    def cache(self) -> Path:
        return self.folder / "cache"


def compute(python: str | Path, folder: Path, environment: Mapping[str, str] = {}) -> tuple[list[Any], str]:
    log = folder / "log"
    (folder / "compute.py").write_text(COMPUTE)
    printed = run(
        "/bin/sh",
        "-c",
        f'exec "{python}" "{folder}/compute.py" 2>"{log}"',
        cwd=folder,
        environment={"XDG_CACHE_HOME": str(folder / "cache"), **environment},
    )
    lines = printed.splitlines()
    return json.loads(lines[-1]), "\n".join([*lines[:-1], log.read_text()])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"), MACHINE)


@pytest.fixture(scope="module")
def place(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("environment")
    install(wheel, folder / "venv")
    return Place(folder)


def test_a_wheel_with_kernels_is_for_one_architecture(wheel: Path) -> None:
    assert wheel.name.endswith(f"_{MACHINE}.whl")
    assert "-py3-none-manylinux_2_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        (info,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: false" in archive.read(info).decode()
        (library,) = (name for name in archive.namelist() if name.endswith(".so"))
        check_library(archive.read(library), MACHINE)


def test_its_kernels_run_without_a_compiler_with_the_bits_of_compiled_ones(place: Place, tmp_path: Path) -> None:
    (description, variants, digest), _ = place.compute()
    assert not place.cache.exists(), "nothing was compiled"
    shutil.copytree(place.folder / "venv", tmp_path / "venv", symlinks=True)
    compiled = Place(tmp_path)
    compiled.kernels.unlink()
    python = compiled.folder / "venv" / "bin" / "python"
    (expected_description, expected_variants, expected), _ = compute(
        python, tmp_path, {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", "")}
    )
    assert (variants, digest) == (expected_variants, expected)
    assert variants[-1] == "portable"
    assert description.partition(";")[0] == f"{variants[0]} kernels of the wheel"
    assert expected_description.partition(";")[0] == f"{variants[0]} kernels"


@pytest.fixture
def changed(place: Place) -> Iterator[Place]:
    """Puts back what the test changes."""
    kept = place.kernels.read_bytes()
    yield place
    for path in (place.kernels.parent, place.kernels):
        path.chmod(0o755)
    place.kernels.write_bytes(kept)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_kernels_that_others_could_have_put_there_are_not_loaded(changed: Place, what: str) -> None:
    opened = changed.kernels if what == "file" else changed.kernels.parent
    opened.chmod(0o777)
    (description, _, _), log = changed.compute()
    assert description is None
    assert f"{opened} is another user's, or others may write to it" in log
    assert "there is no C compiler" in log


def test_kernels_that_cannot_be_loaded_are_left_alone(changed: Place) -> None:
    changed.kernels.write_bytes(b"not a library")
    (description, _, _), log = changed.compute()
    assert description is None
    assert "the wheel's kernels are not used" in log


def test_kernels_of_other_sources_are_left_alone(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.folder / "venv", tmp_path / "venv", symlinks=True)
    other = Place(tmp_path)
    with (other.kernels.parent.parent / "threads.c").open("a") as source:
        source.write("\n")
    (description, _, _), log = other.compute()
    assert description is None
    assert "install gcc or clang" in log


@pytest.mark.skipif(shutil.which(ARM_COMPILER) is None, reason=left_out.ARM)
def test_a_wheel_for_arm_is_built_by_a_cross_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", ARM_COMPILER)
    built = build_wheel(tmp_path, "aarch64")
    assert built.name.endswith("_aarch64.whl")
    with zipfile.ZipFile(built) as archive:
        (library,) = (name for name in archive.namelist() if name.endswith(".so"))
        check_library(archive.read(library), "aarch64")
        with pytest.raises(WheelError, match="does not compile for x86_64; set CC"):
            check_library(archive.read(library), "x86_64")


def test_a_library_without_a_variant_becomes_no_wheel() -> None:
    names = b"".join(f"\0run_decoder_{variant.name}\0".encode() for variant in variants_to_build("x86_64")[1:])
    with pytest.raises(WheelError, match="does not know the instructions of amx; take a newer one"):
        check_library(b"\x7fELF" + bytes(14) + (62).to_bytes(2, "little") + names, "x86_64")


def test_the_tag_names_the_newest_glibc_that_is_used() -> None:
    assert tag_of(b"\0GLIBC_2.2.5\0GLIBC_2.34\0GLIBC_2.9\0", "x86_64") == "py3-none-manylinux_2_34_x86_64"
    assert tag_of(b"\0GLIBC_2.2.5\0", "x86_64") == "py3-none-manylinux_2_17_x86_64"
