"""Pages with figures have the tables of the JSON documents, and no number beside them."""

import re
from pathlib import Path

import pytest

from tools import generate_benchmarks
from tools.benchmark_tables import FOLDER, TABLES

PAGES = generate_benchmarks.pages()
NUMBER = re.compile(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?![\w-])")


def numbers_in(text: str) -> set[str]:
    return {number.rstrip(",") for number in NUMBER.findall(text)}


def test_tables_are_what_the_documents_give() -> None:
    assert generate_benchmarks.stale_pages() == [], "run `make benchmark-tables`"


def test_every_table_stands_on_one_page() -> None:
    named = [name for page in PAGES for name in generate_benchmarks.tables_of(page.read_text("utf-8"))]
    assert sorted(named) == sorted(TABLES)


def test_every_document_has_a_table() -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES).replace("](../benchmarks/", "](")
    assert [path.name for path in FOLDER.glob("*.json") if f"]({path.name})" not in text] == []


def test_a_table_that_was_edited_by_hand_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (FOLDER / "transfer.md").read_text("utf-8")
    (tmp_path / "transfer.md").write_text(text.replace("37.6", "27.6"), "utf-8")
    monkeypatch.setattr(generate_benchmarks, "FOLDER", tmp_path)
    assert generate_benchmarks.stale_pages() == ["transfer.md"]
    (tmp_path / "transfer.md").write_text(generate_benchmarks.filled((tmp_path / "transfer.md").read_text()), "utf-8")
    assert generate_benchmarks.stale_pages() == []
    assert (tmp_path / "transfer.md").read_text("utf-8") == text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_number_of_the_prose_stands_in_a_table_of_the_page(page: Path) -> None:
    text = re.sub(r"^```.*?^```|<!--.*?-->", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = text.splitlines()
    tables = "\n".join(line for line in lines if line.startswith("|"))
    prose = "\n".join(line for line in lines if not line.startswith(("|", "#")) and "([values](" not in line)
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)|\d{4}-\d\d-\d\d|\b(?=\w*[a-f])(?=\w*\d)[0-9a-f]{7}\b", "", prose)
    assert sorted(numbers_in(prose) - numbers_in(tables)) == []
