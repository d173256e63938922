"""Puts compiled kernels into a wheel where tools/build_wheel.py says which; else it is for any machine."""

import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        library, tag = os.environ.get("KVRELAY_WHEEL_KERNELS"), os.environ.get("KVRELAY_WHEEL_TAG")
        if library is None or tag is None or version == "editable":
            return
        build_data["force_include"][library] = f"kvrelay/engine/native/prebuilt/{Path(library).name}"
        build_data["pure_python"] = False
        build_data["tag"] = tag
