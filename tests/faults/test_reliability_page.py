"""The pages say what is there: steps, tests and an example that runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reference/reliability.md").read_text("utf-8")
GUIDE = (ROOT / "docs/guides/test-your-cluster.md").read_text("utf-8")
PRODUCT = ("gateway", "prefill_worker", "decode_worker", "kvrelay")


def test_every_named_step_stands_in_the_page_and_in_the_code() -> None:
    sources = "".join(path.read_text("utf-8") for package in PRODUCT for path in (ROOT / package).rglob("*.py"))
    calls = r"fault_point\(\s*\"([a-z_.]+)\"|\w+\.\w+: \"(gateway\.[a-z_]+)\""
    in_code = {first or second for first, second in re.findall(calls, sources)}
    in_page = set(re.findall(r"`((?:gateway|prefill|decode)\.[a-z_]+)`", GUIDE))
    assert len(in_code) > 20
    assert in_page == in_code


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+?)(?:\.\.\.)?`", PAGE.replace("_...", "..."))
    assert len(named) > 20
    missing = [
        (file, name) for file, name in named if f"def {name}" not in (ROOT / "tests/faults" / file).read_text("utf-8")
    ]
    assert not missing


@pytest.mark.soak
@pytest.mark.integration
def test_the_pages_example_runs_as_it_stands(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "test_example.py").write_text(example)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "kvrelay.testing.pytest_plugin",
        str(tmp_path / "test_example.py"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:]
