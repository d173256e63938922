"""Lent cores: a borrower works on a core only while its owner does not."""

import os
from pathlib import Path

import pytest

from kvrelay.engine.native import load_library
from kvrelay.engine.native.core_sharing import CoreActivityTable
from kvrelay.runtime.cpu_cores import available_cores
from tests.support import left_out

pytestmark = pytest.mark.skipif(load_library() is None, reason=left_out.C_COMPILER)


def test_every_other_core_of_the_table_has_a_borrower(tmp_path: Path) -> None:
    library = load_library()
    assert library is not None
    own = available_cores()[:1]
    others = [core for core in (5, 6, 7) if core not in own][:2]
    try:
        assert library.use_threads(1, own, CoreActivityTable(tmp_path / "cores", [*own, *others])) == 3
    finally:
        assert library.use_threads(1) == 1


def test_all_who_map_a_table_share_it(tmp_path: Path) -> None:
    first, second = CoreActivityTable(tmp_path / "cores", [0]), CoreActivityTable(tmp_path / "cores", [0])
    assert first.worked_ns(0) == second.worked_ns(0) == 0
    assert os.stat(tmp_path / "cores").st_mode & 0o777 == 0o600


def test_a_link_in_the_tables_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (tmp_path / "cores").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        CoreActivityTable(tmp_path / "cores", [0])
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"
