"""Counts a request's failures and makes its errors. Pure."""

from kvrelay.core.job import FailureKind
from kvrelay.errors import (
    DeadlineError,
    InternalError,
    InvalidRequestError,
    KvrelayError,
    OverloadedError,
    UnavailableError,
)

FIRST_WAIT_MS = 20
LONGEST_WAIT_MS = 1000
_REFUSALS = frozenset({FailureKind.OUT_OF_CAPACITY, FailureKind.DRAINING, FailureKind.UNPROVEN})
"""The worker did nothing for the job."""


class RetryPolicy:
    """Refusals do not count against `max_attempts`."""

    def __init__(self, max_attempts: int) -> None:
        self._max_attempts = max_attempts
        self._num_failures = 0
        self._num_waits = 0
        self._last_kind: FailureKind | None = None
        self._excluded_worker_ids: set[str] = set()
        self._avoided_pairs: set[tuple[str, str]] = set()
        self.uses_budget = False
        self._suspected_worker_ids: set[str] = set()

    @property
    def is_suspect(self) -> bool:
        return bool(self._suspected_worker_ids)

    @property
    def suspected_worker_ids(self) -> frozenset[str]:
        """Dead workers that the request may have crashed."""
        return frozenset(self._suspected_worker_ids)

    @property
    def excluded_worker_ids(self) -> frozenset[str]:
        return frozenset(self._excluded_worker_ids)

    @property
    def avoided_pairs(self) -> frozenset[tuple[str, str]]:
        """(decode, prefill) workers whose transfer failed."""
        return frozenset(self._avoided_pairs)

    def on_failure(self, kind: FailureKind | None, worker_id: str, pair: tuple[str, str] | None) -> KvrelayError | None:
        """Returns the error that ends the request; None to try again.

        `kind` is None when the worker was lost.
        """
        self._last_kind = kind
        self.uses_budget = kind in (FailureKind.INTERNAL, FailureKind.TRANSFER)
        if kind is FailureKind.TRANSFER and pair is not None:
            self._avoided_pairs.add(pair)
        elif kind is not FailureKind.SUPERSEDED:  # the same worker takes a later attempt
            self._excluded_worker_ids.add(worker_id)
        if kind in _REFUSALS:
            return None
        self._num_failures += 1
        if self._num_failures < self._max_attempts:
            return None
        if kind is FailureKind.INTERNAL:
            return InternalError(
                f"workers failed at the request {self._num_failures} times; their logs have the detail"
            )
        return UnavailableError(
            f"the request was attempted {self._num_failures} times and its workers were lost each time; try again"
        )

    def on_token(self) -> None:
        self._num_waits = 0

    def on_survived(self) -> None:
        """The attempt outlived the failed one: failures count anew."""
        self._num_failures = 0
        self._suspected_worker_ids.clear()

    def on_suspected(self, worker_id: str) -> None:
        self._suspected_worker_ids.add(worker_id)

    def clear_suspicion(self, worker_id: str) -> None:
        self._suspected_worker_ids.discard(worker_id)

    def next_wait_ms(self) -> int:
        """After this wait all workers, excluded ones too, are tried again."""
        self._excluded_worker_ids.clear()
        self._num_waits += 1
        return min(FIRST_WAIT_MS << min(self._num_waits, 10), LONGEST_WAIT_MS)

    def waiting_error(self) -> KvrelayError:
        if self._last_kind is FailureKind.OUT_OF_CAPACITY:
            return OverloadedError("every worker of the model is full; try again later")
        return UnavailableError("no worker can take the request now; check `kvrelay status` and try again")


def quarantine_error() -> InternalError:
    return InternalError(
        "the request is quarantined: a worker died while it computed this request and perhaps others, and another one"
        " while it computed nothing else; it is not attempted again, and the workers' logs have the detail"
    )


def too_slow_error() -> OverloadedError:
    return OverloadedError(
        "the client reads its stream too slowly, and its tokens cannot be kept without end; read faster"
    )


def deadline_error() -> DeadlineError:
    return DeadlineError("the request's deadline passed before it was done; allow more time, or ask for fewer tokens")


def invalid_error(problem: str) -> InvalidRequestError:
    """`problem` may begin with a sampling field."""
    field, _, rest = problem.partition(" ")
    if field.startswith("response_format.") and rest:
        return InvalidRequestError(f"sampling.{field}", rest)
    return InvalidRequestError("prompt", f"cannot be served: {problem}")
