"""`python -m gateway`: settings from the environment and the file it names."""

import sys

from gateway.main import run
from kvrelay.config import GatewaySettings
from kvrelay.errors import StartupError
from kvrelay.settings_sources import read_sources


def main() -> int:
    """Exit code of the process."""
    try:
        run(read_sources({}).load("gateway", GatewaySettings))
    except StartupError as failure:
        print(f"kvrelay gateway: {failure.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
