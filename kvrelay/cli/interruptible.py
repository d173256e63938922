"""Lets Ctrl-C end the wait for a stream."""

from collections.abc import Iterable, Iterator
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

ItemT = TypeVar("ItemT")

# A signal that comes just before a wait begins is seen when the wait ends.
SIGNAL_CHECK_SECONDS = 0.2


def interruptible(items: Iterable[ItemT]) -> Iterator[ItemT]:
    """Yields items that another thread reads, each when it is wanted.

    Ctrl-C in gRPC's wait may leave gRPC's lock broken, so that a RuntimeError takes the place of
    KeyboardInterrupt. The wait for a SimpleQueue can be interrupted anywhere; it is short and
    repeated, because Python misses a signal that comes just before a wait begins.
    """
    wanted: SimpleQueue[bool] = SimpleQueue()
    # an item in a tuple, an error, or None at the end
    read: SimpleQueue[tuple[ItemT] | BaseException | None] = SimpleQueue()

    def read_wanted() -> None:
        iterator = iter(items)
        try:
            while wanted.get():
                try:
                    read.put((next(iterator),))
                except StopIteration:
                    break
            read.put(None)
        except BaseException as error:  # the caller's thread raises it
            read.put(error)

    Thread(target=read_wanted, name="reader of a stream", daemon=True).start()
    try:
        while True:
            wanted.put(True)
            match _get(read):
                case None:
                    return
                case BaseException() as error:
                    raise error
                case (item,):
                    yield item
    finally:
        wanted.put(False)


def _get(queue: "SimpleQueue[ItemT]") -> ItemT:
    while True:
        try:
            return queue.get(timeout=SIGNAL_CHECK_SECONDS)
        except Empty:
            continue
