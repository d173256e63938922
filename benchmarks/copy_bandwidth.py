"""How fast this machine copies memory: the bound of a transfer that does nothing but copy."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

COPY_BYTES = 96 * 1024 * 1024
"""Of each thread: more than caches hold."""
BYTES_PER_GB = 1e9


def copy_gb_per_s(num_threads: int, rounds: int = 7) -> float:
    """Median over the rounds of what so many threads copy together. What is copied is counted once,
    not as read and written.
    """
    arrays = [(np.ones(COPY_BYTES, np.uint8), np.ones(COPY_BYTES, np.uint8)) for _ in range(num_threads)]

    def copy(pair: tuple[np.ndarray, np.ndarray]) -> None:
        np.copyto(*pair)  # releases the interpreter's lock

    rates: list[float] = []
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(copy, arrays))
        for _ in range(rounds):
            begin_s = time.perf_counter()
            list(threads.map(copy, arrays))
            rates.append(num_threads * COPY_BYTES / BYTES_PER_GB / (time.perf_counter() - begin_s))
    return statistics.median(rates)
