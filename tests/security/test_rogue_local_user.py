"""Another user of the machine and the embedded Valkey: it has no port, no open socket, no readable
password.
"""

import asyncio
import os
import subprocess
import sys
import textwrap

import psutil
import pytest

from kvrelay.state.embedded_valkey import EmbeddedValkey
from tests.support import left_out

OTHER_USER = 65534

# Loads its modules as root, because the other user may not read this installation.
_ROGUE = textwrap.dedent("""
    import os, pathlib, socket, sys

    socket_path, pid, user = sys.argv[1], sys.argv[2], int(sys.argv[3])
    os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)

    def connect():
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(socket_path)

    attempts = {
        "folder": lambda: os.listdir(os.path.dirname(socket_path)),
        "replace": lambda: os.unlink(socket_path),
        "connect": connect,
        "environment": lambda: pathlib.Path(f"/proc/{pid}/environ").read_bytes(),
        "memory": lambda: open(f"/proc/{pid}/mem", "rb"),
        "input": lambda: open(f"/proc/{pid}/fd/0", "rb"),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            print(name, "worked")
        except PermissionError:
            print(name, "refused")
    print("command line", pathlib.Path(f"/proc/{pid}/cmdline").read_text())
""")


@pytest.mark.skipif(os.geteuid() != 0, reason=left_out.not_for("users who cannot become another"))
async def test_another_user_neither_reaches_the_valkey_nor_reads_its_password() -> None:
    async with EmbeddedValkey() as valkey:
        socket_path = valkey.url.partition("@")[2]
        arguments = (socket_path, str(valkey.pid), str(OTHER_USER))
        rogue = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-I", "-c", _ROGUE, *arguments], capture_output=True, text=True, check=True
        )
        assert "worked" not in rogue.stdout
        assert rogue.stdout.count("refused") == 6
        assert valkey.password not in rogue.stdout
        assert not psutil.Process(valkey.pid).net_connections("inet")
