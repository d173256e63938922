"""Kernels in C for models in float32 or int8 on a CPU: compiled once on each machine, called through ctypes.

    build.py      compiles the C files into the user's cache folder
    library.py    the compiled library: its structures and functions
    packing.py    weights as the kernels read them

Where they cannot be had, torch's own kernels do the same work more slowly. Knows nothing of models' modules and of steps.
"""

from kvrelay.engine.native.library import NativeLibrary, kernel_seconds, load_library

__all__ = ["NativeLibrary", "kernel_seconds", "load_library"]
