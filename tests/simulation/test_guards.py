"""That the simulation can fail: with one guard of production code removed, some seed breaks the
promise that it guards.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import decode_worker.kv_receiver
import gateway.requests.known_requests
import kvrelay.kv_cache.block_manager
import kvrelay.kv_cache.prefix_hash
from decode_worker.receiving.kv_reassembly import KVReassembly
from decode_worker.receiving.write_grants import WriteGrants
from decode_worker.scheduling.scheduler import DecodeScheduler
from gateway.api.idempotency import IdempotencyKeys
from gateway.lifecycle import events
from gateway.lifecycle.generation_request import GenerationRequest
from gateway.lifecycle.job_progress import JobProgress
from gateway.lifecycle.lifecycle import RequestLifecycle
from gateway.lifecycle.poison_detector import InStep, PoisonDetector
from gateway.lifecycle.token_order import TokenOrder
from gateway.requests.admission import Admitted
from kvrelay.core.job import JobId, SequenceToken
from kvrelay.errors import OutOfBlocksError
from kvrelay.kv_cache.block_manager import BlockManager
from kvrelay.security.guard import Guard
from kvrelay.security.method_rules import Rule
from kvrelay.security.principal import Role
from kvrelay.worker.gateway_sessions import GatewaySessions
from kvrelay.worker.job_leases import JobLeases
from kvrelay.worker.sequence import PreparedJob
from tests.simulation.run import run_seed, without_garbage_collection

MAX_SEEDS = 10_000

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

Patch = pytest.MonkeyPatch


def take_every_attempt_for_this_one(patch: Patch) -> None:
    dispatch = RequestLifecycle._dispatch

    def renamed(self: RequestLifecycle, job_id: JobId) -> JobId:
        return replace(job_id, attempt=self.attempt)

    def dispatch_any(self: RequestLifecycle, event: Any) -> None:
        if isinstance(event, events.DecodeTokens):
            tokens = tuple(replace(token, job_id=renamed(self, token.job_id)) for token in event.tokens)
            event = replace(event, tokens=tokens)
        elif hasattr(event, "job_id") and not isinstance(event, events.Routed | events.NoWorker):
            event = replace(event, job_id=renamed(self, event.job_id))
        dispatch(self, event)

    # By itself that shows nothing: who holds the job is asked as well.
    patch.setattr(RequestLifecycle, "_dispatch", dispatch_any)
    patch.setattr(JobProgress, "is_reserved_by", lambda self, worker_id: True)
    patch.setattr(JobProgress, "is_prefilled_by", lambda self, worker_id: True)


def believe_every_digest(patch: Patch) -> None:
    patch.setattr(decode_worker.kv_receiver, "hmac", SimpleNamespace(compare_digest=lambda expected, given: True))


def miss_nothing_at_the_end_of_a_push(patch: Patch) -> None:
    patch.setattr(KVReassembly, "check_end", lambda self, num_chunks: None)


def free_blocks_under_a_writer(patch: Patch) -> None:
    revoke = WriteGrants.revoke

    def revoke_at_once(self: WriteGrants, job_id: JobId) -> bool:
        revoke(self, job_id)
        return True

    patch.setattr(WriteGrants, "revoke", revoke_at_once)


def emit_tokens_as_they_come(patch: Patch) -> None:
    def take_next(self: TokenOrder, token: SequenceToken) -> list[SequenceToken]:
        return [token]

    patch.setattr(TokenOrder, "take_next", take_next)


def share_prefixes_between_tenants(patch: Patch) -> None:
    root = kvrelay.kv_cache.prefix_hash.root_hash
    patch.setattr(kvrelay.kv_cache.prefix_hash, "root_hash", lambda salt: root(""))
    patch.setattr(kvrelay.kv_cache.block_manager, "root_hash", lambda salt: root(""))


def write_into_shared_blocks(patch: Patch) -> None:
    patch.setattr(BlockManager, "_is_shared", lambda self, table, number: False)
    patch.setattr(BlockManager, "grow", _grow_without_copies)


def _grow_without_copies(self: BlockManager, table: Any, num_tokens: int) -> list[Any]:
    while len(table.blocks) < self.blocks_for(num_tokens):
        if not self._free and not self._cached:
            raise OutOfBlocksError("no block is left")
        table.blocks.append(self._take())
    table.num_tokens = max(table.num_tokens, num_tokens)
    return []


def keep_jobs_of_a_lost_session(patch: Patch) -> None:
    patch.setattr(JobLeases, "end_session", lambda self, session: [])


def begin_every_request_with_a_key(patch: Patch) -> None:
    async def claim(self: IdempotencyKeys, name: tuple[str, str], digest: str, request: GenerationRequest) -> str:
        return request.request_id

    patch.setattr(IdempotencyKeys, "_claim", claim)


def never_free_blocks(patch: Patch) -> None:
    patch.setattr(BlockManager, "release", lambda self, table: None)


def suspect_for_ever(patch: Patch) -> None:
    def suspect_all(
        self: PoisonDetector, worker_id: str, in_step: list[InStep]
    ) -> dict[str, events.CrashVerdict | None]:
        return {request.request_id: events.CrashVerdict.SUSPECTED for request in in_step}

    patch.setattr(PoisonDetector, "on_death_suspected", suspect_all)


def compute_suspects_together_with_others(patch: Patch) -> None:
    reserve = DecodeScheduler.reserve

    def reserve_anyhow(self: DecodeScheduler, prepared: PreparedJob) -> None:
        reserve(self, replace(prepared, job=replace(prepared.job, isolated=False)))

    patch.setattr(DecodeScheduler, "reserve", reserve_anyhow)


def tell_no_superseded_session(patch: Patch) -> None:
    told = GatewaySessions._on_superseded
    patch.setattr(GatewaySessions, "_on_superseded", lambda self, job_id, session: told(self, job_id, None))


def show_requests_to_every_tenant(patch: Patch) -> None:
    patch.setattr(gateway.requests.known_requests, "_may_see", lambda request_id, tenant: True)


def let_every_role_into_every_method(patch: Patch) -> None:
    patch.setattr(Guard, "_rule_of", lambda self, method: Rule(frozenset(Role)))


def serve_withdrawn_keys_on(patch: Patch) -> None:
    patch.setattr(Guard, "end_withdrawn", lambda self: 0)


def keep_the_places_of_keys(patch: Patch) -> None:
    release = Admitted.release

    def release_the_gateways_only(self: Admitted, now: float) -> None:
        was_running = self._running
        release(self, now)
        self._usage.num_running += was_running

    patch.setattr(Admitted, "release", release_the_gateways_only)


@pytest.mark.parametrize(
    ("remove_guard", "promise"),
    [
        (take_every_attempt_for_this_one, ("I1", "I2", "I5", "a defect")),
        (believe_every_digest, ("I4",)),
        (miss_nothing_at_the_end_of_a_push, ("I4",)),
        (free_blocks_under_a_writer, ("I4",)),
        (emit_tokens_as_they_come, ("I1", "I2", "a defect")),
        (share_prefixes_between_tenants, ("I4",)),
        (write_into_shared_blocks, ("I4",)),
        (keep_jobs_of_a_lost_session, ("I3",)),
        (begin_every_request_with_a_key, ("KEY",)),
        (never_free_blocks, ("I3",)),
        (suspect_for_ever, ("I6",)),
        (tell_no_superseded_session, ("I6: silent",)),
        (compute_suspects_together_with_others, ("I6", "an innocent")),
        (show_requests_to_every_tenant, ("T: ",)),
        (let_every_role_into_every_method, ("T: ",)),
        (serve_withdrawn_keys_on, ("T: ",)),
        (keep_the_places_of_keys, ("I3", "T: its key")),
    ],
)
def test_without_a_guard_some_seed_breaks_its_promise(
    remove_guard: Callable[[Patch], None], promise: tuple[str, ...], monkeypatch: Patch
) -> None:
    remove_guard(monkeypatch)
    for seed in range(MAX_SEEDS):
        outcome = without_garbage_collection(lambda seed=seed: run_seed(seed))  # type: ignore[misc]
        if outcome.problems and outcome.problems[0].startswith(promise):
            print(f"{remove_guard.__name__}: seed {seed}: {outcome.problems[0]}")
            return
    raise AssertionError(f"{MAX_SEEDS} seeds noticed nothing")
