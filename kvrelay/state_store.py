"""Request state in Redis: records, frame logs, the list of requests and idempotency keys. Knows no gRPC, no worker and no token's meaning.

Every operation is bounded by the timeout and raises:
    UnavailableError   Redis does not answer, or did not a moment ago: the breaker fails fast until a ping succeeds
    StoreFullError     Redis is out of memory and evicts nothing
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvrelay.redis_connection import RedisConnection, StoreHealth
from kvrelay.request_record import RequestRecord, RequestSummary
from kvrelay.request_state import RequestState


@dataclass(frozen=True, slots=True)
class IdempotencyClaim:
    """Who owns an idempotency key."""

    request_id: str
    """The request that the key stands for."""
    mine: bool
    """Whether that is the request that asked."""


@dataclass(frozen=True, slots=True)
class RequestPage:
    """Requests, newest first. A page may be short, even empty, and still have a next one."""

    requests: list[RequestSummary]
    next_page_token: str
    """Empty on the last page."""


class StateStore:
    """Request state as one gateway sees and changes it.

    Args:
        connection: shared with the worker registry; the store does not close it.
        gateway_id: instance id of the gateway, the owner of what it creates.
        retention_ms: how long an ended request is known.
    """

    def __init__(self, connection: RedisConnection, gateway_id: str, retention_ms: int = 3_600_000) -> None:
        raise NotImplementedError

    @property
    def healthy(self) -> bool:
        """Whether Redis answers, as far as is known; False while the breaker is open."""
        raise NotImplementedError

    @property
    def health(self) -> StoreHealth:
        """The breaker; `await health.wait_until_healthy()` to write what was kept back."""
        raise NotImplementedError

    async def create(self, record: RequestRecord) -> bool:
        """Writes a new request. Repeating it is harmless.

        Returns:
            False when the id is taken by another request (other attempt, state or owner); nothing is changed then.
        """
        raise NotImplementedError

    async def transition(
        self,
        request_id: str,
        attempt: int,
        to_state: RequestState,
        *,
        new_attempt: int | None = None,
        fields: Mapping[str, str | int] | None = None,
        owner: str | None = None,
    ) -> bool:
        """Moves a request along an edge, in one compare-and-set.

        Args:
            request_id: the request.
            attempt: the attempt that the caller runs.
            to_state: where to.
            new_attempt: `attempt + 1` to try again; `to_state` is QUEUED then.
            fields: `CHANGEABLE_FIELDS` to set along.
            owner: who must own the request; default this gateway. To end a dead gateway's request, name that gateway.

        Returns:
            True when the request is there now, also when it was there already; False when the caller is a zombie: the request is final,
            of a newer attempt or of another owner. Nothing is changed then.

        Raises:
            StateLostError: Redis has lost writes of this owner: the record is missing, of an older attempt, or so far behind that no edge
                leads to the state. `restore` writes it again.
        """
        raise NotImplementedError

    async def restore(self, record: RequestRecord, frames: Sequence[bytes]) -> bool:
        """Writes the owner's knowledge again after Redis lost some of it. The attempt never goes back.

        Returns:
            False when Redis has a newer attempt, a final state or another owner of this attempt; nothing is changed then.
        """
        raise NotImplementedError

    async def append_frames(self, request_id: str, attempt: int, position: int, frames: Sequence[bytes]) -> int:
        """Appends to a request's frame log; frames that are there already are dropped.

        Args:
            request_id: the request.
            attempt: the attempt that made the frames.
            position: index of the first frame in the request's log.
            frames: opaque, non-empty bytes each.

        Returns:
            The log's new length in frames.

        Raises:
            FrameGapError: frames before `position` are missing (`num_frames` says how many there are): Redis lost them, or the caller
                skipped some.
            StateLostError: the record is missing, or of an older attempt.
            SupersededError: the request is final, of a newer attempt or of another owner.
        """
        raise NotImplementedError

    async def read_frames(self, request_id: str, position: int, max_count: int, wait_ms: int = 0) -> tuple[list[bytes], RequestState]:
        """Frames from `position` on, waiting up to `wait_ms` for the first one or for the end.

        Returns:
            At most `max_count` frames, and the state. A final state comes with the last frames only: until all were returned, an ended
            request reads as DECODING. So `(…, final)` always means that nothing follows.

        Raises:
            RequestNotFoundError: no such request, or it was forgotten.
        """
        raise NotImplementedError

    async def get(self, request_id: str) -> RequestRecord | None:
        """One request, or None."""
        raise NotImplementedError

    async def list_requests(self, page_size: int, page_token: str = "", active_only: bool = False) -> RequestPage:
        """Known requests of all gateways, newest first.

        Raises:
            InvalidRequestError: `page_token` is none of ours.
        """
        raise NotImplementedError

    async def take_over(
        self, request_id: str, expected_owner: str, expected_attempt: int, new_owner: str | None = None
    ) -> RequestRecord | None:
        """Makes an active request this gateway's: attempt + 1, QUEUED.

        Args:
            request_id: the request.
            expected_owner: the dead gateway.
            expected_attempt: its attempt.
            new_owner: default this gateway.

        Returns:
            The record as it is now, or None when it is not as expected, final or gone. Its frames: `read_frames`.
        """
        raise NotImplementedError

    async def claim_idempotency_key(
        self, tenant: str, key: str, body_digest: str, request_id: str, ttl_ms: int
    ) -> IdempotencyClaim:
        """Makes the key stand for this request, unless it stands for another already.

        Args:
            tenant: keys are the tenant's own.
            key: the client's key.
            body_digest: digest of the request's body.
            request_id: the request that asks.
            ttl_ms: how long the key is remembered: what is left of the deadline, plus the retention.

        Raises:
            IdempotencyConflictError: the key was used with another body.
        """
        raise NotImplementedError

    async def release_idempotency_key(self, tenant: str, key: str, request_id: str) -> None:
        """Forgets the key when this request owns it; for a request that was not admitted after all."""
        raise NotImplementedError
