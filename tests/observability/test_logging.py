"""Logs go on, or are lost; they never end what is logged about."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, structlog
from kvrelay.observability.logging import configure_logging
configure_logging("info", "json", role="decode")
log = structlog.get_logger("test")
log.debug("hidden")
log.info("shown", request_id="r")
os.read(0, 1)
for number in range(3):
    log.info("after the reader went", number=number)
print("alive")
"""


def test_lines_are_json_with_their_context_and_a_reader_that_goes_away_ends_nothing() -> None:
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=write_end, text=True
    )
    os.close(write_end)
    line = json.loads(os.read(read_end, 65536))
    os.close(read_end)
    output, _ = process.communicate(input="x", timeout=60)
    assert (line["event"], line["level"], line["role"], line["request_id"]) == ("shown", "info", "decode", "r")
    assert output == "alive\n"
    assert process.returncode == 0


@pytest.mark.parametrize("format_", ["json", "console"])
def test_no_name_or_error_of_others_makes_a_line_long(format_: str) -> None:
    code = f"""
from kvrelay.observability.logging import configure_logging
import structlog
configure_logging("info", "{format_}")
structlog.get_logger().info("began", gateway="g" * 2**22, names=["n" * 2**20], number=5)
try:
    raise ValueError("e" * 2**22)
except ValueError:
    structlog.get_logger().exception("failed")
"""
    log = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=True, timeout=60).stderr
    began, failed = log[: (split := log.index(b"failed"))], log[split:]
    assert b"ggg" in began
    assert len(began) < 4 * 1024
    assert b"Traceback" in failed
    assert len(failed) < 24 * 1024


def test_a_log_that_nobody_reads_holds_nobody_up() -> None:
    code = "from kvrelay.observability.logging import configure_logging; import structlog; configure_logging('info', 'json')\n"
    code += "for _ in range(1000): structlog.get_logger().info('x' * 9000)\nprint('done')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read() == b"done\n"  # while its standard error is full
    _, log = process.communicate()
    assert len(log) >= 4096


def test_a_full_disk_loses_lines_and_ends_nothing() -> None:
    code = "from kvrelay.observability.logging import configure_logging; import structlog; configure_logging('info', 'json')\n"
    code += "for _ in range(10): structlog.get_logger().info('x' * 9000)\nprint('done')"
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, timeout=60, check=False
        )
    assert process.stdout == b"done\n"
    assert process.returncode == 0
