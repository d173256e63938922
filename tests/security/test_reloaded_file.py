"""A changed file counts once it rests; a broken one leaves what was before, and says so."""

import os
from pathlib import Path

import pytest

from kvrelay.errors import ConfigError
from kvrelay.security.reloaded_file import MAX_FILE_BYTES, ReloadedFile


def parse(data: bytes) -> str:
    if data.startswith(b"broken"):
        raise ConfigError("is broken")
    return data.decode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("one")
    return path


@pytest.fixture
def file(path: Path) -> ReloadedFile[str]:
    return ReloadedFile(str(path), "test file", parse)


def test_a_changed_file_counts_after_two_polls(path: Path, file: ReloadedFile[str]) -> None:
    assert (file.value, file.poll()) == ("one", False)
    path.write_text("two!")
    assert [file.poll(), file.poll(), file.poll()] == [False, True, False]
    assert file.value == "two!"


def test_a_file_that_is_still_written_to_is_not_read(path: Path, file: ReloadedFile[str]) -> None:
    for length in range(4, 10):
        path.write_text("x" * length)
        assert not file.poll()
    assert file.poll()
    assert file.value == "x" * 9


def test_a_change_that_hides_behind_the_old_time_and_size_is_seen(path: Path, file: ReloadedFile[str]) -> None:
    before = path.stat()
    path.write_text("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert [file.poll(), file.poll()] == [False, True]


def test_a_replaced_link_is_seen(tmp_path: Path, path: Path) -> None:
    link, other = tmp_path / "link", tmp_path / "other"
    other.write_text("two")
    link.symlink_to(path)
    file = ReloadedFile(str(link), "test file", parse)
    (tmp_path / "new").symlink_to(other)
    (tmp_path / "new").rename(link)
    assert [file.poll(), file.poll()] == [False, True]
    assert file.value == "two"


@pytest.mark.parametrize("content", ["broken", "x" * (MAX_FILE_BYTES + 1)])
def test_a_broken_file_keeps_the_value_until_it_is_mended(path: Path, file: ReloadedFile[str], content: str) -> None:
    path.write_text(content)
    assert not any(file.poll() for _ in range(3))
    assert file.value == "one"
    assert str(path) in (file.problem or "")
    path.write_text("mended")
    assert [file.poll(), file.poll()] == [False, True]
    assert (file.value, file.problem) == ("mended", None)


def test_a_missing_file_keeps_the_value_until_it_is_back(path: Path, file: ReloadedFile[str]) -> None:
    path.rename(path.with_name("away"))
    assert not file.poll()
    assert file.value == "one"
    assert "cannot be read" in (file.problem or "")
    path.with_name("away").rename(path)
    assert [file.poll(), file.poll()] == [False, True]
    assert file.problem is None


def test_a_start_with_a_file_that_cannot_be_used_is_refused(path: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    path.write_text("broken")
    for bad in (path, tmp_path / "pipe", tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="test file"):
            ReloadedFile(str(bad), "test file", parse)
