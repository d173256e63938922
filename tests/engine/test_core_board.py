"""Cores that are lent: a guest works on another's core only while that core's owner does not."""

import os
from pathlib import Path

import pytest

from kvrelay.core_set import available_cores
from kvrelay.engine.native import load_library
from kvrelay.engine.native.core_board import CoreBoard

pytestmark = pytest.mark.skipif(load_library() is None, reason="no C compiler")


def test_every_other_core_of_the_board_has_a_guest(tmp_path: Path) -> None:
    library = load_library()
    assert library is not None
    own = available_cores()[:1]
    try:
        assert library.use_threads(1, own, CoreBoard(tmp_path / "board", [*own, 5, 6])) == 3
    finally:
        assert library.use_threads(1) == 1


def test_a_board_is_shared_by_all_who_map_it(tmp_path: Path) -> None:
    first, second = CoreBoard(tmp_path / "board", [0]), CoreBoard(tmp_path / "board", [0])
    assert first.worked_ns(0) == second.worked_ns(0) == 0
    assert os.stat(tmp_path / "board").st_mode & 0o777 == 0o600


def test_a_link_in_the_boards_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (tmp_path / "board").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        CoreBoard(tmp_path / "board", [0])
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"
