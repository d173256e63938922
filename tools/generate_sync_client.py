"""Generates the blocking client of kvrelay/client from the asyncio one.

What differs beyond `async` and `await` is in async_transport.py and sync_transport.py there, which
are written by hand. Knows nothing of what a client does.

python -m tools.generate_sync_client            write the generated code
python -m tools.generate_sync_client --check    exit 1 and name the files that differ
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import unasync

REPO_ROOT = Path(__file__).resolve().parent.parent
CLIENT = Path("kvrelay/client")
SOURCES = ("async_client.py", "async_conversation.py", "async_stream.py")

# What unasync does not know: our own names, and those of a generator as an object.
NAMES = {
    "AsyncClient": "Client",
    "AsyncConversation": "Conversation",
    "AsyncStream": "Stream",
    "AsyncTurn": "Turn",
    "async_conversation": "sync_conversation",
    "async_stream": "sync_stream",
    "async_transport": "sync_transport",
    "AsyncGeneratorType": "GeneratorType",
    "ag_running": "gi_running",
    "aclose": "close",
    "anext": "next",
}


def generated_files() -> dict[str, str]:
    """Path from the repository's root to text of every generated file."""
    with tempfile.TemporaryDirectory() as directory:
        asynchronous, blocking = Path(directory, "async"), Path(directory, "sync")
        asynchronous.mkdir()
        for name in SOURCES:
            (asynchronous / name).write_text((REPO_ROOT / CLIENT / name).read_text("utf-8"), "utf-8")
        rule = unasync.Rule(f"{asynchronous}/", f"{blocking}/", additional_replacements=NAMES)
        unasync.unasync_files([str(asynchronous / name) for name in SOURCES], [rule])
        return {
            (CLIENT / f"sync_{name.removeprefix('async_')}").as_posix(): _finish(
                name, (blocking / name).read_text("utf-8")
            )
            for name in SOURCES
        }


def stale_files() -> list[str]:
    """Paths of generated files that are missing, or are not what their source gives."""
    return sorted(name for name, text in generated_files().items() if _present(REPO_ROOT / name) != text)


def write() -> None:
    """Replaces the generated files."""
    for name, text in generated_files().items():
        (REPO_ROOT / name).write_text(text, "utf-8")


def _finish(source: str, text: str) -> str:
    """The text with its first line, docstrings without `async`, sorted imports, and formatted."""
    text = re.sub(r"\b(?:async|await) ", "", text)  # what unasync leaves of them is in docstrings
    text = re.sub(r"\w+", lambda word: NAMES.get(word[0], word[0]), text)
    text = f"# Generated from {source} by tools/generate_sync_client.py (`make sync-client`). Do not edit.\n{text}"
    ruff = (sys.executable, "-m", "ruff")
    in_client = ("--quiet", f"--stdin-filename={REPO_ROOT / CLIENT / 'sync.py'}", "-")
    for command in (("check", "--fix-only", "--select=I"), ("format",)):
        text = subprocess.run(
            [*ruff, *command, *in_client], input=text, capture_output=True, encoding="utf-8", check=True
        ).stdout
    return text


def _present(path: Path) -> str | None:
    return path.read_text("utf-8") if path.exists() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 when the generated code is stale")
    if not parser.parse_args().check:
        write()
        return 0
    stale = stale_files()
    for name in stale:
        print(f"{name} is not what its source gives; run `make sync-client`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
