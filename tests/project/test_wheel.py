"""What a wheel installs, and that it works in a folder whose packages have the names of kvrelay's
own.
"""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

import kvrelay
from kvrelay import own_packages
from kvrelay.client import AsyncClient
from kvrelay.testing.tiny_model import make_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("gateway", "prefill_worker", "decode_worker", "benchmarks")
CALL_TIMEOUT_S = 120.0
BUILD_TIMEOUT_S = 300.0

RAISING = "raise SystemExit('the package {name} of the current folder or PYTHONPATH was imported')\n"
CLUSTER_TEST = """
import gateway

async def test_the_teams_own_gateway(kvrelay_cluster):
    assert gateway.OF_THE_TEAM
    cluster = await kvrelay_cluster(num_prefill=0, num_decode=1)
    answer = await cluster.client().complete("once", max_tokens=2)
    assert answer.finished.usage.num_output_tokens == 2
"""


def run(*command: str | Path, cwd: Path, environment: Mapping[str, str] = {}) -> str:
    """Standard output of a program that must succeed."""
    variables = {**os.environ, **environment}
    done = subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=BUILD_TIMEOUT_S
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a source distribution, as a package index would have both."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    pip = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "--disable-pip-version-check",
    )
    run(*pip, "-w", folder, archive, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has the wheel, and borrows all but kvrelay from this
    one.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    install(wheel, folder)
    return folder / "bin"


def install(wheel: Path, folder: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=ROOT)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # Only folders of packages: a .pth that is named in another one is not read, so neither is that
    # of an editable install.
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed))
    python = folder / "bin" / "python"
    run(
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--ignore-installed",
        "--disable-pip-version-check",
        wheel,
        cwd=folder,
    )


@pytest.fixture
def clashing_folder(tmp_path: Path) -> Path:
    """A folder whose packages have names of kvrelay's own and end whoever imports them."""
    folder = tmp_path / "clashing"
    for name in (*SERVICES, "kvrelay", "tests", "tools"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(RAISING.format(name=name))
    (folder / "json.py").write_text(RAISING.format(name="json"))
    return folder


@pytest.fixture
def on_path(tmp_path: Path) -> Path:
    """The same names of services, for PYTHONPATH."""
    for name in SERVICES:
        (tmp_path / "on path" / name).mkdir(parents=True)
        (tmp_path / "on path" / name / "__init__.py").write_text(RAISING.format(name=name))
    return tmp_path / "on path"


def test_a_wheel_installs_no_name_but_kvrelay(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        roots = {name.partition("/")[0] for name in archive.namelist()}
    assert {root for root in roots if not re.fullmatch(r"kvrelay-[\w.]+\.dist-info", root)} == {"kvrelay"}


def test_a_wheel_has_all_modules_and_data_of_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = (
        run("git", "ls-files", "kvrelay", "protos", *SERVICES, cwd=ROOT).split() if (ROOT / ".git").exists() else []
    )
    services = {f"kvrelay/_services/{name}" for name in tracked if name.startswith(SERVICES)}
    own = {
        name if name.startswith("kvrelay/") else f"kvrelay/{name}" for name in tracked if not name.startswith(SERVICES)
    }
    assert (services | own) - names == set()
    assert {"kvrelay/_services/gateway/main.py", "kvrelay/protos/kvrelay/v1/inference.proto"} <= names


def test_protos_of_a_wheel_generate_stubs(installed: Path, tmp_path: Path) -> None:
    folder = Path(run(installed / "kvrelay", "protos", cwd=tmp_path).strip())
    assert installed.parent in folder.parents
    listed = run(installed / "kvrelay", "protos", "--to", "copy", cwd=tmp_path).splitlines()
    assert "copy/kvrelay/v1/inference.proto" in listed
    for path in (folder, tmp_path / "copy"):
        protoc = (sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={path}", f"--python_out={tmp_path}")
        run(*protoc, "kvrelay/v1/inference.proto", cwd=tmp_path)
        generated = tmp_path / "kvrelay/v1/inference_pb2.py"
        assert "InferenceService" in generated.read_text()
        generated.unlink()


async def test_an_installed_cluster_starts_in_a_folder_with_packages_of_the_same_names(
    installed: Path, clashing_folder: Path, on_path: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(on_path)}
    options = [
        "--model",
        str(make_tiny_llama(tmp_path / "model")),
        "--port",
        "0",
        "--http-port",
        "0",
        "--num-threads",
        "1",
    ]
    process = await asyncio.create_subprocess_exec(
        installed / "kvrelay",
        "serve",
        "all",
        *options,
        cwd=clashing_folder,
        env=environment,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            async with AsyncClient(await gateway_address(process)) as client:
                answer = await client.complete("a", max_tokens=2)
    finally:
        process.terminate()
        await process.communicate()
    assert answer.finished.usage.num_output_tokens == 2
    assert process.returncode == 0


async def gateway_address(process: asyncio.subprocess.Process) -> str:
    """host:port, from what `serve all` says when it is ready. Raises AssertionError: it ended
    instead.
    """
    assert process.stderr is not None
    lines = []
    while line := (await process.stderr.readline()).decode():
        lines.append(line)
        if found := re.search(r"ready: the gateway is ([^;]+);", line):
            return found[1]
    raise AssertionError("".join(lines))


def test_benchmarks_of_a_wheel_are_found_in_such_a_folder(
    installed: Path, clashing_folder: Path, on_path: Path
) -> None:
    environment = {"PYTHONPATH": str(on_path)}
    shown = run(installed / "kvrelay", "bench", "relay", "--help", cwd=clashing_folder, environment=environment)
    assert "kvrelay bench relay" in shown
    assert "--streams" in shown


def test_the_pytest_plugin_leaves_a_suite_its_own_gateway(installed: Path, tmp_path: Path) -> None:
    """And its cluster has kvrelay's."""
    (tmp_path / "gateway").mkdir()
    (tmp_path / "gateway" / "__init__.py").write_text("OF_THE_TEAM = True\n")
    (tmp_path / "test_team.py").write_text(CLUSTER_TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    pytest_command = (
        installed / "python",
        "-m",
        "pytest",
        "-q",
        "-p",
        "kvrelay.testing.pytest_plugin",
        "-p",
        "no:cacheprovider",
    )
    assert "1 passed" in run(*pytest_command, "--timeout", "120", cwd=tmp_path)


def test_a_child_of_another_interpreter_runs_the_kvrelay_that_started_it(clashing_folder: Path) -> None:
    """Neither the current folder nor PYTHONPATH decides which, nor whose standard library: the
    folder has a json.py.
    """
    command = own_packages.own_module_command("kvrelay.cli", "version")
    environment = {"PYTHONPATH": str(clashing_folder / "on path")}
    shutil.copytree(clashing_folder / "kvrelay", clashing_folder / "on path" / "kvrelay")
    assert run(*command, cwd=clashing_folder, environment=environment) == f"{kvrelay.__version__}\n"


def test_children_are_started_by_commands_that_do_not_look_into_the_current_folder() -> None:
    """All of them: product code names the interpreter nowhere else."""
    allowed = {
        "kvrelay/own_packages.py": 2,  # the commands themselves
        "kvrelay/runtime/child_process.py": 1,  # isolated altogether
        "benchmarks/variants.py": 1,  # -P, and the tree of a version on PYTHONPATH
        "benchmarks/peers/comparison.py": 1,  # handed to own_module_command
        "benchmarks/peers/adapters/vllm_server.py": 1,  # for the folder that it is in
    }
    folders = ("kvrelay", *SERVICES)
    sources = {path.relative_to(ROOT).as_posix(): path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    counts = {name: path.read_text("utf-8").count("sys.executable") for name, path in sources.items()}
    assert {name: count for name, count in counts.items() if count} == allowed
