"""Atheris over every target, from the corpus on; skipped where it is not installed."""

import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import corpus
from tests.support import left_out

WITHOUT_ATHERIS = sys.platform != "linux" or platform.machine() != "x86_64" or sys.version_info >= (3, 14)
"""Where there is no wheel of it, as pyproject.toml has it."""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason=left_out.not_for("platforms without a wheel of atheris") if WITHOUT_ATHERIS else left_out.ATHERIS,
)

NUM_RUNS = 30_000
SOAK = (pytest.mark.soak, pytest.mark.timeout(180))
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("target", "limit"),
    [
        ("push", f"-runs={NUM_RUNS}"),
        *(
            pytest.param(target, "-max_total_time=60", marks=[pytest.mark.soak, pytest.mark.timeout(180)])
            for target in corpus.MAKERS
        ),
    ],
)
def test_no_input_that_is_led_by_coverage_crashes(target: str, limit: str, tmp_path: Path) -> None:
    found = tmp_path / "found"
    found.mkdir()
    folders = [str(found), str(corpus.FOLDER / target)]
    command = [sys.executable, "-m", "tests.fuzz.coverage_guided", target, limit, "-max_len=4096", "-rss_limit_mb=0"]
    outcome = subprocess.run(
        [*command, f"-artifact_prefix={tmp_path}/", *folders], cwd=ROOT, capture_output=True, text=True, check=False
    )
    crashes = {file.name: file.read_bytes().hex() for file in tmp_path.iterdir() if file.is_file()}
    assert outcome.returncode == 0, f"{crashes}\n{outcome.stderr[-3000:]}"
    assert "DONE" in outcome.stderr
    assert any(found.iterdir()), "no new branch was found: nothing is instrumented"
