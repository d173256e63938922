"""`python -m gateway`: settings from the environment and the file it names."""

import sys

from gateway.main import run
from kvrelay.config.settings import GatewaySettings
from kvrelay.process import run_main

if __name__ == "__main__":
    sys.exit(run_main("gateway", "gateway", GatewaySettings, run))
