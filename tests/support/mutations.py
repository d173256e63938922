"""Changes a copy of the sources and looks whether a test notices."""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = (
    "kvrelay",
    "gateway",
    "prefill_worker",
    "decode_worker",
    "tests",
    "benchmarks",
    "tools",
    "docs",
    "protos",
    "examples",
    "deploy",
)
FILES = ("pyproject.toml", "constraints.txt", "docker-compose.yml", "Dockerfile")
TIMEOUT_S = 300
"""Bounds a test whose own timeout never gets the interpreter."""
BASELINE_TIMEOUT_S = 3600
TEST_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Mutation:
    """What is replaced where, and the test that must notice.

    `timeout_s`: short where the test hangs with the mutation, which counts as noticed.
    """

    name: str
    path: str
    old: str
    new: str
    test: str
    timeout_s: int = TEST_TIMEOUT_S

    def apply(self, folder: Path) -> str:
        """The file in that copy of the sources as it is with the mutation.

        Raises:
            AssertionError: the file has not what is replaced, or has it twice.
        """
        source = (folder / self.path).read_text("utf-8")
        if source.count(self.old) != 1:
            raise AssertionError(f"{self.name}: {self.path} has {source.count(self.old)} times {self.old!r}")
        return source.replace(self.old, self.new)


def run_mutations(mutations: Sequence[Mutation]) -> int:
    """Runs from the command line. Returns the exit code: 0 when every mutation was noticed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true", help="only look whether the mutations still apply")
    parser.add_argument("-O", dest="optimize", action="store_true", help="run tests by python -O")
    parser.add_argument("-k", dest="word", default="", help="only mutations with this in their names")
    parser.add_argument("--part", default="1/1", help="only a part, such as 2/4 for the second of four")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without mutations first")
    arguments = parser.parse_args()
    number, _, num_parts = arguments.part.partition("/")
    chosen = [mutation for mutation in mutations if arguments.word in mutation.name]
    chosen = chosen[int(number) - 1 :: int(num_parts)]
    if arguments.check:
        return check_mutations(chosen)
    options = ("-O",) if arguments.optimize else ()
    with copied_sources() as folder:
        if not arguments.no_baseline and not passes_without_mutations(folder, chosen, options):
            return 1
        unnoticed = [mutation.name for mutation in chosen if not is_noticed(folder, mutation, options)]
    print(f"noticed all {len(chosen)}" if not unnoticed else f"not noticed: {unnoticed}", flush=True)
    return len(unnoticed)


def check_mutations(mutations: Sequence[Mutation]) -> int:
    """Says which no longer find what they replace."""
    problems = []
    for mutation in mutations:
        try:
            mutation.apply(ROOT)
        except (AssertionError, OSError) as problem:
            problems.append(str(problem))
    print("\n".join(problems) or f"all {len(mutations)} apply")
    return len(problems)


@contextmanager
def copied_sources() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        for name in FOLDERS:
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in FILES:
            shutil.copy2(ROOT / name, folder)
        yield Path(folder)


def passes_without_mutations(folder: Path, mutations: Sequence[Mutation], python_options: Sequence[str] = ()) -> bool:
    """A test that fails anyway notices nothing."""
    tests = list(dict.fromkeys(mutation.test for mutation in mutations))
    result = _run_tests(tests, folder, python_options, TEST_TIMEOUT_S, BASELINE_TIMEOUT_S)
    if result is not None and result[0] == 0:
        return True
    print("tests fail without any mutation:", "they do not end" if result is None else result[1], flush=True)
    return False


def is_noticed(folder: Path, mutation: Mutation, python_options: Sequence[str] = ()) -> bool:
    """Whether the test fails, or does not end, with the mutation in that copy of the sources."""
    path = folder / mutation.path
    path.write_text(mutation.apply(folder), "utf-8")
    try:
        result = _run_tests([mutation.test], folder, python_options, mutation.timeout_s, TIMEOUT_S)
    finally:
        shutil.copy2(ROOT / mutation.path, path)
    if result is None:
        print(f"{mutation.name}: noticed, did not end", flush=True)
        return True
    code, output = result
    # An error in a fixture notices nothing. What a failed test leaves may be told after its count.
    summary = re.search(r"^\d+ failed.*$", output, re.MULTILINE)
    noticed = code == 1 and summary is not None
    told = summary[0] if summary is not None else output.strip().rpartition("\n")[2]
    print(f"{mutation.name}: {'noticed' if noticed else 'NOT NOTICED'} ({told})", flush=True)
    return noticed


def run_bounded(
    command: Sequence[str], folder: Path, timeout_s: float, environment: Mapping[str, str] | None = None
) -> tuple[int, str] | None:
    """Exit code and output; None for a command that did not end. Nothing that it started in its own
    group goes on.
    """
    with tempfile.TemporaryFile("w+") as output:  # a pipe would stay open as long as a grandchild has it
        process = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read()


def _run_tests(
    tests: Sequence[str], folder: Path, python_options: Sequence[str], test_timeout_s: int, timeout_s: int
) -> tuple[int, str] | None:
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "soak or not soak", "--timeout", str(test_timeout_s)]
    environment = dict(os.environ)
    if "-O" in python_options:
        options += ["-W", "ignore::pytest.PytestConfigWarning"]  # pytest warns that -O removes asserts
        environment["PYTHONOPTIMIZE"] = "1"  # of processes that tests start
    command = [sys.executable, *python_options, "-m", "pytest", *options, *tests]
    return run_bounded(command, folder, timeout_s, environment)
