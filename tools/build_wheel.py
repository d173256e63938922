"""Builds a wheel with compiled kernels, for machines without a C compiler.

python -m tools.build_wheel dist                                              for this machine
CC=aarch64-linux-gnu-gcc python -m tools.build_wheel dist --machine aarch64   for another one

Its tag names the oldest glibc that has what the kernels use.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kvrelay.engine.native.build import KernelsUnavailableError, build_library
from kvrelay.engine.native.prebuilt import prebuilt_name
from kvrelay.engine.native.variant_choice import variants_to_build

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 300.0
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine
OLDEST_GLIBC = 17  # 2.17: of the oldest tag that pip knows

_GLIBC = re.compile(rb"\0GLIBC_2\.(\d+)(?=[.\0])")


class WheelError(Exception):
    """What is wrong, and what to do."""


def check_library(content: bytes, machine: str) -> None:
    """Raises WheelError: it is for another machine, or lacks a variant."""
    if int.from_bytes(content[18:20], "little") != ELF_MACHINES[machine]:
        raise WheelError(f"the compiler does not compile for {machine}; set CC to one that does")
    names = [variant.name for variant in variants_to_build(machine)]
    lacking = [name for name in names if f"\0run_decoder_{name}\0".encode() not in content]
    if lacking:
        raise WheelError(f"the compiler does not know the instructions of {', '.join(lacking)}; take a newer one")


def tag_of(content: bytes, machine: str) -> str:
    newest = max([OLDEST_GLIBC, *(int(found) for found in _GLIBC.findall(content))])
    return f"py3-none-manylinux_2_{newest}_{machine}"


def build_wheel(folder: Path, machine: str) -> Path:
    """Raises KernelsUnavailableError, and WheelError."""
    library = build_library(machine)
    content = library.read_bytes()
    check_library(content, machine)
    with tempfile.TemporaryDirectory() as scratch:
        renamed = shutil.copy(library, Path(scratch) / prebuilt_name(machine))
        variables = {"KVRELAY_WHEEL_KERNELS": str(renamed), "KVRELAY_WHEEL_TAG": tag_of(content, machine)}
        done = subprocess.run(
            (sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", scratch),
            cwd=ROOT,
            env={**os.environ, **variables},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=TIMEOUT_S,
        )
        if done.returncode:
            raise WheelError(f"hatchling cannot build the wheel:\n{done.stderr}")
        (built,) = Path(scratch).glob("*.whl")
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(built, folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the wheel")
    parser.add_argument("--machine", choices=ELF_MACHINES, default=platform.machine(), help="that it is for")
    options = parser.parse_args()
    try:
        print(build_wheel(options.folder, options.machine))
    except (KernelsUnavailableError, WheelError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
