"""Bounds requests in progress and waiting prompt tokens, of all and of each key.

Pure; times are monotonic seconds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gateway.requests.key_limits import Caller
from gateway.requests.key_usage import KeyUsage
from gateway.requests.place_queue import PlaceQueue, Waiting
from gateway.requests.reported_usage import Report, ReportedUsage, UsageElsewhere
from kvrelay.errors import OverloadedError, QuotaError
from kvrelay.security.principal import LOCAL

SHORTEST_RETRY_MS = 100
LONGEST_RETRY_MS = 5000
MAX_KEYS_KEPT = 4096
_SMOOTHING = 0.1


@dataclass(frozen=True, slots=True)
class Bounds:
    max_running_requests: int
    max_queued_prompt_tokens: int
    """Of requests without a first token. A larger request is admitted alone."""
    max_waiting_requests: int = 0
    retention_s: float = 3600.0
    """How long Redis keeps an ended request."""


class Admission:
    """A request takes a place before anything is spent on it.

    Its prompt is admitted once its tokens are known.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._keys: dict[str, KeyUsage] = {}
        self._elsewhere = UsageElsewhere()
        self._places = PlaceQueue(bounds.max_waiting_requests)
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

    @property
    def num_waiting_for_place(self) -> int:
        return len(self._places)

    def usage_of(self, caller: Caller, now: float) -> KeyUsage:
        usage = self._keys.get(caller.key_id)
        if usage is None:
            if len(self._keys) >= MAX_KEYS_KEPT:
                self._keys = {key_id: usage for key_id, usage in self._keys.items() if not usage.is_at_rest(now)}
            usage = self._keys[caller.key_id] = KeyUsage(caller, self._bounds.retention_s)
            usage.set_limits(caller.limits, now)
            usage.elsewhere = self._elsewhere.of(usage.digest)
            usage.charge(*self._elsewhere.missing(usage.digest))
        usage.set_limits(caller.limits, now)
        return usage

    def report(self, now: float) -> Report:
        used = (usage for key_id, usage in self._keys.items() if key_id != LOCAL.key_id)
        return {usage.digest: usage.report(now) for usage in used if not usage.is_at_rest(now)}

    def set_elsewhere(self, reports: Mapping[str, Report], now: float) -> None:
        """`reports` by gateway."""
        grown = self._elsewhere.update(reports)
        for key_id, usage in self._keys.items():
            if key_id != LOCAL.key_id:
                usage.elsewhere = self._elsewhere.of(usage.digest)
                more = grown.get(usage.digest, ReportedUsage())
                usage.charge(more.num_output_tokens, more.num_formats)
        self._give_places(now)

    def check_room(self, caller: Caller, now: float) -> None:
        """Raises as `take_place` does."""
        self.usage_of(caller, now).check_new(self._mean_run_s, now)
        if self._num_running >= self._bounds.max_running_requests:
            raise self.full_error()

    def take_format(self, caller: Caller, now: float) -> None:
        """Raises QuotaError if the caller's key had too many response formats compiled."""
        self.usage_of(caller, now).take_format(now)

    def take_place(self, caller: Caller, now: float) -> "Admitted":
        """Raises:
        QuotaError: a limit of the caller's key is reached.
        OverloadedError: all places are taken.
        """
        self.check_room(caller, now)
        return self._admit(caller, now)

    def wait_for_place(self, caller: Caller, now: float, wake: Callable[[], None]) -> Waiting:
        """Follows OverloadedError of `take_place`. Call `claim` or `withdraw` afterwards.

        Raises:
            OverloadedError: too many wait.
        """
        waiting = self._places.push(caller, wake)
        if waiting is None:
            raise self.full_error()
        return waiting

    def claim(self, waiting: Waiting, now: float) -> "Admitted":
        assert waiting.has_place, "woken with a place"
        waiting.has_place = False
        self._leave_place(waiting.caller)
        return self._admit(waiting.caller, now)

    def withdraw(self, waiting: Waiting, now: float) -> None:
        """Idempotent. A place that was given goes to the next."""
        self._places.remove(waiting)
        if waiting.has_place:
            waiting.has_place = False
            self._leave_place(waiting.caller)
            self._give_places(now)

    def admit_anyway(self, num_prompt_tokens: int, caller: Caller, now: float) -> "Admitted":
        """Admits a request that another gateway had admitted."""
        admitted = self._admit(caller, now)
        admitted._queue(num_prompt_tokens)
        return admitted

    def full_error(self) -> OverloadedError:
        message = f"{self._num_running} requests are in progress, as many as are allowed; try again later"
        return OverloadedError(message, _retry_after_ms(self._mean_run_s / max(self._num_running, 1)))

    # --- Below: parts of the above

    def _admit(self, caller: Caller, now: float) -> "Admitted":
        usage = self.usage_of(caller, now)
        self._num_running += 1
        usage.num_running += 1
        return Admitted(self, usage, now)

    def _leave_place(self, caller: Caller) -> None:
        self._num_running -= 1
        self._keys[caller.key_id].num_running -= 1

    def _give_places(self, now: float) -> None:
        while self._num_running < self._bounds.max_running_requests:
            waiting = self._places.give_place(lambda caller: self._may_have_place(caller, now))
            if waiting is None:
                return
            self._num_running += 1
            self.usage_of(waiting.caller, now).num_running += 1
            waiting.has_place = True
            waiting.wake()

    def _may_have_place(self, caller: Caller, now: float) -> bool:
        try:
            self.usage_of(caller, now).check_new(self._mean_run_s, now)
        except QuotaError:
            return False
        return True

    def _check_prompt(self, usage: KeyUsage, num_tokens: int) -> None:
        usage.check_prompt(num_tokens, self._mean_queue_s)
        bound = self._bounds.max_queued_prompt_tokens
        if not self._num_queued_tokens or self._num_queued_tokens + num_tokens <= bound:
            return
        # A key with less than its part is let in: no other takes all. Twice the bound is the most.
        num_keys = 1 + sum(other.num_queued_tokens > 0 for other in self._keys.values() if other is not usage)
        if num_keys == 1 or usage.num_queued_tokens + num_tokens > bound // num_keys:
            message = f"{self._num_queued_tokens} prompt tokens wait already, as many as are allowed; try again later"
            raise OverloadedError(message, _retry_after_ms(self._mean_queue_s))

    def _leave_queue(self, num_prompt_tokens: int, elapsed_s: float) -> None:
        self._num_queued_tokens -= num_prompt_tokens
        self._mean_queue_s += _SMOOTHING * (elapsed_s - self._mean_queue_s)

    def _end(self, elapsed_s: float, now: float) -> None:
        self._num_running -= 1
        self._mean_run_s += _SMOOTHING * (elapsed_s - self._mean_run_s)
        self._give_places(now)


class Admitted:
    """One request's place. Release it."""

    def __init__(self, admission: Admission, usage: KeyUsage, now: float) -> None:
        self._admission = admission
        self._usage = usage
        self._begin = now
        self._num_prompt_tokens = 0
        self._num_stored_bytes = 0
        self._queued = False
        self._running = True
        self._unattended = False
        self.is_started = False
        """A runner has the place, and releases it."""

    @property
    def waits(self) -> bool:
        return self._queued

    @property
    def counts_bytes(self) -> bool:
        return self._usage.counts_bytes

    def admit_prompt(self, num_prompt_tokens: int) -> None:
        """Raises:
        QuotaError, OverloadedError: too many prompt tokens wait. Tells when to retry.
        """
        self._admission._check_prompt(self._usage, num_prompt_tokens)
        self._queue(num_prompt_tokens)

    def count_output_token(self) -> None:
        self._usage.count_output_token()

    def set_stored_bytes(self, num_bytes: int) -> None:
        """What Redis has of the request now; at its end, what it keeps."""
        self._usage.add_stored_bytes(num_bytes - self._num_stored_bytes)
        self._num_stored_bytes = num_bytes

    def set_unattended(self, unattended: bool) -> None:
        """Idempotent. Raises QuotaError if the key has too many requests without a client."""
        if unattended == self._unattended or not self._running:
            return
        if unattended:
            self._usage.take_unattended()
        else:
            self._usage.num_unattended -= 1
        self._unattended = unattended

    def on_first_token(self, now: float) -> bool:
        """Returns whether the request had waited. Idempotent."""
        if not self._queued:
            return False
        self._queued = False
        self._usage.num_queued_tokens -= self._num_prompt_tokens
        self._admission._leave_queue(self._num_prompt_tokens, now - self._begin)
        return True

    def release(self, now: float) -> None:
        """Idempotent."""
        self.on_first_token(now)
        if not self._running:
            return
        self.set_unattended(False)
        self._running = False
        self._usage.num_running -= 1
        if self._num_stored_bytes:
            self._usage.expire_stored_bytes(self._num_stored_bytes, now)
        self._admission._end(now - self._begin, now)

    def _queue(self, num_prompt_tokens: int) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._queued = True
        self._admission._num_queued_tokens += num_prompt_tokens
        self._usage.num_queued_tokens += num_prompt_tokens


def _retry_after_ms(expected_wait_s: float) -> int:
    return int(min(max(expected_wait_s * 1000, SHORTEST_RETRY_MS), LONGEST_RETRY_MS))
