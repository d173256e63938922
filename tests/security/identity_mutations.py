"""`python -m tests.security.identity_mutations`: takes a guard out in a copy of the sources, and
expects a test to fail. See `tests.faults.mutations`.
"""

import sys

from tests.support.mutations import Mutation, run_mutations

INTERCEPTOR_TESTS = "tests/network/test_call_interceptor.py"
GUARD_TESTS = "tests/security/test_guard.py"
RELAY = "kvrelay/openai_frontend/relay.py"
RELAY_TESTS = "tests/openai_frontend/test_relay.py"

ROGUE_TESTS = "tests/security/test_rogue_registered_workers.py"

MUTATIONS = (
    Mutation(
        "any worker at a registered address gets prompts",
        "gateway/workers/worker_trust.py",
        "        if member is None:\n            return (",
        "        if member is None:\n            return None\n            return (",
        f"{ROGUE_TESTS}::test_who_answers_at_a_registered_address_under_another_id_gets_nothing",
    ),
    Mutation(
        "the list of fingerprints is not read",
        "gateway/workers/worker_trust.py",
        "if self._allowed and model.fingerprint not in self._allowed:",
        "if False:",
        f"{ROGUE_TESTS}::test_only_listed_fingerprints_are_served_even_if_others_are_more",
    ),
    Mutation(
        "a session may have the whole queue of a decode worker",
        "decode_worker/scheduling/scheduler.py",
        "self._limits.max_waiting_works and not self._make_place_for(job):",
        "self._limits.max_waiting_works:",
        "tests/security/test_rogue_workers.py::test_a_session_that_fills_the_queue_leaves_others_their_part_of_it",
    ),
    Mutation(
        "gateways do not count what a key uses elsewhere",
        "gateway/requests/key_usage.py",
        "num_running = self.num_running + self.elsewhere.num_running",
        "num_running = self.num_running",
        "tests/gateway/requests/test_reported_usage.py::test_requests_in_progress_count_at_both",
    ),
    Mutation(
        "calls are not checked",
        "kvrelay/network/call_interceptor.py",
        "        if self._guard is None:\n            if (tenant",
        "        if True:\n            if (tenant",
        f"{INTERCEPTOR_TESTS}::test_calls_without_a_key_reach_no_handler",
    ),
    Mutation(
        "a single message is read before the guard runs",
        "kvrelay/network/call_interceptor.py",
        "call.deserialize if handler.request_streaming else _unread",
        "call.deserialize if handler.request_streaming else lambda data: [call.deserialize(data) and data]",
        f"{INTERCEPTOR_TESTS}::test_a_message_of_an_unknown_caller_is_not_even_read",
    ),
    Mutation(
        "a stream takes messages after the expiry",
        "kvrelay/network/call_interceptor.py",
        "        guard.check_expiry(principal)\n",
        "",
        f"{INTERCEPTOR_TESTS}::test_a_stream_takes_no_message_after_the_expiry",
    ),
    Mutation(
        "what has no rule is open",
        "kvrelay/security/guard.py",
        "        if rule is None:\n",
        "        if rule is None:\n            return Rule(frozenset(), is_open=True)\n        if rule is None:\n",
        f"{GUARD_TESTS}::test_a_method_without_a_rule_is_refused_whoever_calls",
    ),
    Mutation(
        "roles are not compared",
        "kvrelay/security/guard.py",
        "if not principal.roles & rule.roles:",
        "if False:",
        f"{GUARD_TESTS}::test_a_role_that_does_not_reach_is_refused",
    ),
    Mutation(
        "a certificate proves a client of any tenant",
        "kvrelay/security/guard.py",
        "proven = roles - {Role.CLIENT}",
        "proven = roles",
        f"{GUARD_TESTS}::test_a_certificate_proves_roles_but_never_that_of_a_client",
    ),
    Mutation(
        "an expired key goes on",
        "kvrelay/security/guard.py",
        "principal.expires_at_s <= self._clock()",
        "False",
        f"{GUARD_TESTS}::test_an_expired_key_begins_nothing_new",
    ),
    Mutation(
        "calls of withdrawn keys go on",
        "kvrelay/security/process_security.py",
        "                self._end_withdrawn()",
        "                pass",
        "tests/security/test_process_security.py"
        "::test_a_withdrawn_key_is_refused_and_its_streams_end_while_others_go_on",
    ),
    Mutation(
        "a file is read while it is written",
        "kvrelay/security/reloaded_file.py",
        " or now != self._changing",
        "",
        "tests/security/test_reloaded_file.py::test_a_file_that_is_still_written_to_is_not_read",
    ),
    Mutation(
        "a token chooses its algorithm",
        "kvrelay/security/json_web_tokens.py",
        "algorithms=[signing.algorithm],",
        "algorithms=[jwt.get_unverified_header(token)['alg']],",
        "tests/security/test_json_web_tokens.py::test_a_token_that_is_not_as_it_must_be_is_refused",
    ),
    Mutation(
        "routes are not checked",
        "kvrelay/network/http_guard.py",
        "        if resource is None:\n",
        "        if True:\n",
        "tests/network/test_http_guard.py::test_without_a_key_nothing_but_health_is_answered",
    ),
    Mutation(
        "a key goes over a network in plain text",
        "kvrelay/client/api_keys.py",
        "if not is_encrypted and not stays_on_this_machine(address):",
        "if False:",
        "tests/client/test_api_keys.py::test_a_key_goes_nowhere_else_in_plain_text",
    ),
    Mutation(
        "refusals are not written down",
        "kvrelay/security/process_security.py",
        "            self._audit.record(",
        "            dict(",
        "tests/security/test_audit.py::test_refused_calls_and_reaches_for_others_requests_are_written",
    ),
    Mutation(
        "a front speaks for any tenant",
        "kvrelay/security/guard.py",
        "if not (decides or principal.may_name_any_tenant or tenant in principal.front_tenants):",
        "if False:",
        f"{GUARD_TESTS}::test_a_front_speaks_for_the_tenants_of_its_key_and_for_no_other",
    ),
    Mutation(
        "who speaks for a tenant keeps its other rights",
        "kvrelay/security/principal.py",
        "roles = self.roles & {Role.CLIENT, Role.FRONT}",
        "roles = self.roles",
        f"{GUARD_TESTS}::test_who_speaks_for_a_tenant_has_no_other_rights",
    ),
    Mutation(
        "what the front did not ask for is passed on as its own",
        RELAY,
        "        if client is None:\n            raise",
        "        if client is None:\n            return FRONT_ITSELF\n        if client is None:\n            raise",
        f"{RELAY_TESTS}::test_an_id_that_the_front_did_not_make_reaches_no_gateway",
    ),
    Mutation(
        "an id outlives its HTTP request",
        "kvrelay/openai_frontend/open_requests.py",
        "            del self._open[request_id]\n",
        "            pass\n",
        f"{RELAY_TESTS}::test_an_id_ends_with_its_http_request",
    ),
    Mutation(
        "the front's port for smg takes every user",
        RELAY,
        "if method not in _BY_ID and not is_of_this_user(peer, self.port):",
        "if False:",
        f"{RELAY_TESTS}::test_the_port_answers_no_other_user",
    ),
    Mutation(
        "clients' keys go over a network in plain text",
        "kvrelay/openai_frontend/gateway_channel.py",
        "self.hands_keys_on = is_encrypted or stays_on_this_machine(address)",
        "self.hands_keys_on = True",
        f"{RELAY_TESTS}::test_keys_cross_no_network_in_plain_text",
    ),
)

if __name__ == "__main__":
    sys.exit(run_mutations(MUTATIONS))
