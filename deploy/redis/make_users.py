"""Makes the users of compose's Redis, once: a random password for each role, and an ACL file with
their hashes.

    python make_users.py FOLDER

Each process sees the folder of its own role only: FOLDER/redis, FOLDER/gateway or FOLDER/worker.
Workers reach the registry, and read whose a request is: none of them reads or writes requests.
"""

import hashlib
import os
import secrets
import sys
from pathlib import Path

_COMMANDS = "+@read +@write +@scripting +@connection -@dangerous +info +time"
_KEYS = {"gateway": "~kvrelay:*", "worker": "~kvrelay:{registry}:* ~kvrelay:{probe}:* %R~kvrelay:*:owner"}


def make_users(folder: Path) -> None:
    """Does nothing where the ACL file is there."""
    acl_file = folder / "redis/users.acl"
    if acl_file.exists():
        return
    lines = ["user default off"]
    for role, keys in _KEYS.items():
        password = secrets.token_hex(32)
        _write(folder / role / "redis-password", password)
        lines.append(f"user {role} on #{hashlib.sha256(password.encode()).hexdigest()} {keys} {_COMMANDS}")
    _write(acl_file, "\n".join(lines) + "\n")


def _write(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o400), "w") as file:
        file.write(text)


if __name__ == "__main__":
    make_users(Path(sys.argv[1]))
