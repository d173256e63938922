"""Locks what images and CI install: the hash of every file of each pinned version.

    requirements/gateway.txt   gateways and fronts
    requirements/worker.txt    what workers need besides, but for torch
    requirements/torch.txt     torch's default build, with CUDA's libraries on Linux
    requirements/torch-cpu.txt its build for the CPU, which another index or a folder has
    requirements/dev.txt       what `make install` installs besides
    requirements/build.txt     what builds kvrelay's own wheel

python -m tools.lock_requirements            write them; asks the package index, through uv
python -m tools.lock_requirements --check    exit 1 when they do not fit what is pinned; offline

torch-cpu.txt gets the hashes of the wheels in --wheels. They stay until the version changes.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"
FILES = ("gateway", "worker", "torch", "torch-cpu", "dev", "build")
CPU_TAG = "cpu"
OLDEST_PYTHON = "3.11"
OLDEST_PYTHON_OF_DEV = "3.11.5"
"""pymdown-extensions, of the documentation, needs it."""
UV_TIMEOUT_S = 600.0

_PYTHONS = ("3.11", "3.12", "3.13", "3.14")
_PLATFORMS = (("linux", "Linux"), ("darwin", "Darwin"))
_MACHINES = ("x86_64", "aarch64", "arm64")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})(?=\s|$)")


class LockError(Exception):
    """What is wrong, and what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    requirement: str
    """`name==version`, and its marker if it has one."""
    hashes: frozenset[str]

    @property
    def name(self) -> str:
        return canonicalize_name(Requirement(self.requirement).name)

    @property
    def version(self) -> str:
        (specifier,) = Requirement(self.requirement).specifier
        return specifier.version

    @property
    def public_version(self) -> str:
        """Without the tag of a build."""
        return self.version.partition("+")[0]

    @property
    def is_needed_somewhere(self) -> bool:
        marker = Requirement(self.requirement).marker
        return marker is None or any(
            _holds(marker, *each) for each in itertools.product(_PYTHONS, _PLATFORMS, _MACHINES)
        )


Lock = dict[str, Entry]
"""By canonical name."""


def parse(text: str) -> Lock:
    """Raises LockError for a line without a version or a hash."""
    entries: Lock = {}
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        requirement = line.partition("--hash=")[0].strip()
        if "==" not in requirement or not (hashes := frozenset(_HASH.findall(line))):
            raise LockError(f"{requirement!r} has no version or no SHA-256; run `make lock`")
        entry = Entry(requirement, hashes)
        entries[entry.name] = entry
    return entries


def read(name: str) -> Lock:
    path = FOLDER / f"{name}.txt"
    return parse(path.read_text("utf-8")) if path.exists() else {}


def shown(lock: Mapping[str, Entry], inputs: str) -> str:
    parts = [
        f"# Made by `make lock` of constraints.txt and pyproject.toml, whose requirements have the SHA-256\n# {inputs}\n"
    ]
    for _, entry in sorted(lock.items()):
        parts.append(
            " \\\n    ".join([entry.requirement, *(f"--hash=sha256:{each}" for each in sorted(entry.hashes))]) + "\n"
        )
    return "".join(parts)


def pins() -> dict[str, str]:
    """Versions of constraints.txt by canonical name."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    split = [line.partition("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): version.strip() for name, _, version in split}


def inputs_digest() -> str:
    """Changes when a lock may have to."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    project = document["project"]
    inputs = [pins(), project["dependencies"], project["optional-dependencies"], document["build-system"]["requires"]]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def problems() -> list[str]:
    found = [f"requirements/{name}.txt is missing; run `make lock`" for name in FILES if not read(name)]
    locks, wanted = {name: read(name) for name in FILES}, pins()
    for name in FILES:
        path = FOLDER / f"{name}.txt"
        if path.exists() and path.read_text("utf-8") != shown(locks[name], inputs_digest()):
            found.append(f"requirements/{name}.txt is not of this constraints.txt and pyproject.toml; run `make lock`")
        found += [
            f"requirements/{name}.txt has {entry.requirement}, constraints.txt {wanted[each]}; run `make lock`"
            for each, entry in locks[name].items()
            if each in wanted and wanted[each] != entry.public_version
        ]
    missing = wanted.keys() - set().union(*(lock.keys() for lock in locks.values()))
    return found + [
        f"{name} of constraints.txt is in no file of requirements/; run `make lock`" for name in sorted(missing)
    ]


def lock_all(wheels: Path | None) -> dict[str, Lock]:
    gateway = resolve(["pyproject.toml", "--extra", "openai", "--extra", "otel"])
    workers = resolve(["pyproject.toml", "--extra", "openai", "--extra", "otel", "--extra", "worker"])
    everything = resolve(["pyproject.toml", "--all-extras"], OLDEST_PYTHON_OF_DEV)
    build = resolve(["-"], given="\n".join(_build_requirements()))
    known = pins()
    of_workers = {name: entry for name, entry in workers.items() if name not in gateway}
    of_torch = {name for name in of_workers if name == "torch" or name not in known}
    return {
        "gateway": gateway,
        "worker": {name: entry for name, entry in of_workers.items() if name not in of_torch},
        "torch": {name: entry for name, entry in of_workers.items() if name in of_torch},
        "torch-cpu": cpu_builds(wheels, read("torch-cpu")),
        "dev": {name: entry for name, entry in everything.items() if name not in workers},
        "build": build,
    }


def resolve(arguments: Sequence[str], python: str = OLDEST_PYTHON, given: str = "") -> Lock:
    """The versions of constraints.txt, and for what is not there the newest."""
    uv = shutil.which("uv")
    if uv is None:
        raise LockError("uv is not installed, which reads the index: run `pipx install uv`")
    options = ("--universal", "--generate-hashes", "--no-header", "--no-annotate", "--no-config", "--quiet")
    command = (
        uv,
        "pip",
        "compile",
        *options,
        "--python-version",
        python,
        "--constraints",
        "constraints.txt",
        *arguments,
    )
    done = subprocess.run(
        command,
        cwd=ROOT,
        input=given,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=UV_TIMEOUT_S,
    )
    if done.returncode:
        raise LockError(f"uv finds no versions:\n{done.stderr}")
    return {name: entry for name, entry in parse(done.stdout).items() if entry.is_needed_somewhere}


def cpu_builds(folder: Path | None, earlier: Lock) -> Lock:
    """Of pinned versions. `earlier` ones stay until their version changes."""
    known = pins()
    found = {name: entry for name, entry in earlier.items() if entry.public_version == known.get(name)}
    for path in sorted(folder.glob("*.whl")) if folder is not None else ():
        distribution, version, _, _ = parse_wheel_filename(path.name)
        name = canonicalize_name(distribution)
        if version.local != CPU_TAG or version.public != known.get(name):
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        before = found[name].hashes if name in found else frozenset()
        found[name] = Entry(f"{name}=={version}", before | {digest})
    return found


def _build_requirements() -> list[str]:
    requires: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]["requires"]
    return requires


def _holds(marker: Marker, python: str, platform: tuple[str, str], machine: str) -> bool:
    environment = {
        **{name: str(value) for name, value in default_environment().items()},
        **{"python_version": python, "python_full_version": f"{python}.0", "implementation_version": f"{python}.0"},
        **{
            "sys_platform": platform[0],
            "platform_system": platform[1],
            "platform_machine": machine,
            "os_name": "posix",
        },
        **{"implementation_name": "cpython", "platform_python_implementation": "CPython"},
    }
    return marker.evaluate(environment)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 when a file is stale")
    folder = os.environ.get("PIP_FIND_LINKS", "")
    parser.add_argument(
        "--wheels",
        type=Path,
        default=Path(folder) if Path(folder).is_dir() and folder else None,
        help="folder with a build of torch for the CPU (default: PIP_FIND_LINKS)",
    )
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        if options.check:
            found = problems()
            print("\n".join(found), file=sys.stderr, end="\n" if found else "")
            return 1 if found else 0
        FOLDER.mkdir(exist_ok=True)
        for name, lock in lock_all(options.wheels).items():
            (FOLDER / f"{name}.txt").write_text(shown(lock, inputs_digest()), "utf-8")
    except LockError as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
