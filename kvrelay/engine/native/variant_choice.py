"""Variants of the kernels, from the best to the one for any processor. All give the same bits."""

import ctypes
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass

from kvrelay.errors import ConfigError

AUTO = "auto"
_X86 = ("x86_64", "amd64")
_ARM = ("aarch64", "arm64")
_AVX2 = ("avx2", "fma", "AVX registers")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "AVX-512 registers")
_AVX2_FLAGS = ("-mavx2", "-mfma", "-mtune=haswell")
_AVX512_FLAGS = (*_AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
# The bits of `processor_features` in processor.c. The operating system must save the registers.
FEATURES = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "amx_tile", "amx_int8"),
    *("AVX registers", "AVX-512 registers", "AMX tiles", "amx_bf16"),
    *("asimd", "asimddp", "i8mm"),
)
_SAVED_BY_SYSTEM = FEATURES[10:13]


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    header: str  # in the folder `variants`
    flags: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # of FEATURES
    machines: tuple[str, ...] = _X86  # which `uname -m` names; none: all


VARIANTS = (
    Variant(
        "amx",
        "amx.h",
        (*_AVX512_FLAGS, "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
        (*_AVX512, "amx_tile", "amx_int8", "amx_bf16", "AMX tiles"),
    ),
    Variant("avx512", "avx512.h", _AVX512_FLAGS, _AVX512),
    Variant("avxvnni", "avx2.h", (*_AVX2_FLAGS, "-mavxvnni"), (*_AVX2, "avx_vnni")),
    Variant("avx2", "avx2.h", _AVX2_FLAGS, _AVX2),
    Variant("i8mm", "neon.h", ("-march=armv8.2-a+dotprod+i8mm",), ("asimd", "asimddp", "i8mm"), _ARM),
    Variant("dotprod", "neon.h", ("-march=armv8.2-a+dotprod",), ("asimd", "asimddp"), _ARM),
    Variant("neon", "neon.h", ("-march=armv8-a",), ("asimd",), _ARM),
    Variant("portable", "portable.h", machines=()),
)


@dataclass(frozen=True, slots=True)
class Choice:
    name: str
    why_not: Mapping[str, str]  # of each better variant


def variants_to_build(machine: str) -> tuple[Variant, ...]:
    return tuple(each for each in VARIANTS if not each.machines or machine.lower() in each.machines)


def choose_variant(library: ctypes.CDLL, wanted: str = AUTO) -> Choice:
    """Takes the best that can run, or the wanted one.

    Raises:
        ConfigError: the wanted variant cannot run here, or is unknown.
    """
    why_not: dict[str, str] = {}
    for variant in VARIANTS if wanted != AUTO else variants_to_build(platform.machine()):
        problem = _problem_of(variant, library)
        if problem is None and wanted in (AUTO, variant.name):
            return Choice(variant.name, why_not)
        if variant.name == wanted:
            why_not[wanted] = problem or ""
            break
        if wanted == AUTO:
            why_not[variant.name] = problem or ""
    possible = ", ".join([AUTO, *usable_variants(library)])
    reason = f"cannot run here: {why_not[wanted]}" if wanted in why_not else "is unknown"
    raise ConfigError(f"--kernel-variant {wanted} {reason}; choose one of {possible}")


def usable_variants(library: ctypes.CDLL) -> list[str]:
    return [variant.name for variant in VARIANTS if _problem_of(variant, library) is None]


def _problem_of(variant: Variant, library: ctypes.CDLL) -> str | None:
    """None: it can run."""
    found = library.processor_features()
    missing = [name for name in variant.needs if not found >> FEATURES.index(name) & 1]
    if lacking := [name for name in missing if name not in _SAVED_BY_SYSTEM]:
        return f"the processor lacks {', '.join(lacking)}"
    if missing:
        return f"the operating system does not save {', '.join(missing)}"
    if not hasattr(library, f"run_decoder_{variant.name}"):
        return "the C compiler does not know its instructions; install a newer one"
    if "AMX tiles" in variant.needs and (error := library.request_tiles()):
        return f"the operating system does not let this process use AMX tiles ({os.strerror(error)})"
    return None
