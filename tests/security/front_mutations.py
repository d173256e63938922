"""`python -m tests.security.front_mutations`: opens the front, smg and the logs.

In a copy of the sources, where a test has to fail. `-O` does so without asserts.
"""

import sys

from tests.support.mutations import Mutation, run_mutations

FRONT = "kvrelay/openai_frontend/front.py"
FRONT_TESTS = "tests/openai_frontend/test_front.py"
SHARED = "kvrelay/openai_frontend/shared_bound.py"
MAIN = "kvrelay/openai_frontend/main.py"
SMG = "kvrelay/openai_frontend/smg.py"
SMG_TESTS = "tests/openai_frontend/test_smg.py"
ARGUMENTS = "kvrelay/openai_frontend/smg_arguments.py"
LOGGING = "kvrelay/observability/logging.py"
LOGGING_TESTS = "tests/observability/test_logging.py"
AUDIT = "kvrelay/security/audit.py"
AUDIT_TESTS = "tests/security/test_audit.py"

FRONT_MUTATIONS = (
    Mutation(
        "the front asks for no key",
        FRONT,
        "        async with self._authorized(request) as client, self._place(client):",
        "        client = FRONT_ITSELF\n        async with self._place(client):",
        f"{FRONT_TESTS}::test_a_client_without_a_key_gets_nothing_past",
    ),
    Mutation(
        "a page of a foreign name may ask a front without keys",
        FRONT,
        "            self._check_host(request)\n",
        "",
        f"{FRONT_TESTS}::test_without_keys_a_page_of_a_foreign_name_cannot_ask",
    ),
    Mutation(
        "any key opens the front",
        FRONT,
        "for known in self._keys) > 0",
        "for known in self._keys) >= 0",
        f"{FRONT_TESTS}::test_a_client_without_a_key_gets_nothing_past",
    ),
    Mutation(
        "a key of any role opens the front",
        FRONT,
        '            principal = self._guard.check(route, metadata, certificate, request.remote or "")',
        "            principal = self._guard._identify(metadata, {})",
        f"{FRONT_TESTS}::test_keys_of_the_keys_file_open_too_and_only_for_clients",
    ),
    Mutation(
        "a request outlives its key",
        FRONT,
        "            with self._guard.following(principal):\n                yield",
        "            yield",
        f"{FRONT_TESTS}::test_a_request_ends_when_its_key_is_withdrawn",
        60,
    ),
    Mutation(
        "the front passes everything on",
        FRONT,
        '        application.router.add_get("/health", self._ready)\n',
        '        application.router.add_get("/health", self._ready)\n'
        '        application.router.add_route("*", "/{rest:.*}", self._pass_on)\n',
        f"{FRONT_TESTS}::test_the_control_plane_of_smg_is_out_of_reach",
    ),
    Mutation(
        "smg gets the client's key",
        FRONT,
        '        headers = {**self._headers, "Content-Type"',
        '        headers = {**self._headers, **request.headers, "Content-Type"',
        f"{FRONT_TESTS}::test_each_key_opens_and_smg_gets_its_own",
    ),
    Mutation(
        "fields reach smg unseen",
        FRONT,
        "                body = check_fields(endpoint, body)",
        "                pass",
        f"{FRONT_TESTS}::test_a_refused_field_is_named_and_nothing_is_asked",
    ),
    Mutation(
        "the front has any number of requests",
        SHARED,
        "        if is_beyond_share or self._taken.total() + amount > most:",
        "        if is_beyond_share:",
        f"{FRONT_TESTS}::test_more_requests_than_there_is_room_for_are_told_to_come_again",
        90,
    ),
    Mutation(
        "a body that announces its length is read all the same",
        FRONT,
        "        if length > self._max_body_bytes:",
        "        if False:",
        f"{FRONT_TESTS}::test_a_body_is_refused_by_the_length_that_it_announces",
        60,
    ),
    Mutation(
        "a body that announces nothing has any length",
        FRONT,
        "web.Application(client_max_size=self._max_body_bytes, ",
        "web.Application(client_max_size=2**30, ",
        f"{FRONT_TESTS}::test_a_body_that_announces_no_length_is_cut_off_at_the_bound",
    ),
    Mutation(
        "one tenant takes the whole front",
        SHARED,
        "        if is_beyond_share or self._taken.total() + amount > most:",
        "        if self._taken.total() + amount > most:",
        f"{FRONT_TESTS}::test_one_tenant_gets_half_of_the_places",
        90,
    ),
    Mutation(
        "any number of bodies is read together",
        FRONT,
        "        with self._unread_bytes.taking(length, client.tenant, MAX_UNREAD_BODY_BYTES, full):",
        "        with self._unread_bytes.taking(0, client.tenant, MAX_UNREAD_BODY_BYTES, full):",
        f"{FRONT_TESTS}::test_bodies_that_are_read_together_have_a_bound",
    ),
    Mutation(
        "the front waits for a body",
        FRONT,
        "            async with asyncio.timeout(BODY_TIMEOUT_S):",
        "            async with asyncio.timeout(None):",
        f"{FRONT_TESTS}::test_bodies_that_are_read_together_have_a_bound",
        60,
    ),
    Mutation(
        "a body that was read counts on",
        SHARED,
        "            self._taken[tenant] -= amount",
        "            pass",
        f"{FRONT_TESTS}::test_bodies_that_are_read_together_have_a_bound",
    ),
    Mutation(
        "an event of smg has any length",
        FRONT,
        "        if len(rest) > MAX_EVENT_BYTES:",
        "        if False:",
        f"{FRONT_TESTS}::test_an_event_without_an_end_is_broken_off",
    ),
    Mutation(
        "requests to smg take the user's proxy",
        FRONT,
        "trust_env=False",
        "trust_env=True",
        f"{FRONT_TESTS}::test_the_session_to_smg_takes_no_proxy",
    ),
    Mutation(
        "a setting without a key opens the front",
        MAIN,
        "    if not keys:\n        raise ConfigError(",
        "    if False:\n        raise ConfigError(",
        "tests/openai_frontend/test_main.py::test_a_setting_that_names_no_key_does_not_open_the_port_to_everybody",
    ),
    Mutation(
        "a front needs no key for others",
        MAIN,
        "    if not settings.security.insecure:",
        "    if False:",
        "tests/openai_frontend/test_main.py::test_a_host_that_others_reach_needs_keys_or_the_word_insecure",
    ),
    Mutation(
        "a front takes keys from others in plain text",
        MAIN,
        "    elif not settings.security.has_certificates:",
        "    elif False:",
        "tests/openai_frontend/test_main.py::test_keys_come_from_other_hosts_encrypted_or_with_the_word_insecure",
    ),
)

SMG_MUTATIONS = (
    Mutation(
        "smg listens for everybody",
        SMG,
        '*("--host", "127.0.0.1",',
        '*("--host", "0.0.0.0",',
        f"{SMG_TESTS}::test_smg_listens_on_loopback_only_and_what_guards_it_comes_after_the_users_arguments",
    ),
    Mutation(
        "smg's metrics are everybody's",
        SMG,
        '*("--prometheus-host", "127.0.0.1",',
        '*("--prometheus-host", "0.0.0.0",',
        f"{SMG_TESTS}::test_smg_listens_on_loopback_only_and_what_guards_it_comes_after_the_users_arguments",
    ),
    Mutation(
        "smg keeps answers",
        SMG,
        '[*_launch(ports), "--history-backend", "none"]',
        "[*_launch(ports)]",
        f"{SMG_TESTS}::test_smg_listens_on_loopback_only_and_what_guards_it_comes_after_the_users_arguments",
    ),
    Mutation(
        "a user's arguments come last",
        SMG,
        'return [*defaults, *arguments, "--max-payload-size", limit, "--worker-urls", *urls]',
        'return [*defaults, "--max-payload-size", limit, "--worker-urls", *urls, *arguments]',
        f"{SMG_TESTS}::test_smg_listens_on_loopback_only_and_what_guards_it_comes_after_the_users_arguments",
    ),
    Mutation(
        "smg asks for no key",
        SMG,
        'return f"--api-key\\n{key}".encode()',
        'return b""',
        f"{SMG_TESTS}::test_smg_gets_its_key_where_no_other_user_sees_it",
    ),
    Mutation(
        "smg's key is among its arguments",
        MAIN,
        'ChildProcess("smg", command, smg.environment(), _print, smg.secret_arguments(key))',
        'ChildProcess("smg", [*command, "--api-key", key], smg.environment(), _print)',
        "tests/openai_frontend/test_main.py::test_smg_gets_its_key_by_its_standard_input_only",
    ),
    Mutation(
        "settings reach smg",
        SMG,
        'if not name.startswith("KVRELAY_") and',
        "if",
        f"{SMG_TESTS}::test_nothing_of_kvrelays_settings_reaches_smg",
    ),
    Mutation(
        "guards of smg are switched off by abbreviation",
        ARGUMENTS,
        "any(guarded.startswith(name) for guarded in GUARDED)",
        "name in GUARDED",
        "tests/openai_frontend/test_smg_arguments.py::test_no_guard_can_be_switched_off",
    ),
    Mutation(
        "guards of smg are switched off with a sign",
        ARGUMENTS,
        '        name = argument.partition("=")[0]',
        "        name = argument",
        "tests/openai_frontend/test_smg_arguments.py::test_no_guard_can_be_switched_off",
    ),
)

AUDIT_MUTATIONS = (
    Mutation(
        "a caller writes what it likes into the audit log",
        AUDIT,
        "shortened(value, MAX_FIELD_CHARACTERS) if isinstance(value, str) else value",
        "value",
        f"{AUDIT_TESTS}::test_a_line_is_one_line_and_short_whatever_the_caller_says",
    ),
    Mutation(
        "a flood fills the disk",
        AUDIT,
        "        if self._num_in_second > MAX_LINES_PER_S:",
        "        if False:",
        f"{AUDIT_TESTS}::test_a_flood_of_refusals_is_counted_and_not_written",
    ),
    Mutation(
        "lines are lost without a word",
        AUDIT,
        "        self._tell_of_lost(now)\n        self._put(",
        "        self._put(",
        f"{AUDIT_TESTS}::test_a_flood_of_refusals_is_counted_and_not_written",
    ),
    Mutation(
        "lines pile up before a disk that hangs",
        AUDIT,
        "queue.Queue(MAX_WAITING_LINES)",
        "queue.Queue()",
        f"{AUDIT_TESTS}::test_a_disk_that_hangs_costs_a_bounded_number_of_lines",
    ),
    Mutation(
        "lines before the end are lost without a word",
        AUDIT,
        "            if self._num_lost:\n                self._lines.put(",
        "            if False:\n                self._lines.put(",
        f"{AUDIT_TESTS}::test_a_disk_that_hangs_costs_a_bounded_number_of_lines",
    ),
    Mutation(
        "everybody reads the audit log",
        AUDIT,
        "os.open(path, flags, 0o600)",
        "os.open(path, flags, 0o644)",
        f"{AUDIT_TESTS}::test_a_line_says_who_did_what_and_what_was_decided",
    ),
    Mutation(
        "the audit log is a pipe that nobody reads",
        AUDIT,
        " | os.O_NONBLOCK  # a pipe would wait for its reader",
        "",
        f"{AUDIT_TESTS}::test_a_file_that_cannot_be_written_stops_the_start",
        60,
    ),
    Mutation(
        "a rotated file is written on",
        AUDIT,
        "                self._follow_rotation()\n",
        "",
        f"{AUDIT_TESTS}::test_a_moved_file_is_begun_anew",
    ),
    Mutation(
        "each look at one's own requests is written",
        AUDIT,
        "    if audit is not None and not is_own:",
        "    if audit is not None:",
        f"{AUDIT_TESTS}::test_refused_calls_and_reaches_for_others_requests_are_written",
    ),
    Mutation(
        "reaches for others' requests are not written",
        AUDIT,
        "        audit.record(request_id, ALLOWED if allowed else REFUSED, OTHER_TENANT)",
        "        pass",
        f"{AUDIT_TESTS}::test_refused_calls_and_reaches_for_others_requests_are_written",
    ),
    Mutation(
        "a caller acts under the audit of the one before",
        "kvrelay/security/process_security.py",
        "        set_current_audit(None if self._audit is None else CallAudit(self._audit, principal, method))",
        "        pass",
        f"{AUDIT_TESTS}::test_refused_calls_and_reaches_for_others_requests_are_written",
    ),
)

LOG_MUTATIONS = (
    Mutation(
        "others make lines of the log long",
        LOGGING,
        "            event[name] = shortened(value, MAX_VALUE_CHARACTERS)",
        "            pass",
        f"{LOGGING_TESTS}::test_no_name_or_error_of_others_makes_a_line_long",
    ),
    Mutation(
        "lists of others make lines of the log long",
        LOGGING,
        "            event[name] = shortened(text, MAX_VALUE_CHARACTERS)",
        "            pass",
        f"{LOGGING_TESTS}::test_no_name_or_error_of_others_makes_a_line_long",
    ),
    Mutation(
        "others make tracebacks long",
        LOGGING,
        "    stream.write(shortened(text.getvalue(), MAX_TRACEBACK_CHARACTERS))",
        "    stream.write(text.getvalue())",
        f"{LOGGING_TESTS}::test_no_name_or_error_of_others_makes_a_line_long",
    ),
    Mutation(
        "a log without a reader stops the process",
        LOGGING,
        "                if self._has_descriptor and not self._room.poll(0):",
        "                if False:",
        f"{LOGGING_TESTS}::test_a_log_that_nobody_reads_holds_nobody_up",
        60,
    ),
)

MUTATIONS = (*FRONT_MUTATIONS, *SMG_MUTATIONS, *AUDIT_MUTATIONS, *LOG_MUTATIONS)

if __name__ == "__main__":
    sys.exit(run_mutations(MUTATIONS))
