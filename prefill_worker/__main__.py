"""`python -m prefill_worker`: settings from the environment and the file it names."""

import sys

from kvrelay.config.settings import PrefillSettings
from kvrelay.process import run_main
from prefill_worker.main import run

if __name__ == "__main__":
    sys.exit(run_main("prefill worker", "prefill", PrefillSettings, run))
