"""A text that every machine has: licences and Python sources of installed packages, in turns. The
same for the same versions.
"""

import re
from collections.abc import Iterator
from importlib.metadata import distribution
from itertools import islice, zip_longest
from pathlib import Path

PACKAGES = ("pydantic", "numpy", "rich", "grpcio", "redis", "transformers", "torch", "typer")
"""Those that kvrelay's workers have installed, in the order in which they are read."""
LICENCE, SOURCE = re.compile(r"\.dist-info/.*LICENSE"), re.compile(r"\.py$")
MIN_FILE_CHARACTERS = 1_000
MAX_FILE_CHARACTERS = 6_000
"""Of one file; a text of one subject would say little."""
FILES_OF_A_PACKAGE = 6
"""Of each kind."""


def installed_text(num_characters: int) -> str:
    """So many characters, or all there are if those are fewer: a licence and a source of every
    package, then the next ones.
    """
    parts: list[str] = []
    num_found = 0
    for path in _paths():
        parts.append(path.read_text("utf-8", errors="replace")[:MAX_FILE_CHARACTERS])
        num_found += len(parts[-1])
        if num_found >= num_characters:
            break
    return "".join(parts)[:num_characters]


def _paths() -> Iterator[Path]:
    for row in zip_longest(*(_pairs(package) for package in PACKAGES), fillvalue=(None, None)):
        yield from (path for pair in row for path in pair if path is not None)


def _pairs(package: str) -> Iterator[tuple[Path | None, Path | None]]:
    """A licence and a source, and again."""
    yield from zip_longest(_files(package, LICENCE), _files(package, SOURCE))


def _files(package: str, name: "re.Pattern[str]") -> Iterator[Path]:
    """The first files of an installed package by name, of those that hold enough text."""
    installed = distribution(package)
    found = sorted(str(path) for path in installed.files or [] if name.search(str(path)))
    paths = (Path(str(installed.locate_file(path))) for path in found)
    large = (path for path in paths if path.is_file() and path.stat().st_size >= MIN_FILE_CHARACTERS)
    yield from islice(large, FILES_OF_A_PACKAGE)
