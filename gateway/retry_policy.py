"""What a request remembers of its failures: whom to avoid, how long to wait, when to give up. Pure; the lifecycle asks it."""

from kvrelay.errors import InternalError, KvrelayError, OverloadedError, UnavailableError
from kvrelay.work import FailureKind

FIRST_WAIT_MS = 20
LONGEST_WAIT_MS = 1000


class RetryPolicy:
    """Failures of one request.

    Args:
        max_attempts: attempts that may fail. Those refused by full or draining workers do not count; waiting is bounded by time.
    """

    def __init__(self, max_attempts: int) -> None:
        self._max_attempts = max_attempts
        self._num_failures = 0
        self._num_waits = 0
        self._last_kind: FailureKind | None = None
        self._excluded_worker_ids: set[str] = set()
        self._avoided_pairs: set[tuple[str, str]] = set()
        self.is_due_to_pay = False
        """Whether the next attempt is one that the gateway's retry budget pays for."""
        self._suspected_worker_ids: set[str] = set()

    @property
    def has_failed(self) -> bool:
        """Whether an attempt failed, and the request has not got further since."""
        return self._num_failures > 0 or self.is_suspect

    @property
    def is_suspect(self) -> bool:
        """Whether a worker died that may have died of the request, and it has not got further since."""
        return bool(self._suspected_worker_ids)

    @property
    def suspected_worker_ids(self) -> frozenset[str]:
        """Workers that may have died of the request since it last got further."""
        return frozenset(self._suspected_worker_ids)

    @property
    def excluded_worker_ids(self) -> frozenset[str]:
        return frozenset(self._excluded_worker_ids)

    @property
    def avoided_pairs(self) -> frozenset[tuple[str, str]]:
        """(decode worker, prefill worker) between which KV did not travel."""
        return frozenset(self._avoided_pairs)

    def note_failure(self, kind: FailureKind | None, worker_id: str, pair: tuple[str, str] | None) -> KvrelayError | None:
        """Notes a failed attempt.

        Args:
            kind: what the worker said; None when the worker is gone.
            worker_id: the worker that failed.
            pair: (decode, prefill) worker of the work, when it had both.

        Returns:
            The error to end the request with when there were too many; None to try again.
        """
        self._last_kind = kind
        self.is_due_to_pay = kind in (FailureKind.INTERNAL, FailureKind.TRANSFER)
        if kind is FailureKind.TRANSFER and pair is not None:
            self._avoided_pairs.add(pair)
        elif kind is not FailureKind.SUPERSEDED:  # the same worker takes the next attempt, or one of those after it
            self._excluded_worker_ids.add(worker_id)
        if kind in (FailureKind.OUT_OF_CAPACITY, FailureKind.DRAINING):
            return None
        self._num_failures += 1
        if self._num_failures < self._max_attempts:
            return None
        if kind is FailureKind.INTERNAL:
            return InternalError(f"workers failed at the request {self._num_failures} times; their logs have the detail")
        return UnavailableError(
            f"the request was attempted {self._num_failures} times and its workers were lost each time; try again"
        )

    def note_progress(self) -> None:
        """A token came."""
        self._num_waits = 0

    def note_survived(self) -> None:
        """An attempt got further than the last one that failed: what comes now is counted anew."""
        self._num_failures = 0
        self._suspected_worker_ids.clear()

    def note_suspicion(self, worker_id: str) -> None:
        """The worker may have died of the request."""
        self._suspected_worker_ids.add(worker_id)

    def clear_suspicion(self, worker_id: str) -> None:
        """It did not, as is known now."""
        self._suspected_worker_ids.discard(worker_id)

    def next_wait_ms(self) -> int:
        """No worker is left: how long to wait before all are asked again, those excluded too, for they may be the only ones."""
        self._excluded_worker_ids.clear()
        self._num_waits += 1
        return min(FIRST_WAIT_MS << min(self._num_waits, 10), LONGEST_WAIT_MS)

    def error_of_waiting(self) -> KvrelayError:
        """The error of a request that waited for a worker as long as it may."""
        if self._last_kind is FailureKind.OUT_OF_CAPACITY:
            return OverloadedError("every worker of the model is full; try again later")
        return UnavailableError("no worker can take the request now; check `kvrelay status` and try again")
