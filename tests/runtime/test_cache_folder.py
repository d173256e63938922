"""Where models and kernels are kept: in the user's cache, or, without one, in a folder that nobody
else writes to.
"""

import os
import tempfile
from pathlib import Path

import pytest

from kvrelay.errors import StartupError
from kvrelay.runtime.cache_folder import cache_folder, falls_back, is_private, make_private, temporary_folder
from kvrelay.runtime.cpu_cores import default_core_sharing_file


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def nameless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home: no $HOME, and no entry in the list of users."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)


def test_a_user_with_a_home_keeps_things_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder({}) == tmp_path / ".cache" / "kvrelay"


def test_a_folder_that_was_named_is_used_whatever_it_is() -> None:
    assert cache_folder({"XDG_CACHE_HOME": "/proc/nope"}) == Path("/proc/nope/kvrelay")


def test_a_user_without_a_home_gets_a_private_folder_among_temporary_files(temporary: Path, nameless: None) -> None:
    folder = cache_folder({})
    assert folder == temporary / f"kvrelay-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert falls_back(folder)


def test_a_home_that_cannot_be_written_to_is_none(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null")  # which not even the administrator can use
    assert cache_folder({}) == temporary / f"kvrelay-{os.getuid()}"


def test_a_folder_that_others_may_write_to_is_not_used(
    temporary: Path, nameless: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (temporary / f"kvrelay-{os.getuid()}").symlink_to(temporary)
    with pytest.raises(StartupError, match=r"is another user's, or others may write to it.*set XDG_CACHE_HOME"):
        cache_folder({})


def test_without_any_folder_whoever_needs_none_goes_on(nameless: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    assert temporary_folder() is None
    assert not cache_folder({}).exists()


def test_a_folder_of_an_umask_that_lets_a_group_write_is_made_private(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        (tmp_path / "made").mkdir()
        assert not is_private(tmp_path / "made")
        assert make_private(tmp_path / "made")
        assert make_private(tmp_path / "new" / "below")
    finally:
        os.umask(before)
    assert is_private(tmp_path / "made")
    assert is_private(tmp_path / "new" / "below")


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_what_others_may_write_to_is_not_private(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    assert not is_private(path)
    path.chmod(0o644)
    assert is_private(path)


def test_what_belongs_to_another_user_is_not_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.touch()
    if os.getuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert not is_private(path)


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert not is_private(tmp_path / "link")


def test_where_nothing_can_be_written_there_is_no_core_sharing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert default_core_sharing_file() is None
