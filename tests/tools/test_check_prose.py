"""The checker of prose finds what breaks its rules, and its allow list only shrinks."""

import sys
from pathlib import Path

import pytest

from tools import check_prose

PYPROJECT = '[tool.ruff]\nextend-exclude = ["product/v1"]\n[tool.mypy]\nfiles = ["product"]\n'


def found(source: str) -> list[tuple[int, str]]:
    return [(finding.line, finding.rule) for finding in check_prose.find_in(source, Path("a.py"))]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "product/v1").mkdir(parents=True)
    (tmp_path / "tools").mkdir()
    return tmp_path


def run(root: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["check_prose", *arguments])
    return check_prose.main(root)


def test_a_first_sentence_may_have_25_words() -> None:
    words = " ".join(["a"] * 25)
    assert found(f'"""{words}."""\n') == []
    assert found(f'"""{words} more."""\n') == [(1, check_prose.FIRST_SENTENCE)]
    assert found(f'"""Short.\n\n{words}\n{words}.\n"""\n') == []
    assert found(f'class A:\n    """Short"""\n\n    b = 1\n    """{words} more."""\n') == [
        (5, check_prose.FIRST_SENTENCE)
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Somebody waits.",
        "Waits, for it is slow.",
        "Kept, for a masked NaN would spoil it.",
        "It is to\n    be done.",
        "No worker waits any\n    more.",
    ],
)
def test_banned_words_are_found_across_lines_of_docstrings(text: str) -> None:
    assert [rule for _, rule in found(f'def a():\n    """{text}"""\n')] == [check_prose.BANNED_WORDS]


@pytest.mark.parametrize("text", ["Shown, for a terminal.", "The name, for the log.", "As long as nobody_waits."])
def test_other_words_pass(text: str) -> None:
    assert found(f'"""{text}"""\n') == []


def test_banned_words_are_found_in_comments_and_not_in_code_or_strings() -> None:
    assert found("# one\n# so\n# many\n") == [(2, check_prose.BANNED_WORDS), (1, check_prose.LONG_COMMENT)]
    assert found("nobody = 'so many'  # nobody\n") == [(1, check_prose.BANNED_WORDS)]


def test_lines_of_docstrings_and_of_comments_alone_may_have_100_characters() -> None:
    long = "x" * 99
    assert found(f'"""Short.\n\n{long}\n"""\n# {long[:98]}\na = "{long}"  # {long}\n') == []
    assert found(f'"""Short.\n\n{long}xx\n"""\n# {long}\n') == [(3, check_prose.LONG_LINE), (5, check_prose.LONG_LINE)]


def test_generated_files_are_left_out(root: Path) -> None:
    (root / "product/v1/a.py").write_text("# nobody\n")
    (root / "product/b.py").write_text("# Generated from a.py.\n# nobody\n")
    (root / "product/c.py").write_text("# nobody\n")
    assert [finding.path for finding in check_prose.find_all(root)] == ["product/c.py"]


def test_the_check_fails_on_more_and_on_less_than_allowed_and_says_what_to_do(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = root / "product/a.py"
    file.write_text("# nobody\n")
    assert run(root, monkeypatch) == 1
    assert "product/a.py:1: banned-words: 'nobody'" in capsys.readouterr().err
    assert run(root, monkeypatch, "--update") == 0, "without a list, it writes one"
    assert run(root, monkeypatch) == 0
    file.write_text("# nobody\n\n# somebody\n")
    assert run(root, monkeypatch) == 1
    assert "product/a.py breaks banned-words 2 times, 1 allowed: mend 1 of the above" in capsys.readouterr().err
    file.write_text("")
    assert run(root, monkeypatch) == 1
    assert check_prose.UPDATE in capsys.readouterr().err
    assert run(root, monkeypatch, "--update") == 0
    assert check_prose.read_allowed(root) == {}


def test_update_refuses_to_raise_a_count_and_lets_counts_move_with_a_file(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "product/a.py").write_text("# nobody\n")
    (root / "product/b.py").write_text("")
    assert run(root, monkeypatch, "--update") == 0
    (root / "product/b.py").write_text("# nobody\n")
    assert run(root, monkeypatch, "--update") == 1
    assert check_prose.read_allowed(root) == {("product/a.py", check_prose.BANNED_WORDS): 1}
    (root / "product/a.py").unlink()
    assert run(root, monkeypatch, "--update") == 0
    assert check_prose.read_allowed(root) == {("product/b.py", check_prose.BANNED_WORDS): 1}
