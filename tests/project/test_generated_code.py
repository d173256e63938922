"""The checked-in generated code is what its sources give, and the protos pass buf's rules."""

import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tools import generate_protos, generate_sync_client


def test_generated_code_is_what_the_protos_give() -> None:
    assert generate_protos.stale_files() == []


def test_check_names_files_that_differ_are_missing_or_left_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = generate_protos.generated_files(generate_protos.REPO_ROOT)
    for package in generate_protos.PACKAGES:
        (tmp_path / package).mkdir(parents=True)
    for name in fresh.keys() - {"kvrelay/v1/session_pb2.pyi"}:
        (tmp_path / name).write_text(fresh[name], "utf-8")
    (tmp_path / "kvrelay/v1/decode_pb2.py").write_text("# edited by hand\n", "utf-8")
    (tmp_path / "kvrelay/kserve/forgotten_pb2.py").write_text("", "utf-8")
    monkeypatch.setattr(generate_protos, "REPO_ROOT", tmp_path)
    stale = ["kvrelay/kserve/forgotten_pb2.py", "kvrelay/v1/decode_pb2.py", "kvrelay/v1/session_pb2.pyi"]
    assert generate_protos.stale_files() == stale
    generate_protos.write()
    assert generate_protos.stale_files() == []


def test_every_proto_has_its_generated_code() -> None:
    root = generate_protos.PROTO_ROOT
    protos = {path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.proto")}
    files = generate_protos.generated_files(generate_protos.REPO_ROOT)
    assert protos
    assert {name.removesuffix("_pb2.py") for name in files if name.endswith("_pb2.py")} == protos


def test_protos_pass_buf_lint() -> None:
    buf = Path(sysconfig.get_path("scripts")) / "buf"
    result = subprocess.run([buf, "lint", generate_protos.PROTO_ROOT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_blocking_client_is_what_the_asyncio_client_gives() -> None:
    assert generate_sync_client.stale_files() == []


def test_check_names_files_of_the_blocking_client_that_differ_or_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = tmp_path / generate_sync_client.CLIENT
    client.mkdir(parents=True)
    for name in generate_sync_client.SOURCES:
        (client / name).write_text(
            (generate_sync_client.REPO_ROOT / generate_sync_client.CLIENT / name).read_text("utf-8")
        )
    monkeypatch.setattr(generate_sync_client, "REPO_ROOT", tmp_path)
    generate_sync_client.write()
    (client / "sync_client.py").write_text("# edited by hand\n", "utf-8")
    (client / "sync_stream.py").unlink()
    assert generate_sync_client.stale_files() == ["kvrelay/client/sync_client.py", "kvrelay/client/sync_stream.py"]
    generate_sync_client.write()
    assert generate_sync_client.stale_files() == []


def test_the_blocking_client_knows_nothing_of_asyncio_and_says_what_it_is_made_from() -> None:
    for name, text in generate_sync_client.generated_files().items():
        assert "sync_" in name
        assert re.match(r"# Generated from async_\w+\.py by tools/generate_sync_client\.py", text)
        assert not re.findall(r"\b(?:async|await|asyncio|Async\w+)\b", text.partition("\n")[2])
