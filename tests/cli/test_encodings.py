"""The command line where the system's encoding is not UTF-8: no traceback, nothing lost, arguments
as they were typed.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("kvrelay", "gateway", "prefill_worker", "decode_worker", "benchmarks", "tools")

ENVIRONMENTS = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    {"LC_ALL": "POSIX"},
    {"LC_ALL": "C.UTF-8"},
]
TEXT = "日本 é 😀"
CODE = f"""
import sys
from kvrelay.cli.encodings import decoded_arguments, prepare_streams
from kvrelay.cli.views.output import print_error, print_json, write_text
from kvrelay.errors import KvrelayError
prepare_streams()
(argument,) = decoded_arguments(sys.argv[1:])
assert argument == {TEXT!a}, ascii(argument)
assert sys.stdin.readline() == {TEXT!a} + chr(10), "standard input"
print_json({{"text": argument}})
write_text(argument + chr(10))
print_error(KvrelayError(argument))
"""


def run(environment: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    command: list[str | bytes] = [sys.executable, "-c", CODE.encode(), TEXT.encode()]
    return subprocess.run(
        command,
        input=f"{TEXT}\n".encode(),
        capture_output=True,
        env={**kept, **environment},
        cwd=ROOT,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_text_goes_in_as_it_was_typed_and_comes_out_as_far_as_it_can(environment: dict[str, str]) -> None:
    done = run(environment)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    as_json, text, *_ = done.stdout.decode("utf-8").split("\n")
    assert json.loads(as_json) == {"text": TEXT}
    assert text in (TEXT, TEXT.encode("ascii", "backslashreplace").decode())
    assert b"error: " in done.stderr


def test_what_no_encoding_can_read_arrives_as_something_that_is_refused() -> None:
    code = (
        "import sys; from kvrelay.cli.encodings import decoded_arguments; print(ascii(decoded_arguments(sys.argv[1:])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, b"a\xff"], capture_output=True, cwd=ROOT, timeout=120, check=True, encoding="ascii"
    )
    assert done.stdout.strip() == r"['a\udcff']", "a lone surrogate, which requests may not have"


def is_text_without_encoding(call: ast.Call) -> bool:
    """Whether a call reads or writes text in whatever encoding the system has."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    keywords = {keyword.arg for keyword in call.keywords}
    if "encoding" in keywords:
        return False
    if name == "read_text":
        return not call.args
    if name == "write_text":
        return isinstance(call.func, ast.Attribute) and len(call.args) < 2
    if name == "open" and isinstance(call.func, ast.Name):
        return not (len(call.args) > 1 and "b" in ast.unparse(call.args[1]))
    return name in ("run", "Popen", "check_output") and bool(keywords & {"text", "universal_newlines"})


def test_files_and_pipes_of_text_name_their_encoding() -> None:
    found = []
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        found += [f"{path.relative_to(ROOT)}:{call.lineno}" for call in calls if is_text_without_encoding(call)]
    assert found == []
