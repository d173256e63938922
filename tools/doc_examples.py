"""Finds the examples in the pages: code by its heading and language, and lines for a shell.

A comment above a block says why it is not run as it stands, or what runs it instead:

    <!-- not run: needs Docker -->
    <!-- run by tests/faults/test_reliability_page.py -->
"""

import ast
import re
from dataclasses import dataclass

SHELL = ("", "sh", "shell", "bash", "console")
"""Languages of blocks with lines for a shell."""
_NOTE = r"(?:^<!-- (?P<note>(?:not )?run[^\n]*) -->\n\n?)?"
_BLOCK = re.compile(_NOTE + r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^##+ (?P<title>.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Example:
    """A block of a page: its heading, its language, its text, and the comment above it."""

    section: str
    language: str
    code: str
    note: str = ""


def examples_of(page: str) -> list[Example]:
    """All blocks of a page of Markdown, in order."""
    headings = [(match.start(), match["title"]) for match in _HEADING.finditer(_BLOCK.sub(_blank, page))]
    found = []
    for match in _BLOCK.finditer(page):
        above = [title for start, title in headings if start < match.start()]
        found.append(Example(above[-1] if above else "", match["language"], match["code"], match["note"] or ""))
    return found


def blocks(page: str, section: str, language: str) -> list[str]:
    """Code of that language under a heading of the page."""
    return [each.code for each in examples_of(page) if (each.section, each.language) == (section, language)]


def commands_of(example: Example) -> list[str]:
    """The lines of a block for a shell, without comments; a line that ends with a backslash goes on
    in the next.
    """
    joined = example.code.replace("\\\n", " ")
    lines = (re.sub(r"(^|\s+)#\s.*$", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]


def imports_of(code: str) -> set[str]:
    """Names of the packages that Python code imports."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def _blank(match: re.Match[str]) -> str:
    """As long as the block: positions stay, and its comments are no headings."""
    return " " * len(match[0])
