"""What a benchmark writes: the document, tables and plots."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.report import Report, cell_text, command_line
from kvrelay.errors import ConfigError

PNG_HEAD = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Result:
    name: str
    tokens_per_s: float


def test_the_document_has_machine_versions_notes_and_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / "memory.json"
    report = Report("memory", path, None)
    report.add(Result("a", 1.23456), {"name": "b", "tokens_per_s": 2.0})
    report.note("One core was busy.")
    report.finish()
    document = json.loads(path.read_text())
    assert list(document) == ["benchmark", "command", "date", "machine", "versions", "notes", "results"]
    assert document["benchmark"] == "memory"
    assert document["results"] == [{"name": "a", "tokens_per_s": 1.2346}, {"name": "b", "tokens_per_s": 2.0}]
    assert document["notes"] == ["One core was busy."]
    assert document["machine"]["num_cores"] >= 1
    assert document["machine"]["memory_bytes"] > 2**28
    assert {"kvrelay", "python", "torch", "transformers"} <= set(document["versions"])
    assert "One core was busy." in capsys.readouterr().out


def test_nothing_is_written_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = Report("memory", None, None)
    report.plot_lines("curve", "title", "x", "y", {"a": ([1.0], [1.0])})
    report.finish()
    assert list(tmp_path.iterdir()) == []


def test_plots_are_png_files(tmp_path: Path) -> None:
    report = Report("memory", None, tmp_path / "plots")
    report.plot_lines("curve", "title", "x", "y", {"a": ([1.0, 2.0], [1.0, 4.0])}, log_y=True)
    assert (tmp_path / "plots" / "curve.png").read_bytes().startswith(PNG_HEAD)


def test_a_path_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        Report("memory", None, tmp_path / "file" / "plots")


def test_tables_show_numbers_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    Report("memory", None, None).print_table("Title", ["name", "value"], [["a", 12345.678], ["b", None]])
    assert "12,345.7" in capsys.readouterr().out
    assert [cell_text(value) for value in (None, True, 1234, 0.25, "text")] == ["", "True", "1,234", "0.2", "text"]


def test_the_command_is_shown_without_its_folder() -> None:
    assert (
        command_line(["/some/where/kvrelay", "bench", "memory", "--json", "a b"]) == "kvrelay bench memory --json 'a b'"
    )
    assert command_line(["/some/benchmarks/__main__.py"]) == "python -m benchmarks"
