"""`python -m tests.security.tenant_mutations`: takes out what keeps tenants apart, in a copy of the
sources, and expects a test to fail. `-O` does so without asserts.
"""

import sys

from tests.support.mutations import Mutation, run_mutations

KNOWN_REQUESTS = "gateway/requests/known_requests.py"
MACHINE = "tests/security/test_tenants.py::test_nothing_of_one_tenant_is_in_anothers_answers"
CONTENT = (
    "tests/gateway/resume/test_content_in_store.py"
    "::test_a_running_requests_content_is_in_redis_only_where_it_may_be_continued"
)
ORACLE = "tests/security/test_prefix_oracle.py::test_a_thousand_probes_tell_nothing_of_another_tenants_prompt"

MUTATIONS = (
    Mutation(
        "a request that runs here is everybody's",
        KNOWN_REQUESTS,
        "return runner if runner is not None and _may_see(request_id, runner.request.tenant) else None",
        "return runner",
        MACHINE,
    ),
    Mutation(
        "a request in the store is everybody's",
        KNOWN_REQUESTS,
        "        if principal.sees_all_tenants:\n            record_access",
        "        if True:\n            record_access",
        MACHINE,
    ),
    Mutation(
        "an output in the store is everybody's",
        "gateway/resume/stored_output.py",
        "        await self._known.check_stored(request_id)\n",
        "",
        "tests/security/test_tenants.py::test_a_foreign_orphan_is_not_taken_over",
    ),
    Mutation(
        "a foreign request is looked up whole",
        KNOWN_REQUESTS,
        "tenant = await self._store.tenant_of(request_id)",
        "found = await self._store.get(request_id)\n"
        "        tenant = None if found is None else (await self._store.get(request_id) or found).tenant",
        "tests/security/test_tenants.py::test_a_foreign_id_costs_the_same_reads_as_an_unknown_one",
    ),
    Mutation(
        "the list is everybody's",
        KNOWN_REQUESTS,
        "tenant = None if principal.sees_all_tenants else principal.tenant",
        "tenant = None",
        MACHINE,
    ),
    Mutation(
        "the list without the store is everybody's",
        KNOWN_REQUESTS,
        "for runner in self._running.known() if principal.may_see(runner.request.tenant)]",
        "for runner in self._running.known() if principal]",
        "tests/security/test_tenants.py::test_without_the_store_a_tenant_lists_its_own_requests_only",
    ),
    Mutation(
        "a caller names any tenant",
        "gateway/requests/tenants.py",
        'if named in ("", principal.tenant):\n        return principal.tenant',
        "if True:\n        return named or principal.tenant",
        MACHINE,
    ),
    Mutation(
        "Generate takes the tenant that is named",
        "gateway/api/generation.py",
        "        request.tenant = tenant_of_call(request.tenant)\n",
        "",
        MACHINE,
    ),
    Mutation(
        "Converse takes the tenant that is named",
        "gateway/api/conversation_stream.py",
        "tenant = tenant_of_call(turn.tenant)",
        "tenant = turn.tenant",
        MACHINE,
    ),
    Mutation(
        "VllmEngine has one tenant for all",
        "gateway/protocols/vllm_engine/requests.py",
        "tenant = tenant_of_call(NO_TENANT)",
        "tenant = NO_TENANT",
        ORACLE,
    ),
    Mutation(
        "Abort ends others' requests",
        "gateway/protocols/vllm_engine/service.py",
        "if principal.may_see(runner.request.tenant):",
        "if principal:",
        MACHINE,
    ),
    Mutation(
        "a client is taken for a gateway",
        "gateway/service.py",
        "    if Role.GATEWAY not in current_principal().roles:\n        return False\n",
        "",
        "tests/security/test_tenants.py::test_a_gateway_asks_the_owner_for_its_client",
    ),
    Mutation(
        "an idempotency key is everybody's",
        "gateway/api/idempotency.py",
        "(message.tenant, message.idempotency_key)",
        '("", message.idempotency_key)',
        MACHINE,
    ),
    Mutation(
        "all tenants have one salt",
        "gateway/requests/cache_salts.py",
        "hashlib.blake2b(tenant.encode(),",
        'hashlib.blake2b(b"",',
        ORACLE,
    ),
    Mutation(
        "the salt is left away",
        "gateway/requests/starter.py",
        "            cache_salt=self._context.salts.of(request.tenant),\n            keeps_output",
        "            keeps_output",
        ORACLE,
    ),
    Mutation(
        "gateways share no secret",
        "gateway/requests/cache_salts.py",
        "secret = _key(await store.share_cache_secret(self._secret))",
        "secret = self._secret",
        "tests/security/test_prefix_oracle.py::test_workers_see_one_salt_for_a_tenant_from_all_gateways_and_no_name",
    ),
    Mutation(
        "the prompt stays in the store",
        "kvrelay/state/state_store.py",
        "forgotten = forgotten_content() if is_terminal(to_state) else {}",
        "forgotten: dict[str, str | int | bytes] = {}",
        "tests/state/test_state_store.py::test_an_ended_request_leaves_no_prompt_and_its_output_only_where_it_is_kept",
    ),
    Mutation(
        "every prompt is written to the store",
        "kvrelay/state/request_record.py",
        "if not record.keeps_output or is_terminal(record.state):",
        "if is_terminal(record.state):",
        CONTENT,
    ),
    Mutation(
        "every output is written to the store",
        "gateway/state/journal.py",
        "        if not self._record.keeps_output:\n            return []\n        begin",
        "        begin",
        CONTENT,
    ),
    Mutation(
        "a request without a prompt is taken over",
        "gateway/resume/stored_output.py",
        "runner is not None or not record.keeps_output or await",
        "runner is not None or await",
        "tests/gateway/resume/test_content_in_store.py::test_a_plain_requests_reader_elsewhere_ends_with_its_gateway",
    ),
    Mutation(
        "every output stays in the store",
        "kvrelay/state/lua/prelude.lua",
        "if redis.call('HGET', request, 'keeps_output') ~= '0' then return retention end",
        "if true then return retention end",
        "tests/state/test_state_store.py::test_an_ended_request_leaves_no_prompt_and_its_output_only_where_it_is_kept",
    ),
)

if __name__ == "__main__":
    sys.exit(run_mutations(MUTATIONS))
