"""Looks up requests, here and in the store, as far as the caller may see them.

For another tenant's request the words and the reads of the store are as for one that never was.
"""

from google.protobuf.timestamp_pb2 import Timestamp

from gateway.requests.registry import RunningRequests
from gateway.requests.runner import RequestRunner
from kvrelay.core.bounds import check_request_id
from kvrelay.core.quoting import quoted
from kvrelay.core.request_state import RequestState, is_terminal
from kvrelay.errors import RequestNotFoundError, UnavailableError, UnreadableStateError
from kvrelay.security.audit import record_access
from kvrelay.security.principal import current_principal
from kvrelay.state.request_list import RequestPage
from kvrelay.state.request_record import RequestRecord, RequestSummary
from kvrelay.state.state_store import StateStore
from kvrelay.v1 import inference_pb2


class KnownRequests:
    def __init__(self, running: RunningRequests, store: StateStore) -> None:
        self._running = running
        self._store = store

    def find_runner(self, request_id: str) -> RequestRunner | None:
        """Returns None unless it runs here for the caller.

        Raises RequestNotFoundError for what is no id.
        """
        check_request_id(request_id)
        runner = self._running.find(request_id)
        return runner if runner is not None and _may_see(request_id, runner.request.tenant) else None

    async def find(self, request_id: str) -> RequestRecord | None:
        runner = self.find_runner(request_id)
        if runner is not None:
            return runner.journal.record
        return await self._store.get(request_id) if await self._may_be_seen(request_id) else None

    async def get(self, request_id: str) -> RequestRecord:
        """Raises RequestNotFoundError."""
        record = await self.find(request_id)
        if record is None:
            raise _not_found(request_id)
        return record

    async def check_stored(self, request_id: str) -> None:
        """Raises RequestNotFoundError if what the store has of it is not for the caller."""
        if not await self._may_be_seen(request_id):
            raise _not_found(request_id)

    async def _may_be_seen(self, request_id: str) -> bool:
        principal = current_principal()
        if principal.sees_all_tenants:
            record_access(request_id, allowed=True, is_own=False)
            return True
        # Not the whole record: how long that takes to read would tell that it is there.
        tenant = await self._store.tenant_of(request_id)
        return tenant is not None and _may_see(request_id, tenant)

    async def read_page(self, page_size: int, page_token: str = "", active_only: bool = False) -> RequestPage:
        """Falls back to this gateway's requests while the store is away."""
        principal = current_principal()
        tenant = None if principal.sees_all_tenants else principal.tenant
        if tenant is None and not principal.sees_all_tenants:
            return RequestPage([], "")  # a front without a tenant of its own
        try:
            return await self._store.list_requests(page_size, page_token, active_only, tenant=tenant)
        except (UnavailableError, UnreadableStateError):
            records = [record for record in self.own() if not (active_only and is_terminal(record.state))]
            return RequestPage(records[:page_size], "")

    def own(self) -> list[RequestSummary]:
        """This gateway's that the caller may see, newest first."""
        principal = current_principal()
        return [runner.journal.record for runner in self._running.known() if principal.may_see(runner.request.tenant)]


def _not_found(request_id: str) -> RequestNotFoundError:
    return RequestNotFoundError(f"request {quoted(request_id)} is not known, or was forgotten; check the id")


def state_to_pb(state: RequestState) -> "inference_pb2.RequestState.ValueType":
    return inference_pb2.RequestState.Value(f"REQUEST_STATE_{state.value}")


def request_info(record: RequestSummary) -> inference_pb2.RequestInfo:
    return inference_pb2.RequestInfo(
        request_id=record.request_id,
        state=state_to_pb(record.state),
        model=record.model,
        tenant=record.tenant,
        attempt=record.attempt,
        num_prompt_tokens=record.num_prompt_tokens,
        num_output_tokens=record.num_output_tokens,
        gateway_id=record.gateway_id,
        prefill_worker_id=record.prefill_worker_id,
        decode_worker_id=record.decode_worker_id,
        create_time=_timestamp(record.create_time_ms),
        update_time=_timestamp(record.update_time_ms),
        error_message=record.error_message,
    )


def _timestamp(time_ms: int) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromMilliseconds(time_ms)
    return timestamp


def _may_see(request_id: str, tenant: str) -> bool:
    principal = current_principal()
    allowed = principal.may_see(tenant)
    record_access(request_id, allowed=allowed, is_own=principal.tenant == tenant)
    return allowed
