"""`python -m tests.faults.mutations`: removes a guard, or the fault, in a copy of the sources, and
expects the test to fail.

A test of a fault that passes without the fault, or without what protects from it, proves nothing.
With `--check`, runs no test: only looks whether each mutation still finds what it replaces.
"""

import sys

from tests.support.mutations import Mutation, run_mutations

MUTATIONS = (
    Mutation(
        "fault points do nothing",
        "kvrelay/runtime/fault_points.py",
        "    if _plan is not None:\n        _plan.reach(name, subjects)",
        "    return",
        "tests/faults/test_worker_deaths.py::test_d_dies_between_the_last_token_and_its_report",
    ),
    Mutation(
        "a chunk's digest is not looked at",
        "decode_worker/kv_receiver.py",
        "if not hmac.compare_digest(expected, chunk.digest):",
        "if False:",
        "tests/faults/test_links.py::test_a_corrupt_chunk_is_refused_and_sent_once_more",
    ),
    Mutation(
        "blocks are freed under their writer",
        "decode_worker/receiving/write_grants.py",
        "            on_revoked()\n        return False",
        "            on_revoked()\n        return True",
        "tests/faults/test_clients.py::test_a_late_write_after_a_cancel_keeps_its_blocks_until_it_has_ended",
    ),
    Mutation(
        "a new attempt forgets what was emitted",
        "gateway/lifecycle/sequence_outputs.py",
        "token_ids=request.prompt_token_ids + tuple(self.emitted[first_sequence]),",
        "token_ids=request.prompt_token_ids,",
        "tests/faults/test_worker_deaths.py::test_d_dies_after_token_n",
    ),
    Mutation(
        "a push waits for ever for its answers",
        "prefill_worker/kv_sender.py",
        "STALL_TIMEOUT_S = 3.0",
        "STALL_TIMEOUT_S = 3600.0",
        "tests/faults/test_links.py::test_p_and_d_cannot_reach_each_other_and_are_both_alive",
    ),
    Mutation(
        "silence is never taken for loss",
        "kvrelay/core/liveness.py",
        "    def lost(self, now: float) -> bool:",
        "    def lost(self, now: float) -> bool:\n        return False\n\n    def _lost(self, now: float) -> bool:",
        "tests/faults/test_stalls.py::test_a_zombie_that_comes_back_after_its_lease_is_not_heard",
    ),
    Mutation(
        "whoever ran alone when its worker died is a suspect only",
        "gateway/lifecycle/poison_detector.py",
        "        if len(isolated) != 1:",
        "        if True:",
        "tests/faults/test_worker_deaths.py::test_a_prompt_that_kills_workers_is_quarantined_after_two_deaths",
    ),
    Mutation(
        "a connection that breaks is taken for a death",
        "gateway/workers/sessions.py",
        "self._on_death_confirmed(worker_id, found_worker_id != worker_id)",
        "self._on_death_confirmed(worker_id, True)",
        "tests/faults/test_worker_deaths.py::test_connections_that_break_under_a_request_again_and_again_are_no_deaths",
    ),
    Mutation(
        "gateways do not ask each other's keys",
        "gateway/api/idempotency.py",
        "                return owner",
        "                return request.request_id",
        "tests/faults/test_clients.py::test_the_same_idempotency_key_fifty_times_at_once_is_one_request",
    ),
    Mutation(
        "every tenant sees every request",
        "gateway/requests/known_requests.py",
        "    allowed = principal.may_see(tenant)\n",
        "    allowed = True\n",
        "tests/faults/test_kill_matrix.py::test_with_everything_switched_on_each_kind_of_process_dies_and_tokens_are_the_same",
    ),
    Mutation(
        "calls of a withdrawn key go on",
        "kvrelay/security/guard.py",
        "            call.is_withdrawn = True\n            call.task.cancel()\n",
        "            call.is_withdrawn = True\n",
        "tests/faults/test_kill_matrix.py::test_a_withdrawn_key_ends_its_running_stream_and_nothing_of_it_is_left",
    ),
    Mutation(
        "a busy session keeps old certificates",
        "gateway/workers/sessions.py",
        "random.uniform(0.5, 1.0) * self._settings.move_ms / 1000",
        "3600.0",
        "tests/security/test_rotation.py::test_a_session_that_is_never_idle_moves_at_its_limit_and_no_stream_is_lost",
    ),
)

if __name__ == "__main__":
    sys.exit(run_mutations(MUTATIONS))
