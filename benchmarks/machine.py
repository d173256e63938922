"""What a figure depends on besides the code: processor, cores, memory, versions. Knows nothing of
benchmarks.
"""

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import kvrelay

CPU_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "i8mm",
)
"""Those that decide which kernels run."""
PACKAGES = ("torch", "transformers", "numpy", "grpcio")


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine as this process may use it."""

    cpu: str
    num_cores: int
    """Cores that this process may run on."""
    memory_bytes: int
    cpu_flags: tuple[str, ...]
    system: str
    load_average: float
    """Of the last minute before the run: what else the machine was busy with."""


def this_machine() -> Machine:
    """Facts of the machine this runs on."""
    cpu_info = _cpu_info()
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = cpu_info.get("flags", cpu_info.get("Features", "")).split()
    return Machine(
        cpu=cpu_info.get("model name", platform.processor() or platform.machine()),
        num_cores=num_cores,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cpu_flags=tuple(flag for flag in CPU_FLAGS if flag in flags),
        system=f"{platform.system()} {platform.machine()}",
        load_average=round(os.getloadavg()[0], 2),
    )


def versions() -> dict[str, str]:
    """Versions of kvrelay, Python and those of PACKAGES that are installed."""
    found = {"kvrelay": kvrelay.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_info() -> dict[str, str]:
    """The first processor's entries in /proc/cpuinfo; none where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
