"""The audit log: what is in its lines, what bounds it, and that a rotation loses nothing."""

import contextlib
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from kvrelay.config.security_settings import SecuritySettings
from kvrelay.errors import ConfigError, UnauthenticatedError
from kvrelay.security import audit
from kvrelay.security.audit import (
    MAX_FIELD_CHARACTERS,
    MAX_LINES_PER_S,
    AuditLog,
    CallAudit,
    record_access,
    set_current_audit,
)
from kvrelay.security.principal import Principal, Role
from kvrelay.security.process_security import ProcessSecurity
from kvrelay.testing.waiting import wait_until
from tests.security.test_process_security import Keys

NOW = 1_800_000_000.25


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def open_files() -> list[str]:
    found = []
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed since
            found.append(os.readlink(each))
    return found


def refuse(log: AuditLog, who: str = "alice-1") -> None:
    log.record(who=who, method="/x.Y/Z", request_id="r", decision="refused", reason="ACCESS_DENIED")


def test_a_line_says_who_did_what_and_what_was_decided(path: Path) -> None:
    log = AuditLog(str(path), clock=lambda: NOW)
    refuse(log)
    log.close()
    assert lines(path) == [
        {
            "time": "2027-01-15T08:00:00.250Z",
            "who": "alice-1",
            "method": "/x.Y/Z",
            "request_id": "r",
            "decision": "refused",
            "reason": "ACCESS_DENIED",
        }
    ]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_line_is_one_line_and_short_whatever_the_caller_says(path: Path) -> None:
    log = AuditLog(str(path))
    refuse(log, who='a\n{"who": "b"}' + "c" * 10_000)
    log.close()
    (line,) = lines(path)
    assert len(line["who"]) <= MAX_FIELD_CHARACTERS + 3


def test_a_flood_of_refusals_is_counted_and_not_written(path: Path) -> None:
    now = [NOW]
    log = AuditLog(str(path), clock=lambda: now[0])
    for _ in range(MAX_LINES_PER_S + 50):
        refuse(log)
    now[0] += 1
    refuse(log)
    log.close()
    written = lines(path)
    assert len(written) == MAX_LINES_PER_S + 2
    assert written[-2]["num_lines"] == 50


def test_a_disk_that_hangs_costs_a_bounded_number_of_lines(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MAX_WAITING_LINES", 5)
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(log: AuditLog) -> None:
        hangs.set()
        assert goes_on.wait(60)

    monkeypatch.setattr(AuditLog, "_follow_rotation", hang)
    log = AuditLog(str(path))
    refuse(log)
    assert hangs.wait(60)
    for _ in range(100):
        refuse(log)
    assert log._lines.qsize() == 5
    goes_on.set()
    log.close()
    written = lines(path)
    assert sum(line.get("num_lines", 1) for line in written) == 101
    assert len(written) < 20


def test_lines_after_a_rotation_go_to_the_new_file(path: Path) -> None:
    log = AuditLog(str(path))
    for number in range(20):
        refuse(log, who=str(number))
        if number == 10:
            path.rename(path.with_name("old"))
    log.close()
    both = lines(path.with_name("old")) + (lines(path) if path.exists() else [])
    assert [line["who"] for line in both] == [str(number) for number in range(20)]


def test_a_moved_file_is_begun_anew(path: Path) -> None:
    AuditLog(str(path)).close()
    log = AuditLog(str(path))
    path.rename(path.with_name("old"))
    refuse(log)
    log.close()
    assert len(lines(path)) == 1
    assert lines(path.with_name("old")) == []


async def test_a_hangup_begins_a_moved_file_anew_before_there_is_a_line(tmp_path: Path, path: Path) -> None:
    keys = Keys(tmp_path / "keys.yaml")
    keys.write("alice")
    security = ProcessSecurity.of(SecuritySettings(keys_file=str(keys.path), audit_log=str(path)), Role.GATEWAY)
    guard = security.guard
    assert guard is not None
    old = path.with_name("old")

    def refuse_one(method: str) -> None:
        with pytest.raises(UnauthenticatedError):
            guard.check(method, [], {}, "ipv4:10.0.0.9:1")

    async with security.watching():
        refuse_one("/kvrelay.v1.InferenceService/GetRequest")
        await wait_until(lambda: path.stat().st_size > 0, "the line is written")
        os.rename(path, old)
        os.kill(os.getpid(), signal.SIGHUP)
        await wait_until(path.exists, "the file is begun anew")
        await wait_until(lambda: str(old) not in open_files(), "the moved file may be packed or removed")
        assert lines(path) == []
        refuse_one("/kvrelay.v1.InferenceService/Resume")
    assert [line["method"].rpartition("/")[2] for line in lines(old)] == ["GetRequest"]
    assert [line["method"].rpartition("/")[2] for line in lines(path)] == ["Resume"]


def test_a_file_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path, tmp_path / "none" / "file", tmp_path / "pipe"):
        with pytest.raises(ConfigError, match="audit_log"):
            AuditLog(str(bad))


async def test_refused_calls_and_reaches_for_others_requests_are_written(tmp_path: Path, path: Path) -> None:
    keys = Keys(tmp_path / "keys.yaml")
    keys.write("alice")
    security = ProcessSecurity.of(SecuritySettings(keys_file=str(keys.path), audit_log=str(path)), Role.GATEWAY)
    guard = security.guard
    assert guard is not None
    method = "/kvrelay.v1.InferenceService/GetRequest"
    async with security.watching():
        for metadata in ([], [("authorization", "Bearer secret-key")]):
            with pytest.raises(Exception, match=r"key|credentials"):
                guard.check(method, metadata, {}, "ipv4:10.0.0.9:1")
        guard.check(method, [("authorization", "Bearer alice")], {}, "ipv4:10.0.0.9:1")
        record_access("own", allowed=True, is_own=True)
        record_access("foreign", allowed=False, is_own=False)
    written = lines(path)
    assert [(line["who"], line["request_id"], line["decision"], line["reason"]) for line in written] == [
        ("ipv4:10.0.0.9:1", "", "refused", "UNAUTHENTICATED"),
        ("ipv4:10.0.0.9:1", "", "refused", "UNAUTHENTICATED"),
        ("alice", "foreign", "refused", "OTHER_TENANT"),
    ]
    assert all("secret" not in str(line) for line in written)


def test_a_call_without_an_audit_log_writes_nothing() -> None:
    set_current_audit(None)
    record_access("r", allowed=False, is_own=False)


def test_an_operator_at_work_on_anothers_request_is_written(path: Path) -> None:
    log = AuditLog(str(path))
    set_current_audit(CallAudit(log, Principal(frozenset({Role.OPERATOR}), None, "op-1"), "/x.Y/Cancel"))
    record_access("r", allowed=True, is_own=False)
    record_access("r", allowed=True, is_own=False)  # the same look-up, in the store
    set_current_audit(None)
    log.close()
    assert [(line["who"], line["decision"]) for line in lines(path)] == [("op-1", "allowed")]
