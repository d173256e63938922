"""The folder for what kvrelay can make again: models, compiled kernels.

A container's user may have no home. A folder among the temporary files must be private, because
other users can guess its name.
"""

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kvrelay.errors import StartupError

_WRITTEN_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Chooses $XDG_CACHE_HOME, else ~/.cache, else a private folder among the temporary files.

    Raises:
        StartupError: that one belongs to another user.
    """
    if (named := _named_cache(environment)) is not None:
        return named / "kvrelay"
    home = _home_cache()
    if home is not None and _can_read_or_make(home / "kvrelay"):
        return home / "kvrelay"
    advice = "set XDG_CACHE_HOME to a folder that this user may write to"
    fallback = temporary_folder()
    if fallback is None:  # not an error for a process that stores nothing
        return (home or Path("/nonexistent")) / "kvrelay"
    try:
        if not make_private(fallback):
            raise StartupError(
                f"{fallback} is another user's, or others may write to it, and there is no home to use; {advice}"
            )
    except OSError as error:
        raise StartupError(
            f"{fallback} cannot be made ({error.strerror}), and there is no home to use; {advice}"
        ) from error
    return fallback


def falls_back(folder: Path) -> bool:
    return folder == temporary_folder()


def temporary_folder() -> Path | None:
    try:
        return Path(tempfile.gettempdir()) / f"kvrelay-{os.getuid()}"
    except OSError:  # nothing is writable
        return None


def make_private(folder: Path) -> bool:
    """Returns whether it is private now. Raises OSError when it cannot be made."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and status.st_mode & _WRITTEN_BY_OTHERS:
        # An earlier umask may have let a group write.
        folder.chmod(stat.S_IMODE(status.st_mode) & ~_WRITTEN_BY_OTHERS)
    return is_private(folder)


def is_private(path: Path) -> bool:
    """Whether only this user, or root, can write to it."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return not stat.S_ISLNK(status.st_mode) and is_own(status)


def is_own(status: os.stat_result) -> bool:
    """As `is_private`, for an open file."""
    return status.st_uid in (0, os.getuid()) and not status.st_mode & _WRITTEN_BY_OTHERS


def _named_cache(environment: Mapping[str, str]) -> Path | None:
    cache = environment.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    return Path(cache) if os.path.isabs(cache) else None


def _home_cache() -> Path | None:
    # expanduser changes nothing without $HOME and an entry in the list of users.
    home = os.path.expanduser("~")
    return Path(home, ".cache") if os.path.isabs(home) else None


def _can_read_or_make(folder: Path) -> bool:
    if os.path.isdir(folder):
        return os.access(folder, os.R_OK | os.X_OK)
    nearest = next(parent for parent in folder.parents if os.path.lexists(parent))
    return os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK)
