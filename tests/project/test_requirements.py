"""Images and CI install only files whose hashes are known."""

import base64
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tools import lock_requirements
from tools.lock_requirements import Entry, LockError

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
LOCKED = re.search(r'LOCKED="([^"]+)"', DOCKERFILE)
TIMEOUT_S = 300.0


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the tool reads, to be changed."""
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    monkeypatch.setattr(lock_requirements, "ROOT", tmp_path)
    monkeypatch.setattr(lock_requirements, "FOLDER", tmp_path / "requirements")
    return tmp_path


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")


def test_every_pinned_version_is_locked_with_its_hashes() -> None:
    assert lock_requirements.problems() == []
    locked = {**lock_requirements.read("worker"), **lock_requirements.read("gateway")}
    assert {"transformers", "grpcio", "redis", "smg", "async-timeout"} <= locked.keys()
    assert "torch" not in locked
    of_torch, cpu = lock_requirements.read("torch"), lock_requirements.read("torch-cpu")
    assert {"torch", "triton", "nvidia-cublas"} <= of_torch.keys()
    assert len(of_torch["torch"].hashes) > 4  # Pythons and machines
    assert list(cpu) == ["torch"]
    assert cpu["torch"].version == f"{of_torch['torch'].version}+cpu"
    assert not cpu["torch"].hashes & of_torch["torch"].hashes


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("constraints.txt", "structlog==26.1.0", "structlog==26.1.1", "has structlog==26.1.0, constraints.txt 26.1.1"),
        (
            "constraints.txt",
            "structlog==26.1.0",
            "structlog==26.1.0\nnew-one==1.0",
            "new-one of constraints.txt is in no",
        ),
        ("pyproject.toml", '"rich>=14"', '"rich>=13"', "is not of this constraints.txt and pyproject.toml"),
        ("requirements/torch.txt", "torch==2.13.0", "torch==2.13.1", "has torch==2.13.1, constraints.txt 2.13.0"),
    ],
)
def test_a_lock_that_does_not_fit_is_named(copy: Path, file: str, old: str, new: str, said: str) -> None:
    assert lock_requirements.problems() == []
    replace(copy / file, old, new)
    assert any(said in problem and "make lock" in problem for problem in lock_requirements.problems())
    assert lock_requirements.main(["--check"]) == 1


def test_a_missing_file_and_a_missing_hash_are_named(copy: Path) -> None:
    (copy / "requirements/torch.txt").unlink()
    assert "requirements/torch.txt is missing; run `make lock`" in lock_requirements.problems()
    with pytest.raises(LockError, match="no SHA-256"):
        lock_requirements.parse("torch==2.13.0\n")
    with pytest.raises(LockError, match="no version"):
        lock_requirements.parse(f"torch --hash=sha256:{'0' * 64}\n")


def test_builds_for_the_cpu_in_a_folder_are_allowed_until_the_version_changes(copy: Path) -> None:
    wheel = make_wheel(copy, "torch", "2.13.0+cpu", "print()")
    for name, version in (("torch", "2.13.0"), ("torch", "2.12.0+cpu"), ("torch", "2.13.0+cu126"), ("new", "1+cpu")):
        make_wheel(copy, name, version, "")
    found = lock_requirements.cpu_builds(copy, {})
    assert found == {"torch": Entry("torch==2.13.0+cpu", frozenset({sha256_of(wheel)}))}
    earlier = {"torch": Entry("torch==2.13.0+cpu", frozenset({"1" * 64}))}
    assert lock_requirements.cpu_builds(None, earlier) == earlier
    assert lock_requirements.cpu_builds(copy, earlier)["torch"].hashes == {"1" * 64, sha256_of(wheel)}
    replace(copy / "constraints.txt", "torch==2.13.0", "torch==2.14.0")
    assert lock_requirements.cpu_builds(copy, earlier) == {}


# --- who uses it


def test_images_install_only_locked_files_and_the_wheel_that_they_built() -> None:
    commands = re.findall(r"pip (?:install|wheel) [^&|\n]+", DOCKERFILE.replace("\\\n", " "))
    assert len(commands) == 8
    own = ("--no-deps --no-index /wheels/*.whl", "--no-deps --no-build-isolation --wheel-dir /wheels .")
    assert [each for each in commands if "$LOCKED" not in each and not each.strip().endswith(own)] == []
    assert LOCKED is not None
    assert {"--require-hashes", "--no-deps", "--only-binary=:all:"} <= set(LOCKED[1].split())


def test_ci_installs_only_locked_files() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text("utf-8"))
    assert workflow["jobs"]["test"]["env"]["REQUIRE_HASHES"] == "1"
    commands = subprocess.run(
        ["make", "--dry-run", "--always-make", "install", "REQUIRE_HASHES=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
    ).stdout.splitlines()
    installing = [line for line in commands if " install " in line]
    assert len(installing) == 3
    assert ["--require-hashes --no-deps" in line for line in installing] == [True, True, False]
    assert installing[2].endswith("--no-deps --no-build-isolation --editable .")


def test_a_wheel_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    """From a folder that poses as the index: a wheel of a locked name and version."""
    entry = lock_requirements.read("gateway")["mdurl"]
    wheel = make_wheel(tmp_path, "mdurl", entry.version, "raise SystemExit('tampered with')")
    refused = install(tmp_path, entry)
    assert refused.returncode != 0
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    assert not (tmp_path / "installed/mdurl.py").exists()
    # The same wheel with its own hash: nothing but the hash was wrong.
    taken = install(tmp_path, Entry(entry.requirement, frozenset({sha256_of(wheel)})))
    assert taken.returncode == 0, taken.stderr
    assert (tmp_path / "installed/mdurl.py").exists()


def install(folder: Path, entry: Entry) -> subprocess.CompletedProcess[str]:
    assert LOCKED is not None
    requirements = folder / "requirements.txt"
    requirements.write_text(lock_requirements.shown({entry.name: entry}, "none"), "utf-8")
    command = [sys.executable, "-m", "pip", "install", *LOCKED[1].split(), "--isolated", "--no-index"]
    command += ["--find-links", str(folder), "--target", str(folder / "installed"), "-r", str(requirements)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)


def make_wheel(folder: Path, name: str, version: str, code: str) -> Path:
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [f"{each},sha256={_urlsafe(text)},{len(text)}" for each, text in files.items()]
    with zipfile.ZipFile(path, "w") as archive:
        for each, text in files.items():
            archive.writestr(each, text)
        archive.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,"]) + "\n")
    return path


def _urlsafe(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
