"""What is skipped is said in a line with how to have it, and fails a run in CI."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support import left_out

ROOT = Path(__file__).resolve().parents[2]
ONE_TEST = "tests/state/test_state_store.py::test_forgotten_requests_are_skipped_and_cleaned[redis]"
RUN_TIMEOUT_S = 100


def test_what_could_be_installed_is_said_with_how_and_what_means_nothing_here_is_not() -> None:
    reasons = Counter({left_out.REDIS_SERVER: 94, left_out.CHROMIUM: 1, left_out.not_for("machines with CUDA"): 1})
    assert left_out.line_of(reasons) == (
        "left out: 94 tests need Debian's redis-server: apt-get install redis-server; "
        "1 test needs Chromium: apt-get install chromium"
    )
    assert left_out.line_of(Counter({left_out.not_for("macOS"): 3})) == ""


def test_a_run_without_skips_allows_only_those_that_mean_nothing_here() -> None:
    reasons = Counter({left_out.C_COMPILER: 2, "I had no time": 1, left_out.MEMFD: 5})
    assert left_out.forbidden(reasons) == [f"2 skipped: {left_out.C_COMPILER}", "1 skipped: I had no time"]


@pytest.mark.parametrize("options", [[], ["--no-skips", "--numprocesses", "1"]], ids=["user", "CI"])
def test_a_machine_without_redis_server_passes_for_a_user_and_fails_in_ci(options: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", ONE_TEST, "-p", "no:cacheprovider", *options]
    environment = {**os.environ, "PATH": str(tmp_path)}  # where there is no redis-server
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=RUN_TIMEOUT_S
    )
    assert run.returncode == (1 if options else 0), run.stdout + run.stderr
    *_, said, counts = run.stdout.splitlines()
    assert left_out.REDIS_SERVER.removeprefix("needs ") in said
    assert "skipped" in counts
