"""Runs the examples of pages as they stand, but for addresses, against a running cluster. Part of
tools/newcomer.sh.

    python -m tools.run_doc_examples --bin VENV/bin --others FOLDER --cwd FOLDER PAGE...

A block whose comment says that it is not run, or what runs it, is left out.

Python goes to the environment that has what it imports: kvrelay's, or one for a library of others,
made when it is first needed. JavaScript goes to node, where there are node and npm. Of lines for a
shell those that ask something are run; programs that are not installed have stand-ins, or are left
out with a line that says so. Every example must end well and say something.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tools.doc_examples import SHELL, Example, commands_of, examples_of, imports_of

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 180.0
INSTALL_TIMEOUT_S = 600.0
GATEWAY = "127.0.0.1:50050"
OPENAI = "127.0.0.1:8000"
HTTP = "127.0.0.1:50080"
NODE_PACKAGES = ("@grpc/grpc-js", "@grpc/proto-loader")

REQUIREMENTS = {
    "tritonclient": ("triton", ["tritonclient[grpc]"]),
    "openai": ("openai", ["openai"]),
    "langchain_openai": ("langchain", ["langchain-openai"]),
    "langchain": ("langchain", ["langchain-openai", "langchain"]),
}
"""What a page's example imports: the environment that it gets, and what is installed there. The
last that fits counts.
"""
STAND_INS = {"grpcurl": "reflection_client.py", "grpc_health_probe": "health_probe.py"}
"""Programs of others and what is run where they are not installed: parts of them, in
tests/integration.
"""
ASKING = (
    *("curl", "grpcurl", "grpc_health_probe"),
    *("kvrelay complete", "kvrelay status", "kvrelay health", "kvrelay tokenize", "kvrelay detokenize"),
    *("kvrelay requests", "kvrelay plan", "kvrelay version"),
)
"""How lines begin that ask a running cluster; others install or start something."""


class ExampleError(Exception):
    """An example did not end well; the message has the end of what it said."""


@dataclass(frozen=True, slots=True)
class Runner:
    """Where things are: the bin folder of kvrelay's environment, environments of others, where to
    run, and which addresses.
    """

    bin: Path
    others: Path
    cwd: Path
    gateway: str
    openai: str
    http: str = HTTP

    def run(self, example: Example) -> list[str]:
        """What was run of it, a line for each. Raises ExampleError."""
        if example.note:
            return [f"left out: {example.note}"]
        if example.language == "python":
            return [self._python(example.code)]
        if example.language in ("js", "javascript"):
            return [self._node(example.code)]
        return (
            [self._command(line) for line in commands_of(example) if line.startswith(ASKING)]
            if example.language in SHELL
            else []
        )

    def _python(self, code: str) -> str:
        known = [REQUIREMENTS[name] for name in REQUIREMENTS if name in imports_of(code)]
        python = self._environment(*known[-1]) if known else self.bin / "python"
        self._check([str(python), "-c", self._addressed(code)])
        return "python" if not known else f"python with {known[-1][0]}"

    def _node(self, code: str) -> str:
        if not (shutil.which("node") and shutil.which("npm")):
            return "left out: it needs node and npm"
        folder = self.others / "node"
        if not (folder / "node_modules").exists():
            folder.mkdir(parents=True, exist_ok=True)
            _run(["npm", "install", "--silent", "--no-audit", "--no-fund", *NODE_PACKAGES], folder, INSTALL_TIMEOUT_S)
            _run([str(self.bin / "kvrelay"), "protos", "--to", "protos"], folder, TIMEOUT_S)
        (folder / "example.js").write_text(self._addressed(code), "utf-8")
        if not _run(["node", "example.js"], folder, TIMEOUT_S).strip():
            raise ExampleError("it said nothing")
        return "node"

    def _command(self, line: str) -> str:
        program, *arguments = shlex.split(self._addressed(line))
        if program == "kvrelay":
            self._check([str(self.bin / program), *arguments])
        elif shutil.which(program):
            self._check([program, *arguments])
        elif program in STAND_INS:
            self._check([str(self.bin / "python"), str(ROOT / "tests/integration" / STAND_INS[program]), *arguments])
        else:
            return f"left out: {program} is not installed"
        return shlex.join([program, *arguments])[:60]

    def _addressed(self, text: str) -> str:
        return text.replace(GATEWAY, self.gateway).replace(OPENAI, self.openai).replace(HTTP, self.http)

    def _check(self, command: list[str]) -> None:
        if not _run(command, self.cwd, TIMEOUT_S, KVRELAY_GATEWAY=self.gateway).strip():
            raise ExampleError("it said nothing")

    def _environment(self, name: str, requirements: list[str]) -> Path:
        """The interpreter of an environment of others."""
        python = self.others / name / "bin" / "python"
        if not python.exists():
            _run([sys.executable, "-m", "venv", str(self.others / name)], ROOT, INSTALL_TIMEOUT_S)
            pip = [
                str(python),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-compile",
                "--disable-pip-version-check",
                "--no-input",
            ]
            _run([*pip, *requirements], ROOT, INSTALL_TIMEOUT_S)
        return python


def _run(command: list[str], cwd: Path, timeout_s: float, **variables: str) -> str:
    """Standard output. Raises ExampleError."""
    environment = os.environ | variables
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ExampleError(
            f"it did not end within {timeout_s:g} s; it had said:\n{error.stdout!r}\n{error.stderr!r}"
        ) from None
    if done.returncode != 0:
        said = (done.stdout[-2000:] + done.stderr[-2000:]).decode("utf-8", "replace")
        raise ExampleError(f"it ended with {done.returncode}:\n{said}")
    return done.stdout.decode("utf-8", "replace")


def main() -> int:
    """Exit code: 1 at the first example that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--bin", type=Path, required=True, help="bin folder of an environment with kvrelay")
    parser.add_argument("--others", type=Path, required=True, help="folder for environments of others' clients")
    parser.add_argument("--cwd", type=Path, required=True, help="folder to run in")
    parser.add_argument("--gateway", default=GATEWAY)
    parser.add_argument("--openai", default=OPENAI)
    parser.add_argument("--http", default=HTTP, help="address of the gateway's HTTP port")
    arguments = parser.parse_args()
    runner = Runner(arguments.bin, arguments.others, arguments.cwd, arguments.gateway, arguments.openai, arguments.http)
    for page in arguments.pages:
        for example in examples_of(page.read_text("utf-8")):
            begin_s = time.monotonic()
            try:
                ran = runner.run(example)
            except ExampleError as error:
                print(f"FAIL  {page.name}, {example.section}:\n{example.code}\n{error}")
                return 1
            for line in ran:
                print(f"ok    {page.name}, {example.section}: {line} ({time.monotonic() - begin_s:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
