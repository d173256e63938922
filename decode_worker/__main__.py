"""`python -m decode_worker`: settings from the environment and the file it names."""

import sys

from decode_worker.main import run
from kvrelay.config.settings import DecodeSettings
from kvrelay.process import run_main

if __name__ == "__main__":
    sys.exit(run_main("decode worker", "decode", DecodeSettings, run))
