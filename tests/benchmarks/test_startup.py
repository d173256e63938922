"""What the start-up benchmark reads from a cluster's log."""

import asyncio

import pytest

from benchmarks.startup_measurement import Event, ProcessUse, Start, _Log, _until, is_worker
from kvrelay.errors import StartupError

MEBIBYTE = 1024 * 1024


def test_log_tells_how_far_each_process_got_and_what_its_pool_takes() -> None:
    log = _Log(begin_s=0.0)
    log._take("decode-0  | 2026-01-01 [info     ] model loaded    kv_mib=1023 model=m")
    log._take("decode-0  | 2026-01-01 [info     ] kernels ready    num_threads=1")
    assert not log.ready.is_set()
    log._take("kvrelay   | ready: the gateway is 127.0.0.1:1; Ctrl-C ends everything")
    assert [(event.process, event.event) for event in log.events] == [
        ("decode-0", "model loaded"),
        ("kvrelay", "ready"),
    ]
    assert log.kv_pool_bytes == 1023 * MEBIBYTE
    assert log.ready.is_set()


async def test_a_cluster_that_ends_while_starting_is_an_error_with_its_last_lines() -> None:
    log = _Log(begin_s=0.0)
    log._take("decode-0  | no memory")
    reading = asyncio.create_task(asyncio.sleep(0))
    with pytest.raises(StartupError, match="no memory"):
        await _until(asyncio.Event().wait(), reading, log)


def test_the_bound_of_a_worker_grows_with_weights_and_pool() -> None:
    worker = ProcessUse("decode-0", "decode", 0.0, 1.0, MEBIBYTE, MEBIBYTE)
    start = Start(1.0, 1.0, (Event("decode-0", "ready", 1.0),), (worker,), kv_pool_bytes=MEBIBYTE)
    assert start.worker_bound_bytes(weight_bytes=10 * MEBIBYTE) == 14 * MEBIBYTE + 500_000_000
    assert start.full_bytes(worker) == 2 * MEBIBYTE
    assert is_worker(worker)
