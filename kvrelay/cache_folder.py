"""Where kvrelay keeps what it can make again: models, compiled kernels. Knows nothing of what these are."""

from collections.abc import Mapping
from pathlib import Path


def cache_folder(environment: Mapping[str, str]) -> Path:
    """kvrelay's folder in the user's cache: in $XDG_CACHE_HOME, or in ~/.cache. It need not exist."""
    cache = environment.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    base = Path(cache) if Path(cache).is_absolute() else Path("~/.cache").expanduser()
    return base / "kvrelay"
