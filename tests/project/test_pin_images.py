"""Images of others are pinned by the digest that the registry names."""

import hashlib
import sys
from pathlib import Path

import pytest
import yaml

from tools import pin_images

ROOT = Path(__file__).resolve().parents[2]
REGISTRY = """#!{python}
import hashlib, sys
image = sys.argv[4]
assert sys.argv[1:4] == ["buildx", "imagetools", "inspect"] and sys.argv[5:] == ["--format", "{{{{.Manifest.Digest}}}}"]
if "unknown" in image:
    sys.exit("not found: " + image)
print("sha256:" + hashlib.sha256(image.encode()).hexdigest())
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of what is pinned, and a `docker` that knows every image but unknown ones."""
    for name in pin_images.FILES:
        (tmp_path / name).write_text((ROOT / name).read_text("utf-8"), "utf-8")
    (tmp_path / "bin").mkdir()
    docker = tmp_path / "bin/docker"
    docker.write_text(REGISTRY.format(python=sys.executable), "utf-8")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(pin_images, "ROOT", tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pin_images", *arguments])
    return pin_images.main()


def digest_of(image: str) -> str:
    return f"sha256:{hashlib.sha256(image.encode()).hexdigest()}"


def test_every_image_of_others_gets_its_digest_and_nothing_else_changes(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, "--check") == 1
    assert run(monkeypatch) == 0
    assert run(monkeypatch, "--check") == 0
    before = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    after = yaml.safe_load((files / "docker-compose.yml").read_text("utf-8"))
    others = {name for name, service in before["services"].items() if not service["image"].startswith("kvrelay-")}
    assert others == {"redis", "prometheus", "grafana"}
    for name in others:
        tagged = before["services"][name]["image"].partition("@")[0]
        before["services"][name]["image"] = f"{tagged}@{digest_of(tagged)}"
    assert after == before
    stages = [line for line in (files / "Dockerfile").read_text("utf-8").splitlines() if line.startswith("FROM")]
    assert stages[0] == f"FROM python:3.11-slim@{digest_of('python:3.11-slim')} AS base"
    assert [line for line in stages[1:] if "@" in line] == []


def test_a_digest_is_renewed(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "Dockerfile").write_text(f"FROM localhost:5000/python:3.11@sha256:{'0' * 64}\n", "utf-8")
    assert run(monkeypatch) == 0
    assert digest_of("localhost:5000/python:3.11") in (files / "Dockerfile").read_text("utf-8")


def test_an_image_that_the_registry_does_not_have_changes_nothing(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "Dockerfile").write_text("FROM unknown:1\n", "utf-8")
    before = (files / "docker-compose.yml").read_text("utf-8")
    assert run(monkeypatch) == 1
    assert "no digest of unknown:1: not found" in capsys.readouterr().err
    assert (files / "docker-compose.yml").read_text("utf-8") == before


def test_without_docker_it_says_what_to_install(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "bin/docker").unlink()
    with pytest.raises(pin_images.PinError, match="install it"):
        pin_images.ask_registry("redis:7")
