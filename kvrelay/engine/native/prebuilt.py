"""The kernels that a wheel brings. The file's name has the digest of their sources, and of how."""

import platform
from pathlib import Path

import structlog

from kvrelay.engine.native.build import SOURCE_FOLDER, sources_digest
from kvrelay.runtime.cache_folder import is_private

PREBUILT_FOLDER = SOURCE_FOLDER / "prebuilt"

_log = structlog.get_logger(__name__)


def prebuilt_name(machine: str) -> str:
    return f"kernels-{machine}-{sources_digest(machine)}.so"


def prebuilt_library() -> Path | None:
    """None: there is none of these sources, or it is not ours alone."""
    path = PREBUILT_FOLDER / prebuilt_name(platform.machine())
    if not path.is_file():
        return None
    for each in (path.parent, path):
        if not is_private(each):
            why = "is another user's, or others may write to it; install kvrelay as this user or root, with umask 022"
            _log.warning("the wheel's kernels are not used", why=f"{each} {why}")
            return None
    return path
