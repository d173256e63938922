"""Which version a process of a rolling upgrade runs."""

from pathlib import Path

import pytest

from kvrelay.cluster.local_cluster import serve_command
from kvrelay.testing.scenarios.rolling_restart import upgrading_command


def test_the_first_starts_run_the_other_checkout_and_later_ones_this_version(tmp_path: Path) -> None:
    module = tmp_path / "kvrelay" / "run_module.py"
    module.parent.mkdir()
    module.touch()
    command = upgrading_command(str(tmp_path), num_old=2)
    assert [str(module) in command("decode"), str(module) in command("gateway")] == [True, True]
    assert command("decode") == serve_command("decode")


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        upgrading_command(str(tmp_path), num_old=1)
