"""The lists of mutations follow the sources, and what runs them counts a test that hangs."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.all_mutations import LISTS
from tests.support.mutations import ROOT, Mutation, run_bounded

MUTATIONS = [mutation for mutations in LISTS.values() for mutation in mutations]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_finds_what_it_replaces_and_names_a_test(mutation: Mutation) -> None:
    assert mutation.apply(ROOT) != (ROOT / mutation.path).read_text("utf-8")
    path, _, name = mutation.test.partition("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text("utf-8")


def test_each_mutation_has_a_name_of_its_own() -> None:
    assert [name for name, count in Counter(mutation.name for mutation in MUTATIONS).items() if count > 1] == []


def test_every_list_is_run() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("**/*mutations.py")}
    lists = {f"{module.replace('.', '/')}.py" for module in LISTS}
    others = {"tests/all_mutations.py", "tests/support/mutations.py", "tests/project/test_mutations.py"}
    assert files - lists - others == {"tests/fuzz/mutations.py", "tests/fuzz/kv_mutations.py"}


def test_what_does_not_end_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """A child that keeps the output open would hold a pipe's reader as long as it lives."""
    child = "import time; time.sleep(3600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run_bounded([sys.executable, "-c", parent], tmp_path, 0.5) is None


def test_what_ends_tells_its_code_and_its_words(tmp_path: Path) -> None:
    words = "import os, sys; print(os.getcwd()); sys.exit(3)"
    assert run_bounded([sys.executable, "-c", words], tmp_path, 60) == (3, f"{tmp_path.resolve()}\n")
