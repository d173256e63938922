"""Generates the code of protos/ into kvrelay/: messages, gRPC stubs and their types. Knows nothing
about what the protos say.

python -m tools.generate_protos            write the generated code
python -m tools.generate_protos --check    exit 1 and name the files that differ from what would be written
"""

import argparse
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parent.parent
PROTO_ROOT = REPO_ROOT / "protos"
PACKAGES = (Path("kvrelay/v1"), Path("kvrelay/kserve"))
GENERATED_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


class GenerationError(Exception):
    """protoc failed or is not installed; the message is its output."""


def plugin_path(name: str) -> Path:
    """The protoc plugin of that name in the running interpreter's environment, whether or not that
    is on PATH.
    """
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise GenerationError(f"{name} is not installed; run `make install`")
    return path


def generate(output: Path) -> None:
    """Runs protoc over all protos into `output`, which becomes the root of the package path."""
    protos = sorted(
        path.relative_to(PROTO_ROOT) for package in PACKAGES for path in (PROTO_ROOT / package).glob("*.proto")
    )
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"--proto_path={PROTO_ROOT}",
        f"--plugin={plugin_path('protoc-gen-mypy')}",
        f"--plugin={plugin_path('protoc-gen-mypy_grpc')}",
        f"--python_out={output}",
        f"--grpc_python_out={output}",
        f"--mypy_out=quiet:{output}",
        f"--mypy_grpc_out=quiet:{output}",
        *map(str, protos),
    ]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if result.returncode != 0:
        raise GenerationError(result.stderr.strip())


def generated_files(root: Path) -> dict[str, str]:
    """Path below `root` to text of the generated files there."""
    found = (path for package in PACKAGES for pattern in GENERATED_PATTERNS for path in (root / package).glob(pattern))
    return {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in found}


def stale_files() -> list[str]:
    """The paths of generated files that are missing, left over, or not what the protos give."""
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        expected = generated_files(Path(directory))
    present = generated_files(REPO_ROOT)
    return sorted(name for name in expected.keys() | present.keys() if expected.get(name) != present.get(name))


def write() -> None:
    """Replaces the generated files, and removes those whose proto is gone."""
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        fresh = generated_files(Path(directory))
        for name in generated_files(REPO_ROOT).keys() - fresh.keys():
            (REPO_ROOT / name).unlink()
        for name in fresh:
            shutil.copyfile(Path(directory) / name, REPO_ROOT / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 when the generated code is stale")
    arguments = parser.parse_args()
    try:
        if not arguments.check:
            write()
            return 0
        stale = stale_files()
    except GenerationError as error:
        print(f"generate_protos: {error}", file=sys.stderr)
        return 2
    for name in stale:
        print(f"{name} is not what protos/ gives; run `make protos`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
