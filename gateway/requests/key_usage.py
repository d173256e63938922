"""What one key has taken, held against its limits. Pure; times are monotonic seconds."""

from collections import deque

from gateway.requests.key_limits import Caller
from gateway.requests.reported_usage import ReportedUsage, digest_of_key
from gateway.requests.token_bucket import TokenBucket
from kvrelay.core.limit_names import LimitName
from kvrelay.core.quoting import quoted
from kvrelay.errors import QuotaError
from kvrelay.security.principal import Limits

SHORTEST_RETRY_MS = 100
LONGEST_RETRY_MS = 60_000
NUM_STORED_PARTS = 64
"""Bytes that expire within a 64th of the retention are forgotten together."""


class KeyUsage:
    """`retention_s`: how long Redis keeps an ended request."""

    def __init__(self, caller: Caller, retention_s: float) -> None:
        self.num_running = 0
        self.num_queued_tokens = 0
        self.num_unattended = 0
        self.digest = digest_of_key(caller.key_id)
        self.elsewhere = ReportedUsage()
        self._num_output_tokens = 0
        self._num_formats = 0
        self._key_id = caller.key_id
        self._limits = Limits()
        self._retention_s = retention_s
        self._output: TokenBucket | None = None
        self._formats: TokenBucket | None = None
        self._stored_bytes = 0
        self._expiring: deque[tuple[float, int]] = deque()
        """Times and bytes, the soonest first."""

    def set_limits(self, limits: Limits, now: float) -> None:
        if limits == self._limits:
            return
        self._limits = limits
        self._output = _bucket(self._output, limits.output_tokens_per_minute, now)
        self._formats = _bucket(self._formats, limits.formats_per_minute, now)

    def report(self, now: float) -> ReportedUsage:
        self._expire(now)
        return ReportedUsage(
            self.num_running,
            self.num_queued_tokens,
            self.num_unattended,
            self._stored_bytes,
            self._num_output_tokens,
            self._num_formats,
            0 if self._output is None else self._output.missing(now),
            0 if self._formats is None else self._formats.missing(now),
        )

    def charge(self, num_output_tokens: int, num_formats: int) -> None:
        """For use elsewhere."""
        if self._output is not None:
            self._output.take(num_output_tokens)
        if self._formats is not None:
            self._formats.take(num_formats)

    def is_at_rest(self, now: float) -> bool:
        """Whether it may be forgotten."""
        self._expire(now)
        is_full = all(bucket is None or bucket.is_full(now) for bucket in (self._output, self._formats))
        return is_full and not (self.num_running or self._stored_bytes)

    # --- checks, which raise QuotaError

    def check_new(self, mean_run_s: float, now: float) -> None:
        limits = self._limits
        num_running = self.num_running + self.elsewhere.num_running
        if limits.running_requests is not None and num_running >= limits.running_requests:
            problem = f"has {num_running} requests in progress, as many as it may; try again when one has ended"
            raise self._error(LimitName.RUNNING_REQUESTS, problem, mean_run_s / max(num_running, 1))
        if self._output is not None and (wait_s := self._output.seconds_until(1, now)):
            problem = f"has used up its {self._output.per_minute} output tokens a minute; try again later"
            raise self._error(LimitName.OUTPUT_TOKENS, problem, wait_s)
        self._expire(now)
        num_bytes = self._stored_bytes + self.elsewhere.stored_bytes
        if limits.stored_bytes is not None and num_bytes >= limits.stored_bytes:
            problem = f"has {num_bytes} bytes in the state store, of {limits.stored_bytes}; try again later"
            expires_at = self._expiring[0][0] if self._expiring else now + self._retention_s
            raise self._error(LimitName.STORED_BYTES, problem, expires_at - now)

    def check_prompt(self, num_tokens: int, mean_queue_s: float) -> None:
        limit, num_queued = self._limits.queued_prompt_tokens, self.num_queued_tokens + self.elsewhere.num_queued_tokens
        if limit is not None and num_queued and num_queued + num_tokens > limit:
            problem = f"has {num_queued} prompt tokens waiting, of {limit}; try again later"
            raise self._error(LimitName.QUEUED_PROMPT_TOKENS, problem, mean_queue_s)

    def take_format(self, now: float) -> None:
        if self._formats is None:
            self._num_formats += 1
            return
        if wait_s := self._formats.seconds_until(1, now):
            problem = f"has had {self._formats.per_minute} response formats compiled in a minute; use fewer, or wait"
            raise self._error(LimitName.FORMATS, problem, wait_s)
        self._formats.take()
        self._num_formats += 1

    def take_unattended(self) -> None:
        limit, num_unattended = self._limits.unattended_requests, self.num_unattended + self.elsewhere.num_unattended
        if limit is not None and num_unattended >= limit:
            problem = f"has {num_unattended} requests without a client already; send it again"
            raise self._error(LimitName.UNATTENDED_REQUESTS, problem, SHORTEST_RETRY_MS / 1000)
        self.num_unattended += 1

    # --- counts

    @property
    def counts_bytes(self) -> bool:
        return self._limits.stored_bytes is not None

    def count_output_token(self) -> None:
        self._num_output_tokens += 1
        if self._output is not None:
            self._output.take()

    def add_stored_bytes(self, num_bytes: int) -> None:
        self._stored_bytes += num_bytes

    def expire_stored_bytes(self, num_bytes: int, now: float) -> None:
        """The bytes' request has ended; they stay for the retention."""
        expires_at = now + self._retention_s
        if self._expiring and expires_at - self._expiring[-1][0] < self._retention_s / NUM_STORED_PARTS:
            expires_at_before, num_bytes_before = self._expiring.pop()
            # not in Redis before its own time: so they count a little shorter, never longer
            self._expiring.append((expires_at_before, num_bytes_before + num_bytes))
        else:
            self._expiring.append((expires_at, num_bytes))

    def _expire(self, now: float) -> None:
        while self._expiring and self._expiring[0][0] <= now:
            self._stored_bytes -= self._expiring.popleft()[1]

    def _error(self, limit: LimitName, problem: str, wait_s: float) -> QuotaError:
        retry_ms = int(min(max(wait_s * 1000, SHORTEST_RETRY_MS), LONGEST_RETRY_MS))
        return QuotaError(f"key {quoted(self._key_id)} {problem}", retry_ms, limit)


def _bucket(bucket: TokenBucket | None, per_minute: int | None, now: float) -> TokenBucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return TokenBucket(per_minute, now)
    bucket.set_rate(per_minute, now)
    return bucket
