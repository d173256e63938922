"""The checked-in code in kvrelay/v1 is what protos/ gives, and the protos pass buf's rules."""

import subprocess
import sysconfig
from pathlib import Path

import pytest

from tools import generate_protos


def test_generated_code_is_what_the_protos_give() -> None:
    assert generate_protos.stale_files() == []


def test_check_names_files_that_differ_are_missing_or_left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / generate_protos.PACKAGE
    folder.mkdir(parents=True)
    fresh = generate_protos.generated_files(generate_protos.REPO_ROOT)
    for name in fresh.keys() - {"session_pb2.pyi"}:
        (folder / name).write_text(fresh[name], "utf-8")
    (folder / "decode_pb2.py").write_text("# edited by hand\n", "utf-8")
    (folder / "forgotten_pb2.py").write_text("", "utf-8")
    monkeypatch.setattr(generate_protos, "REPO_ROOT", tmp_path)
    assert generate_protos.stale_files() == ["decode_pb2.py", "forgotten_pb2.py", "session_pb2.pyi"]
    generate_protos.write()
    assert generate_protos.stale_files() == []


def test_every_proto_has_its_generated_code() -> None:
    protos = {path.stem for path in (generate_protos.PROTO_ROOT / generate_protos.PACKAGE).glob("*.proto")}
    files = generate_protos.generated_files(generate_protos.REPO_ROOT)
    assert protos
    assert {name.removesuffix("_pb2.py") for name in files if name.endswith("_pb2.py")} == protos


def test_protos_pass_buf_lint() -> None:
    buf = Path(sysconfig.get_path("scripts")) / "buf"
    result = subprocess.run([buf, "lint", generate_protos.PROTO_ROOT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
