"""How much the gateway takes on: bounds on requests in progress and on prompt tokens that wait. Pure; callers tell the time."""

from kvrelay.errors import OverloadedError

SHORTEST_RETRY_MS = 100
LONGEST_RETRY_MS = 5000
_SMOOTHING = 0.1


class Admission:
    """Counts what was admitted and has not ended.

    Args:
        max_running_requests: most requests in progress.
        max_queued_prompt_tokens: most prompt tokens of requests without a first token. One request larger than that is admitted
            when nothing else waits.
    """

    def __init__(self, max_running_requests: int, max_queued_prompt_tokens: int) -> None:
        self._max_running_requests = max_running_requests
        self._max_queued_prompt_tokens = max_queued_prompt_tokens
        self._num_running = 0
        self._num_queued_tokens = 0
        self._mean_queue_s = 1.0
        self._mean_run_s = 1.0

    @property
    def num_running_requests(self) -> int:
        return self._num_running

    @property
    def num_queued_prompt_tokens(self) -> int:
        return self._num_queued_tokens

    def admit(self, num_prompt_tokens: int, now: float) -> "Admitted":
        """Takes a request on. `now` is monotonic seconds.

        Raises:
            OverloadedError: a bound is reached; says when to come again.
        """
        self.check_room()
        num_tokens = self._num_queued_tokens + num_prompt_tokens
        if self._num_queued_tokens and num_tokens > self._max_queued_prompt_tokens:
            message = f"{self._num_queued_tokens} prompt tokens wait already, as many as are allowed; try again later"
            raise OverloadedError(message, _retry_after_ms(self._mean_queue_s))
        return self.admit_anyway(num_prompt_tokens, now)

    def check_room(self) -> None:
        """Whether there is room for one more request, whatever its prompt: to be asked before anything is spent on it.

        Raises:
            OverloadedError: there is none.
        """
        if self._num_running >= self._max_running_requests:
            message = f"{self._num_running} requests are in progress, as many as are allowed; try again later"
            raise OverloadedError(message, _retry_after_ms(self._mean_run_s / self._num_running))

    def admit_anyway(self, num_prompt_tokens: int, now: float) -> "Admitted":
        """Takes on a request that was admitted before, by another gateway; it counts like any other."""
        self._num_running += 1
        self._num_queued_tokens += num_prompt_tokens
        return Admitted(self, num_prompt_tokens, now)

    def _leave_queue(self, num_prompt_tokens: int, elapsed_s: float) -> None:
        self._num_queued_tokens -= num_prompt_tokens
        self._mean_queue_s += _SMOOTHING * (elapsed_s - self._mean_queue_s)

    def _end(self, elapsed_s: float) -> None:
        self._num_running -= 1
        self._mean_run_s += _SMOOTHING * (elapsed_s - self._mean_run_s)


class Admitted:
    """One admitted request's share of the bounds."""

    def __init__(self, admission: Admission, num_prompt_tokens: int, now: float) -> None:
        self._admission = admission
        self._num_prompt_tokens = num_prompt_tokens
        self._begin = now
        self._queued = True
        self._running = True

    @property
    def waits(self) -> bool:
        """Whether it has no first token yet."""
        return self._queued

    def note_first_token(self, now: float) -> bool:
        """Its prompt waits no more. Idempotent; whether it did wait."""
        if not self._queued:
            return False
        self._queued = False
        self._admission._leave_queue(self._num_prompt_tokens, now - self._begin)
        return True

    def release(self, now: float) -> None:
        """It ended. Idempotent."""
        self.note_first_token(now)
        if self._running:
            self._running = False
            self._admission._end(now - self._begin)


def _retry_after_ms(expected_wait_s: float) -> int:
    return int(min(max(expected_wait_s * 1000, SHORTEST_RETRY_MS), LONGEST_RETRY_MS))
