"""Kernels in C for a CPU.

build.py      compiles the C files once per machine
library.py    the compiled library: its structures and functions
packing.py    weights as the kernels read them
"""

from kvrelay.engine.native.library import NativeLibrary, kernel_seconds, load_library

__all__ = ["NativeLibrary", "kernel_seconds", "load_library"]
