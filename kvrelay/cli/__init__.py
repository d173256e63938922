"""The command line. Each command is a function in its subject's module; `app` registers them."""

import sys
from collections.abc import Sequence

from kvrelay.own_packages import find_own_packages_first

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 success, 1 expected error, 2 wrong usage or setting, 130
    interrupted.
    """
    find_own_packages_first()
    try:
        # Inside the try, so that Ctrl-C during imports shows no traceback.
        from kvrelay.cli.app import run

        run(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
