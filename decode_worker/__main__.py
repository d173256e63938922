"""`python -m decode_worker`: settings from the environment and the file it names."""

import sys

from decode_worker.main import run
from kvrelay.config import DecodeSettings
from kvrelay.errors import StartupError
from kvrelay.settings_sources import read_sources


def main() -> int:
    """Exit code of the process."""
    try:
        run(read_sources({}).load("decode", DecodeSettings))
    except StartupError as failure:
        print(f"kvrelay decode worker: {failure.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
