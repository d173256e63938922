"""Examples are found in pages as people read them."""

import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from benchmarks.registry import BENCHMARKS
from kvrelay.cli.app import app
from tools.doc_examples import SHELL, Example, blocks, commands_of, examples_of, imports_of
from tools.run_doc_examples import ASKING, ExampleError, Runner

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
CHECKED = ("kvrelay ", "make ", "python -m ", "nice -n 19 python -m ", "pip install ", ". .venv/bin/activate")
"""Beginnings of lines that start or install something. `problem_of` compares them with the code."""
PAGE = """# Page

## Python

```python
# ## no heading
import numpy as np
from openai import OpenAI
```

### On a shell

```
curl -sS http://127.0.0.1:8000/v1/models   # the models
pip install this
curl --data '{"a": "#1"}' \\
  http://127.0.0.1:8000/
```
"""


def test_blocks_have_their_language_and_the_heading_above_them() -> None:
    found = [(each.section, each.language) for each in examples_of(PAGE)]
    assert found == [("Python", "python"), ("On a shell", "")]
    (code,) = blocks(PAGE, "Python", "python")
    assert imports_of(code) == {"numpy", "openai"}


def test_lines_for_a_shell_have_no_comments_and_go_on_after_a_backslash() -> None:
    assert commands_of(examples_of(PAGE)[1]) == [
        "curl -sS http://127.0.0.1:8000/v1/models",
        "pip install this",
        """curl --data '{"a": "#1"}'    http://127.0.0.1:8000/""",
    ]


def test_every_page_with_examples_has_some() -> None:
    assert len(examples_of((ROOT / "docs/guides/clients.md").read_text("utf-8"))) > 10
    assert len(examples_of((ROOT / "README.md").read_text("utf-8"))) > 3


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "pass"], ids=["fails", "says nothing"])
def test_an_example_that_fails_or_says_nothing_is_told(code: str, tmp_path: Path) -> None:
    runner = runner_in(tmp_path)
    with pytest.raises(ExampleError, match=r"ended with 3|said nothing"):
        runner.run(Example("Python", "python", code))


def test_an_example_asks_the_cluster_that_is_there_and_what_installs_or_starts_is_not_run(tmp_path: Path) -> None:
    runner = runner_in(tmp_path)
    assert runner.run(Example("Python", "python", "assert '127.0.0.1:50050' == '127.0.0.1:' + '7'\nprint('well')")) == [
        "python"
    ]
    assert runner.run(Example("Shell", "", "kvrelay serve all\npip install x\n")) == []
    # Of programs that are not there some have stand-ins; this one says what it cannot reach.
    with pytest.raises(ExampleError):
        runner.run(Example("Shell", "", "grpc_health_probe -addr=127.0.0.1:50050"))


def test_a_comment_above_a_block_says_why_it_is_not_run(tmp_path: Path) -> None:
    (example,) = examples_of("<!-- not run: needs Docker -->\n\n```\nkvrelay status\n```\n")
    assert (example.note, example.code) == ("not run: needs Docker", "kvrelay status\n")
    assert runner_in(tmp_path).run(example) == ["left out: not run: needs Docker"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_of_a_page_is_run_or_compared_with_the_code_or_says_why_not(page: Path) -> None:
    shell = [each for each in examples_of(page.read_text("utf-8")) if each.language in SHELL and not each.note]
    lines = [line for example in shell for line in commands_of(example)]
    assert [line for line in lines if not line.startswith((*ASKING, *CHECKED))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_of_a_page_has_options_that_exist(page: Path) -> None:
    shell = [each for each in examples_of(page.read_text("utf-8")) if each.language in SHELL]
    lines = [line.removeprefix("$ ") for example in shell for line in commands_of(example)]
    assert [problem for line in lines if (problem := problem_of(line))] == []


def test_a_command_that_is_none_is_found() -> None:
    assert problem_of("kvrelay serve all --num-decode 2 | tee log --no-option-of-ours") is None
    assert problem_of("kvrelay serve all --numdecode 2") == "kvrelay serve all has no --numdecode"
    assert problem_of("kvrelay bench engine --treads=2") == "kvrelay bench engine has no --treads"
    assert problem_of("kvrelay sing") == "kvrelay has no sing"
    assert problem_of("make tea") == "there is no target tea"
    assert problem_of("python -m tools.none") == "there is no module tools.none"
    assert problem_of("pip install '.[worker,tea]'") == "there is no extra tea"


def problem_of(line: str) -> str | None:
    """What is wrong with a command of ours; None for those of others."""
    words = shlex.split(re.split(r" (?:\||>|&|&&|2>&1) ?", line)[0]) if line.startswith(CHECKED) else [""]
    program, *arguments = words
    if program == "make":
        targets = [
            each for each in arguments if "=" not in each and not re.search(rf"^{each}:", MAKEFILE, re.MULTILINE)
        ]
        return f"there is no target {targets[0]}" if targets else None
    if program == "pip":
        extras = {
            extra for each in arguments for extra in re.findall(r"\w+", each.partition("[")[2]) if each.startswith(".[")
        }
        unknown = sorted(extra for extra in extras if not re.search(rf"^{extra} = \[", PYPROJECT, re.MULTILINE))
        return f"there is no extra {unknown[0]}" if unknown else None
    if "-m" in arguments and program in ("python", "nice"):
        module = arguments[arguments.index("-m") + 1]
        return None if importlib.util.find_spec(module) else f"there is no module {module}"
    return _problem_of_options(arguments) if program == "kvrelay" else None


def _problem_of_options(arguments: list[str]) -> str | None:
    command: Any = typer.main.get_command(app)
    path = "kvrelay"
    while arguments and hasattr(command, "commands") and not arguments[0].startswith("-"):
        name, *arguments = arguments
        if name not in command.commands:
            return f"{path} has no {name}"
        command = command.commands[name]
        if path == "kvrelay bench":
            program = typer.Typer(add_completion=False)
            program.command()(importlib.import_module(BENCHMARKS[name].module).command)
            command = typer.main.get_command(program)
        path += f" {name}"
    known = {"--help", "-h"}.union(*((*each.opts, *each.secondary_opts) for each in command.params))
    given = [word.partition("=")[0] for word in arguments if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", word)]
    unknown = [option for option in given if option not in known]
    return f"{path} has no {unknown[0]}" if unknown else None


MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")


def runner_in(folder: Path) -> Runner:
    """Of this environment, at a gateway that is not there."""
    return Runner(Path(sys.executable).parent, folder / "others", folder, gateway="127.0.0.1:7", openai="127.0.0.1:8")
