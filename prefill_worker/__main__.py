"""`python -m prefill_worker`: settings from the environment and the file it names."""

import sys

from kvrelay.config import PrefillSettings
from kvrelay.errors import StartupError
from kvrelay.settings_sources import read_sources
from prefill_worker.main import run


def main() -> int:
    """Exit code of the process."""
    try:
        run(read_sources({}).load("prefill", PrefillSettings))
    except StartupError as failure:
        print(f"kvrelay prefill worker: {failure.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
