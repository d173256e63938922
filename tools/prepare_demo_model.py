"""Puts the demo model into the model store when it is not there, so that tests do not spend their
time limit on it.
"""

import os
import sys

from rich.console import Console
from rich.progress import Progress

from kvrelay.errors import ModelLoadError
from kvrelay.models.store import DEMO_MODEL, ModelStore, default_model_dir


def main() -> int:
    store = ModelStore(default_model_dir(os.environ))
    console = Console(stderr=True)
    try:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(DEMO_MODEL, total=1.0)
            store.ensure_demo_model(lambda stage, fraction: bar.update(task, description=stage, completed=fraction))
    except ModelLoadError as error:
        console.print(f"error: {error.message}", style="red")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
