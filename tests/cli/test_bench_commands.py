"""`kvrelay bench` finds benchmarks by name, hands their options on, and says what is not installed."""

import subprocess
import sys
import types
from pathlib import Path
from typing import Annotated

import pytest
import typer

from benchmarks.registry import BENCHMARKS, Benchmark
from kvrelay.cli import bench_commands
from kvrelay.errors import StartupError


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """The command line with one benchmark, `fake`, and one that is not there."""
    module = types.ModuleType("benchmarks.fake")

    def command(tokens: Annotated[int, typer.Option("--tokens")] = 1000) -> None:
        """A benchmark for tests."""
        print(f"measured {tokens} tokens")

    vars(module)["command"] = command
    monkeypatch.setitem(sys.modules, "benchmarks.fake", module)
    monkeypatch.setitem(BENCHMARKS, "fake", Benchmark("benchmarks.fake", "A benchmark for tests."))
    monkeypatch.setitem(BENCHMARKS, "absent", Benchmark("benchmarks.absent", "Not there."))
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("other")(lambda: None)
    bench_commands.add_to(app)
    return app


def run(app: typer.Typer, *arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        app(args=list(arguments), prog_name="kvrelay")
    return end.value.code


def test_a_benchmark_gets_its_own_options(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, "bench", "fake", "--tokens", "7") == 0
    assert capsys.readouterr().out == "measured 7 tokens\n"


def test_help_of_a_benchmark_is_its_own(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, "bench", "fake", "--help") == 0
    assert "--tokens" in capsys.readouterr().out


def test_a_wrong_option_is_wrong_usage(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, "bench", "fake", "--tokns", "7") == 2
    assert "--tokns" in capsys.readouterr().err


def test_a_benchmark_that_is_not_there_is_named(app: typer.Typer) -> None:
    with pytest.raises(StartupError, match=r"bench absent cannot run: benchmarks\.absent is not installed"):
        app(args=["bench", "absent"], prog_name="kvrelay")


def test_a_library_that_is_not_there_is_named_with_its_extra(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    def command() -> None:
        raise ModuleNotFoundError("no", name="matplotlib.axes")

    monkeypatch.setattr(sys.modules["benchmarks.fake"], "command", command)
    with pytest.raises(StartupError, match=r"matplotlib.axes is not installed; .*pip install '\.\[bench\]'"):
        app(args=["bench", "fake"], prog_name="kvrelay")


def test_without_the_package_the_command_says_so(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['benchmarks'] = None\n")
    command = [sys.executable, "-m", "kvrelay.cli", "bench", "memory", "--json", "x"]
    environment = {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}", "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert result.returncode == 1
    assert "`benchmarks` is not installed" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_list_of_benchmarks_needs_no_libraries_of_theirs() -> None:
    code = (
        "import sys, kvrelay.cli.app; "
        "print([name for name in ('torch', 'matplotlib', 'psutil', 'grpc') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
