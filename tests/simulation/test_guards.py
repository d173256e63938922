"""That the simulation can fail: with one guard of production code removed, some seed breaks the promise that it guards."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import decode_worker.kv_receiver
import kvrelay.kv_cache.block_manager
import kvrelay.kv_cache.prefix_hash
from decode_worker.push_permits import PushPermits
from decode_worker.scheduler import DecodeScheduler
from decode_worker.transfer_assembly import TransferAssembly
from gateway import lifecycle_messages as m
from gateway.idempotency import IdempotencyKeys
from gateway.request_lifecycle import RequestLifecycle
from gateway.suspicion import Inquests, InStep
from gateway.token_order import TokenOrder
from gateway.work_progress import WorkProgress
from kvrelay.errors import OutOfBlocksError
from kvrelay.kv_cache.block_manager import BlockManager
from kvrelay.work import SequenceToken, Work, WorkId
from kvrelay.work_leases import WorkLeases
from tests.simulation.run import run_seed, without_garbage_collection

MAX_SEEDS = 10_000

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

Patch = pytest.MonkeyPatch


def take_every_attempt_for_this_one(patch: Patch) -> None:
    dispatch = RequestLifecycle._dispatch

    def renamed(self: RequestLifecycle, work_id: WorkId) -> WorkId:
        return replace(work_id, attempt=self.attempt)

    def dispatch_any(self: RequestLifecycle, event: Any) -> None:
        if isinstance(event, m.DecodeTokens):
            tokens = tuple(replace(token, work_id=renamed(self, token.work_id)) for token in event.tokens)
            event = replace(event, tokens=tokens)
        elif hasattr(event, "work_id") and not isinstance(event, m.Routed | m.NoWorker):
            event = replace(event, work_id=renamed(self, event.work_id))
        dispatch(self, event)

    # By itself that shows nothing: who holds the work is asked as well.
    patch.setattr(RequestLifecycle, "_dispatch", dispatch_any)
    patch.setattr(WorkProgress, "is_reserved_by", lambda self, worker_id: True)
    patch.setattr(WorkProgress, "is_prefilled_by", lambda self, worker_id: True)


def believe_every_digest(patch: Patch) -> None:
    patch.setattr(decode_worker.kv_receiver, "hmac", SimpleNamespace(compare_digest=lambda expected, given: True))


def miss_nothing_at_the_end_of_a_push(patch: Patch) -> None:
    patch.setattr(TransferAssembly, "check_end", lambda self, num_chunks: None)


def free_blocks_under_a_writer(patch: Patch) -> None:
    close = PushPermits.close

    def close_at_once(self: PushPermits, work_id: WorkId) -> bool:
        close(self, work_id)
        return True

    patch.setattr(PushPermits, "close", close_at_once)


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


def keep_works_of_a_lost_session(patch: Patch) -> None:
    patch.setattr(WorkLeases, "end_session", lambda self, session: [])


def begin_every_request_with_a_key(patch: Patch) -> None:
    async def claim(self: IdempotencyKeys, tenant: str, key: str, digest: str, request_id: str, ttl_ms: int) -> str:
        return request_id

    patch.setattr(IdempotencyKeys, "_claim", claim)


def never_free_blocks(patch: Patch) -> None:
    patch.setattr(BlockManager, "release", lambda self, table: None)


def suspect_for_ever(patch: Patch) -> None:
    def open_inquest(self: Inquests, worker_id: str, in_step: list[InStep]) -> dict[str, m.Blame | None]:
        return {request.request_id: m.Blame.SUSPECT for request in in_step}

    patch.setattr(Inquests, "open", open_inquest)


def compute_suspects_together_with_others(patch: Patch) -> None:
    reserve = DecodeScheduler.reserve

    def reserve_anyhow(self: DecodeScheduler, work: Work) -> None:
        reserve(self, replace(work, runs_alone=False))

    patch.setattr(DecodeScheduler, "reserve", reserve_anyhow)


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
        (keep_works_of_a_lost_session, ("I3",)),
        (begin_every_request_with_a_key, ("KEY",)),
        (never_free_blocks, ("I3",)),
        (suspect_for_ever, ("I6",)),
        (compute_suspects_together_with_others, ("I6", "an innocent")),
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
