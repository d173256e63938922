"""A text that every machine has: licences and Python sources of installed packages, in turns. The same for the same versions."""

from collections.abc import Iterator
from importlib.metadata import distribution
from itertools import islice, zip_longest
from pathlib import Path

PACKAGES = ("torch", "transformers", "numpy", "grpcio", "pydantic", "rich", "redis", "typer")
"""Those that kvrelay's workers have installed, in the order in which they are read."""
MIN_FILE_CHARACTERS = 2_000
MAX_FILE_CHARACTERS = 12_000
"""Of one file; a text of one subject would say little."""
LICENCES_OF_A_PACKAGE = 2
SOURCES_OF_A_PACKAGE = 6


def installed_text(num_characters: int) -> str:
    """So many characters, or all there are if those are fewer: the beginnings of a licence, a source, a licence, and so on."""
    licences = (path for package in PACKAGES for path in _files(package, ".dist-info/", "LICENSE", LICENCES_OF_A_PACKAGE))
    sources = (path for package in PACKAGES for path in _files(package, "", ".py", SOURCES_OF_A_PACKAGE))
    parts: list[str] = []
    for path in _in_turns(licences, sources):
        parts.append(path.read_text("utf-8", errors="replace")[:MAX_FILE_CHARACTERS])
        if sum(map(len, parts)) >= num_characters:
            break
    return "".join(parts)[:num_characters]


def _in_turns(first: Iterator[Path], second: Iterator[Path]) -> Iterator[Path]:
    for pair in zip_longest(first, second):
        yield from (path for path in pair if path is not None)


def _files(package: str, folder: str, name: str, num_files: int) -> Iterator[Path]:
    """The first files of an installed package by name, of those that hold enough text."""
    installed = distribution(package)
    found = sorted(str(path) for path in installed.files or [] if folder in str(path) and name in path.name)
    paths = (Path(str(installed.locate_file(path))) for path in found)
    return islice((path for path in paths if path.is_file() and path.stat().st_size >= MIN_FILE_CHARACTERS), num_files)
