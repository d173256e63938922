"""Streams whose wait Ctrl-C may end."""

import signal
import threading
from collections.abc import Iterator

import pytest

from kvrelay.cli.interruptible import interruptible


def test_items_come_in_order_and_none_before_it_is_wanted() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for number in range(3):
            read.append(number)
            yield number

    for item in interruptible(items()):
        assert read[-1] == item
    assert read == [0, 1, 2]


def test_an_error_of_the_stream_is_raised_where_it_is_read() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    stream = interruptible(items())
    assert next(stream) == 1
    with pytest.raises(ValueError, match="broken"):
        next(stream)


def test_ctrl_c_ends_the_wait_for_an_item_and_the_stream_is_left_whole() -> None:
    main, may_go_on, was_read = threading.get_ident(), threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 1
        signal.pthread_kill(main, signal.SIGINT)
        may_go_on.wait(60)
        was_read.set()
        yield 2

    stream = interruptible(items())
    assert next(stream) == 1
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    may_go_on.set()
    assert was_read.wait(60), "its reader was not interrupted"
