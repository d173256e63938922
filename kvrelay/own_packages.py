"""Finds the services' packages, for kvrelay's own processes only.

They stand beside `kvrelay` in a checkout, and in `kvrelay/_services` of a wheel:
docs/adr/0001-where-a-wheel-puts-the-services.md says why.
"""

import sys
from pathlib import Path

_KVRELAY = Path(__file__).resolve().parent
_RUN_MODULE = _KVRELAY / "run_module.py"


def services_folder() -> Path:
    installed = _KVRELAY / "_services"
    return installed if installed.is_dir() else _KVRELAY.parent


def protos_folder() -> Path:
    return _KVRELAY / "protos" if (_KVRELAY / "protos").is_dir() else _KVRELAY.parent / "protos"


def find_own_packages_first() -> None:
    folder = str(services_folder())
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)


def own_module_command(
    module: str,
    *arguments: str,
    python: str = sys.executable,
    run_module: Path = _RUN_MODULE,
    is_isolated: bool = False,
) -> list[str]:
    """As `python -m`. `python` need not have kvrelay installed; `run_module` may be another
    checkout's. An isolated one reads no PYTHON* variable and no packages of the user.
    """
    return [python, "-I" if is_isolated else "-P", str(run_module), module, *arguments]


def library_command(module: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """As `python -m`, but never a module in the current folder."""
    return [python, "-P", "-m", module, *arguments]
