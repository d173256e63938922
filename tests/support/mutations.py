"""Changes a copy of the sources and looks whether a test notices."""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
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
)
TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Mutation:
    """What is replaced where, and the test that must notice."""

    name: str
    path: str
    old: str
    new: str
    test: str

    def apply(self, folder: Path) -> str:
        """The file in that copy of the sources as it is with the mutation.

        Raises:
            AssertionError: the file has not what is replaced, or has it twice.
        """
        source = (folder / self.path).read_text("utf-8")
        assert source.count(self.old) == 1, f"{self.path} has changed: {self.old!r}"
        return source.replace(self.old, self.new)


def run_mutations(mutations: Sequence[Mutation]) -> int:
    """Runs from the command line. Returns the exit code: 0 when every mutation was noticed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true", help="only look whether the mutations still apply")
    parser.add_argument("-O", dest="optimize", action="store_true", help="run tests by python -O")
    parser.add_argument("-k", dest="part", default="", help="only mutations with this in their names")
    arguments = parser.parse_args()
    chosen = [mutation for mutation in mutations if arguments.part in mutation.name]
    if arguments.check:
        for mutation in chosen:
            mutation.apply(ROOT)
        print(f"all {len(chosen)} apply")
        return 0
    options = ("-O",) if arguments.optimize else ()
    unnoticed = [mutation.name for mutation in chosen if not is_noticed(mutation, options)]
    print("noticed all" if not unnoticed else f"not noticed: {unnoticed}")
    return len(unnoticed)


def is_noticed(mutation: Mutation, python_options: Sequence[str] = ()) -> bool:
    """Whether the test fails with the mutation. Under -O only what raises can fail a test."""
    with tempfile.TemporaryDirectory() as folder:
        for name in FOLDERS:
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        (Path(folder) / mutation.path).write_text(mutation.apply(Path(folder)))
        options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "soak or not soak"]
        if python_options:
            options += ["-W", "ignore::pytest.PytestConfigWarning"]  # pytest warns that -O removes asserts
        command = [sys.executable, *python_options, "-m", "pytest", *options, mutation.test]
        try:
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            print(f"{mutation.name}: noticed, did not end")
            return True
    last = result.stdout.strip().splitlines()[-1]
    # an error in a fixture notices nothing
    is_noticed = result.returncode == 1 and " failed" in last
    print(f"{mutation.name}: {'noticed' if is_noticed else 'NOT NOTICED'} ({last})", flush=True)
    return is_noticed
