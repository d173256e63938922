"""The command line. Each command is a function in the module of its subject; `app` puts them together."""

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 well, 1 an expected error, 2 wrong usage or setting, 130 interrupted."""
    try:
        # Within the try: a Ctrl-C while libraries are imported is no reason for a traceback either.
        from kvrelay.cli.app import run

        run(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
