"""Runs a function in a thread of its own with a deep stack, for code that recurses as deep as its input says."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

ResultT = TypeVar("ResultT")

STACK_BYTES = 256 * 1024 * 1024
"""Of address space: memory is only what is reached. Of 64 KiB of grammar, the deepest needs some 30 MiB."""

_starting = threading.Lock()


def start_on_deep_stack(run: Callable[[], None], name: str) -> threading.Thread:
    """Starts a thread, which keeps no process from ending."""
    thread = threading.Thread(target=run, name=name, daemon=True)
    with _starting:
        # A setting of the whole process: a thread that another one starts meanwhile only gets more than it needs.
        usual_bytes = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(usual_bytes)
    return thread


def call_on_deep_stack(function: Callable[[], ResultT], name: str) -> ResultT:
    """Calls a function in such a thread and waits for it."""
    outcome: Future[ResultT] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except Exception as error:  # the caller's to handle
            outcome.set_exception(error)

    start_on_deep_stack(run, name).join()
    return outcome.result()
