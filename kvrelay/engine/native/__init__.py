"""Kernels in C for a CPU.

build.py            compiles the C files once
prebuilt.py         or finds what the wheel has of them
variant_choice.py   for which processors, and which of them runs
library.py          the compiled library: its structures and functions
packing.py          weights as the kernels read them
"""

from kvrelay.engine.native.library import NativeLibrary, available_variants, kernel_seconds, load_library

__all__ = ["NativeLibrary", "available_variants", "kernel_seconds", "load_library"]
