"""A client dies in the middle of an answer; its next run continues. No token is lost or repeated.

The client keeps the request's id and the answer so far in a file, as a service would in its
database. The first run is a process that ends itself after a few tokens. Meanwhile the cluster goes
on computing, for at most --resume-grace-ms without a client.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from kvrelay.client import Client

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--gateway", default="127.0.0.1:50050", help="host:port of the gateway")
parser.add_argument("--state", type=Path, default=Path("answer.json"), help="where the answer so far is kept")
parser.add_argument("--crash-after", type=int, default=0, help="kill this process after this number of tokens")
arguments = parser.parse_args()


def keep(request_id: str, text: str, num_tokens: int) -> None:
    """Writes a new file and renames it, so that a crash leaves the old or the new state."""
    beside = arguments.state.with_suffix(".new")
    beside.write_text(json.dumps({"request_id": request_id, "text": text, "num_tokens": num_tokens}), "utf-8")
    beside.replace(arguments.state)


def run() -> str:
    """Begins or continues the request, and returns the whole answer."""
    state = json.loads(arguments.state.read_text("utf-8")) if arguments.state.exists() else {}
    text, num_tokens = state.get("text", ""), state.get("num_tokens", 0)
    with Client(arguments.gateway) as client:
        if state:
            stream = client.resume(state["request_id"], from_index=num_tokens)
        else:
            stream = client.generate("Once upon a time", max_tokens=48, temperature=0.8, seed=7, resumable=True)
        for delta in stream:
            text += delta.text
            num_tokens += len(delta.tokens)
            accepted = stream.accepted
            assert accepted is not None, "it comes before the first delta"
            keep(accepted.request_id, text, num_tokens)
            if arguments.crash_after and num_tokens >= arguments.crash_after:
                os._exit(137)
    return text


if arguments.crash_after:
    run()
else:
    arguments.state.unlink(missing_ok=True)
    crashed = subprocess.run([sys.executable, *sys.argv, "--crash-after", "8"], check=False)
    kept_text = json.loads(arguments.state.read_text("utf-8"))["text"]
    print(f"the first run ended with {crashed.returncode} after: {kept_text!r}")
    print(f"the second run went on: {run()!r}")
    arguments.state.unlink()
