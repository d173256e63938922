"""Fills the pages of docs/benchmarks, and one elsewhere, with tables of the JSON documents there.

python -m tools.generate_benchmarks            write the tables
python -m tools.generate_benchmarks --check    exit 1 and name the pages that differ

A page names its tables, and what stands between the marks is generated:

    <!-- table: engines -->
    <!-- end of table -->
"""

import argparse
import re
import sys
from pathlib import Path

from tools.benchmark_tables import FOLDER, TABLES

EXPLANATION = FOLDER.parent / "architecture/why-kv-can-travel.md"
"""A page outside of the documents' folder."""
_TABLE = re.compile(r"<!-- table: (?P<name>\w+) -->\n.*?<!-- end of table -->", re.DOTALL)


def filled(text: str, documents: str = "") -> str:
    """The page with its tables as the documents give them.

    Args:
        documents: the way from the page to their folder, as links begin.

    Raises:
        KeyError: the page names a table that does not exist.
    """

    def fresh(found: re.Match[str]) -> str:
        name = found["name"]
        made = TABLES[name]().replace("([values](", f"([values]({documents}")
        return f"<!-- table: {name} -->\n\n{made}\n\n<!-- end of table -->"

    return _TABLE.sub(fresh, text)


def tables_of(text: str) -> list[str]:
    """Names of the tables that the page has."""
    return [found["name"] for found in _TABLE.finditer(text)]


def pages() -> list[Path]:
    return [*sorted(FOLDER.glob("*.md")), EXPLANATION]


def fresh_page(path: Path) -> str:
    return filled(path.read_text("utf-8"), "../benchmarks/" if path == EXPLANATION else "")


def stale_pages() -> list[str]:
    """Names of the pages whose tables are not what the documents give."""
    return [path.name for path in pages() if fresh_page(path) != path.read_text("utf-8")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 when a page is stale")
    if not parser.parse_args().check:
        for path in pages():
            path.write_text(fresh_page(path), "utf-8")
        return 0
    stale = stale_pages()
    for name in stale:
        print(f"{name} differs from its JSON documents; run `make benchmark-tables`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
