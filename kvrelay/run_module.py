"""Runs a module of the kvrelay that this file belongs to.

    python -P run_module.py MODULE ARGUMENTS...

A script, so that neither the current folder nor PYTHONPATH chooses the kvrelay.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    # For this import only: kvrelay's neighbours, such as site-packages, must not hide the standard
    # library.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import kvrelay  # noqa: F401

    del sys.path[0]
    from kvrelay.own_packages import find_own_packages_first

    find_own_packages_first()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
