"""Pins images of others by digest, in docker-compose.yml and the Dockerfile.

python -m tools.pin_images            write the digest of each tag; docker asks the registry
python -m tools.pin_images --check    exit 1 and name the images without a digest; offline
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("docker-compose.yml", "Dockerfile")
TIMEOUT_S = 120.0

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# A tag tells an image of others from a stage of the Dockerfile, and from what compose builds.
_IMAGE = re.compile(
    r"^(?P<before>\s*image:\s*|FROM\s+)(?P<tagged>[a-z0-9][\w./:-]*:[\w.-]+)(?P<digest>@sha256:[0-9a-f]{64})?(?=\s|$)",
    re.MULTILINE,
)


class PinError(Exception):
    """What is wrong, and what to do."""


def unpinned(text: str) -> Iterator[str]:
    """Images with a tag alone."""
    return (found["tagged"] for found in _IMAGE.finditer(text) if found["digest"] is None)


def pinned(text: str, digest_of: Callable[[str], str]) -> str:
    return _IMAGE.sub(lambda found: f"{found['before']}{found['tagged']}@{digest_of(found['tagged'])}", text)


def ask_registry(image: str) -> str:
    command = ("docker", "buildx", "imagetools", "inspect", image, "--format", "{{.Manifest.Digest}}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, timeout=TIMEOUT_S)
    except FileNotFoundError:
        raise PinError("docker is not installed, which asks the registry: install it with its plugin buildx") from None
    digest = done.stdout.strip()
    if done.returncode or _DIGEST.fullmatch(digest) is None:
        raise PinError(f"the registry says no digest of {image}: {done.stderr.strip() or digest}")
    return digest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only look; exit 1 when an image has no digest")
    options = parser.parse_args()
    texts = {ROOT / name: (ROOT / name).read_text("utf-8") for name in FILES}
    if options.check:
        found = [f"{path.name}: {image} has no digest" for path, text in texts.items() for image in unpinned(text)]
        print("\n".join(found), file=sys.stderr, end="\n" if found else "")
        return 1 if found else 0
    try:
        # All of them first: a failure changes no file.
        changed = {path: pinned(text, ask_registry) for path, text in texts.items()}
    except PinError as problem:
        print(problem, file=sys.stderr)
        return 1
    for path, text in changed.items():
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
