"""Runs functions that recurse as deep as their input says."""

import threading
from collections.abc import Callable
from typing import TypeVar

ResultT = TypeVar("ResultT")

STACK_BYTES = 256 * 1024 * 1024
"""Address space, not memory. The deepest allowed grammar (64 KiB) needs 30 MiB."""

_starting = threading.Lock()


def start_with_large_stack(run: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=run, name=name, daemon=True)
    with _starting:
        # The setting is the whole process's: another thread that starts now gets a large stack too.
        usual_bytes = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(usual_bytes)
    return thread


def call_with_large_stack(function: Callable[[], ResultT], name: str) -> ResultT:
    from concurrent.futures import Future  # takes long to import

    outcome: Future[ResultT] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except Exception as error:  # the caller handles it
            outcome.set_exception(error)

    start_with_large_stack(run, name).join()
    return outcome.result()
