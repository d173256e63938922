"""`python -m tests.security.bound_mutations`: takes out bounds of messages and connections.

In a copy of the sources, where a test has to fail. `-O` does so without asserts.
"""

import sys

from tests.support.mutations import Mutation, run_mutations

BOUNDS = "kvrelay/core/bounds.py"
BOUNDS_TESTS = "tests/core/test_bounds.py"
WALKS = "tests/security/test_bounds_before_work.py::test_what_is_too_much_is_refused_without_a_walk"
VALIDATION = "gateway/requests/request_validation.py"
VALIDATION_TESTS = "tests/gateway/requests/test_request_validation.py"
TEXTS = "gateway/text/texts.py"
TEXTS_TESTS = "tests/gateway/text/test_texts.py"
LANES = "gateway/text/text_lanes.py"
PLACE_TESTS = "tests/gateway/api/test_place_first.py"
KSERVE = "gateway/protocols/kserve"
KSERVE_TESTS = "tests/gateway/protocols/kserve/test_bounds.py"
SERVICE_TESTS = "tests/gateway/api/test_service.py"
MANY_TESTS = "tests/security/test_many_at_once.py"
LIMITS = "kvrelay/network/connection_limits.py"
LIMITS_TESTS = "tests/network/test_connection_limits.py"
HTTP_BOUNDS = "kvrelay/network/http_bounds.py"
HTTP_SERVER = "kvrelay/network/http_server.py"
HTTP_TESTS = "tests/network/test_http_server.py"
PAGE_TESTS = "tests/gateway/page/test_page_guard.py"
TRY_BOX = "gateway/page/try_box.py"
TRY_TESTS = "tests/gateway/page/test_try_box.py"

NAMES_AND_IDS = (
    Mutation(
        "names have any length",
        BOUNDS,
        "    if num_bytes > max_bytes:",
        "    if False:",
        f"{BOUNDS_TESTS}::test_lengths_are_bytes_and_end_with_the_bound",
    ),
    Mutation(
        "characters count as bytes",
        BOUNDS,
        'len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))',
        "len(text)",
        f"{BOUNDS_TESTS}::test_lengths_are_bytes_and_end_with_the_bound",
    ),
    Mutation(
        "lists have any length",
        BOUNDS,
        "    if len(entries) > max_entries:",
        "    if False:",
        f"{BOUNDS_TESTS}::test_a_count_needs_no_walk",
    ),
    Mutation(
        "any text is an id",
        BOUNDS,
        "return _REQUEST_ID.fullmatch(text) is not None",
        "return True",
        f"{BOUNDS_TESTS}::test_only_hexadecimal_digits_are_an_id",
    ),
    Mutation(
        "an id may go on",
        BOUNDS,
        "_REQUEST_ID.fullmatch(text)",
        "_REQUEST_ID.match(text)",
        f"{BOUNDS_TESTS}::test_only_hexadecimal_digits_are_an_id",
    ),
    Mutation(
        "ids become keys unseen",
        "gateway/requests/known_requests.py",
        "        check_request_id(request_id)\n",
        "",
        "tests/gateway/requests/test_known_requests.py::test_an_odd_id_reaches_no_store",
    ),
    Mutation(
        "texts are quoted whole",
        "kvrelay/core/quoting.py",
        "shortened(repr(value[: MAX_QUOTED_CHARACTERS + 1]))",
        "repr(value)",
        f"{BOUNDS_TESTS}::test_what_errors_quote_is_short_whatever_it_is",
    ),
    Mutation(
        "lists are quoted whole",
        "kvrelay/core/quoting.py",
        "shortened(_collections.repr(value))",
        "repr(value)",
        f"{BOUNDS_TESTS}::test_what_errors_quote_is_short_whatever_it_is",
    ),
    Mutation(
        "a status is as long as its error",
        "kvrelay/wire/errors.py",
        "return data.decode() if len(data) <= max_bytes else",
        "return data.decode() if data is not None else",
        "tests/network/test_rpc.py::test_no_error_is_larger_than_headers_may_be",
    ),
)

REQUESTS = (
    Mutation(
        "entries are read before they are counted",
        "kvrelay/core/sampling_params.py",
        "        if self.max_entries is not None:\n            check_count(self.name, value, self.max_entries)",
        "        pass",
        WALKS,
    ),
    Mutation("messages are walked", VALIDATION, "    if len(messages) > MAX_MESSAGES:", "    if False:", WALKS),
    Mutation("a tenant has any length", VALIDATION, '    check_length("tenant", message.tenant)\n', "", WALKS),
    Mutation(
        "an idempotency key has any length",
        VALIDATION,
        '    check_length("idempotency_key", message.idempotency_key)\n',
        "",
        WALKS,
    ),
    Mutation(
        "a role has any length",
        VALIDATION,
        '        check_length(f"{field}[{number}].role", message.role)\n',
        "",
        f"{VALIDATION_TESTS}::test_a_role_is_short",
    ),
    Mutation(
        "token ids are walked before they are counted",
        VALIDATION,
        '    check_prompt_length(len(token_ids), "prompt", limits)\n',
        "",
        WALKS,
    ),
    Mutation(
        "any number is a token",
        VALIDATION,
        "    if max(token_ids, default=0) < model.vocab_size:",
        "    if True:",
        f"{VALIDATION_TESTS}::test_ids_out_of_the_vocabulary_are_named",
    ),
    Mutation(
        "biases of any token are taken",
        VALIDATION,
        "        if token_id >= limits.model.vocab_size:",
        "        if False:",
        f"{VALIDATION_TESTS}::test_what_does_not_fit_the_model_is_named",
    ),
    Mutation(
        "a prompt is longer than the context",
        VALIDATION,
        "    if num_tokens >= limits.max_tokens:",
        "    if False:",
        f"{VALIDATION_TESTS}::test_what_does_not_fit_the_model_is_named",
    ),
    Mutation(
        "an output is longer than the context",
        VALIDATION,
        "    elif sampling.max_tokens > room:",
        "    elif False:",
        f"{VALIDATION_TESTS}::test_what_does_not_fit_the_model_is_named",
    ),
    Mutation(
        "a client waits as long as it likes",
        VALIDATION,
        "max(min(wanted_s, settings.max_timeout_ms / 1000), 0.0)",
        "max(wanted_s, 0.0)",
        f"{VALIDATION_TESTS}::test_a_deadline_lies_within_the_longest",
    ),
    Mutation(
        "a conversation's tenant has any length",
        "gateway/api/conversation_stream.py",
        '            check_length("tenant", turn.tenant)\n',
        "",
        f"{PLACE_TESTS}::test_a_conversations_tenant_is_short_before_anything_is_kept",
    ),
    Mutation(
        "turns add up to any number of messages",
        "gateway/api/conversation_stream.py",
        "        if conversation.num_messages + len(messages) > MAX_MESSAGES:",
        "        if False:",
        f"{PLACE_TESTS}::test_turns_do_not_add_up_beyond_the_messages_of_one_request",
    ),
    Mutation(
        "a request is prepared before it has a place",
        "gateway/api/generation.py",
        "        async with self._starter.place(request.tenant, deadline) as place:\n"
        "            prepared = await self._preparation.prepare(request, now, deadline)\n",
        "        prepared = await self._preparation.prepare(request, now, deadline)\n"
        "        async with self._starter.place(request.tenant, deadline) as place:\n",
        f"{PLACE_TESTS}::test_without_a_place_no_request_is_prepared",
    ),
    Mutation(
        "a turn is prepared before it has a place",
        "gateway/api/conversation_stream.py",
        "        async with self._starter.place(self._tenant or tenant, deadline) as place:\n"
        "            request = await self._prepare(turn, tenant, deadline)\n",
        "        request = await self._prepare(turn, tenant, deadline)\n"
        "        async with self._starter.place(self._tenant or tenant, deadline) as place:\n",
        f"{PLACE_TESTS}::test_without_a_place_no_turn_is_prepared",
    ),
    Mutation(
        "a front's request is prepared before it has a place",
        "gateway/protocols/vllm_engine/service.py",
        "        async with self._gateway.starter.place(tenant_of_call(NO_TENANT), deadline) as place:\n"
        "            prepared = await prepare(request, self._gateway.preparation, deadline)\n",
        "        prepared = await prepare(request, self._gateway.preparation, deadline)\n"
        "        async with self._gateway.starter.place(tenant_of_call(NO_TENANT), deadline) as place:\n",
        f"{PLACE_TESTS}::test_without_a_place_no_request_of_a_front_is_prepared",
    ),
    Mutation(
        "ids of a front have any length",
        "gateway/protocols/vllm_engine/requests.py",
        "    check_client_id(message.request_id)\n",
        "",
        "tests/gateway/protocols/test_vllm_engine_bounds.py"
        "::test_a_clients_id_is_looked_at_before_anything_is_prepared",
    ),
    Mutation(
        "one abort names everything",
        "gateway/protocols/vllm_engine/service.py",
        '        check_count("request_ids", request.request_ids, MAX_ABORTED)\n',
        "",
        "tests/gateway/protocols/test_vllm_engine_bounds.py::test_one_abort_names_a_bounded_number_of_requests",
    ),
    Mutation(
        "tokens to write as text are not counted",
        "gateway/service.py",
        "        if len(request.token_ids) > bound.max_tokens:",
        "        if False:",
        f"{SERVICE_TESTS}::test_texts_far_beyond_the_context_are_refused_by_every_call_and_others_are_served",
    ),
    Mutation(
        "a page has any number of requests",
        "gateway/service.py",
        "        if page_size > MAX_PAGE_SIZE:",
        "        if False:",
        f"{SERVICE_TESTS}::test_requests_are_listed_page_by_page",
    ),
    Mutation(
        "a list has whole error messages",
        "gateway/service.py",
        "shortened(info.error_message, MAX_LISTED_ERROR_CHARACTERS)",
        "info.error_message",
        f"{MANY_TESTS}::test_the_largest_page_is_within_what_every_client_takes",
    ),
    Mutation(
        "all lists are read at once",
        "gateway/service.py",
        "        async with self._listing.turn():\n",
        "        if True:\n",
        f"{MANY_TESTS}::test_many_lists_at_once_are_read_a_few_at_a_time",
    ),
    Mutation(
        "coalescing takes as long as a client says",
        "gateway/service.py",
        "        if request.coalesce_ms > MAX_COALESCE_MS:",
        "        if False:",
        "tests/gateway/api/test_generate.py::test_a_coalescing_time_out_of_range_is_refused",
    ),
)

TEXT = (
    Mutation(
        "a text is tokenized whatever its length",
        TEXTS,
        '        if num_bytes > max_bytes:\n            raise bound.error(f"{num_bytes} bytes, of which',
        '        if False:\n            raise bound.error(f"{num_bytes} bytes, of which',
        f"{TEXTS_TESTS}::test_a_far_too_long_text_is_refused_without_tokenizing",
    ),
    Mutation(
        "a chat is rendered whatever its length",
        TEXTS,
        '        if num_bytes > max_bytes:\n            raise bound.error(f"{num_bytes} bytes in its messages',
        '        if False:\n            raise bound.error(f"{num_bytes} bytes in its messages',
        "tests/gateway/text/test_chat_renderer.py::test_a_conversation_without_bounds_reaches_no_child",
    ),
    Mutation(
        "a long text is tokenized at once",
        TEXTS,
        "    while size * 2 < len(text):",
        "    while False:",
        f"{TEXTS_TESTS}::test_the_cost_of_a_too_long_text_is_bounded_by_the_allowed_tokens",
    ),
    Mutation(
        "a long text is tokenized to its end",
        TEXTS,
        "            if encoded.num_tokens > bound.max_tokens + MARGIN_TOKENS:",
        "            if False:",
        f"{TEXTS_TESTS}::test_the_cost_of_a_too_long_text_is_bounded_by_the_allowed_tokens",
    ),
    Mutation(
        "a text has more tokens than it may",
        TEXTS,
        "            if len(part) == len(text) and encoded.token_ids is None:",
        "            if False:",
        f"{TEXTS_TESTS}::test_a_slightly_too_long_text_is_refused_with_its_number_of_tokens",
    ),
    Mutation(
        "texts are tokenized on the event loop",
        LANES,
        "        if num_bytes <= INLINE_BYTES:",
        "        if True:",
        f"{TEXTS_TESTS}::test_the_event_loop_runs_while_a_long_text_is_tokenized",
    ),
    Mutation(
        "tokenizing holds the interpreter",
        "gateway/text/tokenizer.py",
        "(encoding,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=not rendered)",
        "encoding = self.tokenizer.encode(text, add_special_tokens=not rendered)",
        f"{TEXTS_TESTS}::test_the_event_loop_runs_while_a_long_text_is_tokenized[encode]",
    ),
    Mutation(
        "any number of texts waits",
        LANES,
        "        if self._turns.locked() and self._num_waiting >= self._max_waiting:",
        "        if False:",
        "tests/gateway/text/test_text_lanes.py::test_a_full_queue_refuses_texts_with_a_retry_time",
    ),
    Mutation(
        "a text waits beyond its deadline",
        LANES,
        "            async with asyncio.timeout_at(deadline):",
        "            async with asyncio.timeout_at(None):",
        "tests/gateway/text/test_text_lanes.py::test_a_deadline_ends_the_wait_and_frees_the_turn",
        60,
    ),
)

PROTOCOLS = (
    Mutation(
        "ids of KServe have any length",
        f"{KSERVE}/requests.py",
        '    check_length("id", request.id)\n',
        "",
        f"{KSERVE_TESTS}::test_a_clients_id_is_short",
    ),
    Mutation(
        "outputs are walked",
        f"{KSERVE}/requests.py",
        '    check_count("outputs", request.outputs, len(known))\n',
        "",
        WALKS,
    ),
    Mutation(
        "a shape is walked",
        f"{KSERVE}/tensors.py",
        "    too_deep = len(tensor.shape) > MAX_DIMENSIONS",
        "    too_deep = False",
        WALKS,
    ),
    Mutation("elements are taken apart to the last", f"{KSERVE}/tensors.py", " and len(elements) < 2:", ":", WALKS),
    Mutation(
        "any text of parameters is parsed",
        f"{KSERVE}/sampling_json.py",
        "    check_length(SAMPLING_PARAMETERS, text, MAX_JSON_BYTES)\n",
        "",
        f"{KSERVE_TESTS}::test_a_long_text_of_parameters_is_not_parsed",
    ),
    Mutation(
        "lists in JSON are read before they are counted",
        f"{KSERVE}/sampling_json.py",
        "        PARAMETERS[name].check_count(entries)\n",
        "        pass\n",
        f"{KSERVE_TESTS}::test_entries_are_counted_before_one_is_read",
    ),
    Mutation(
        "a stream reads all its requests at once",
        f"{KSERVE}/service.py",
        "        places = asyncio.Semaphore(MAX_REQUESTS_PER_STREAM)",
        "        places = asyncio.Semaphore(10**6)",
        f"{KSERVE_TESTS}::test_a_stream_reads_no_more_requests_than_may_run",
    ),
    Mutation(
        "a response format has any size",
        "kvrelay/core/response_format.py",
        "        if not 1 <= num_bytes <= MAX_FORMAT_BYTES:",
        "        if num_bytes < 1:",
        "tests/core/test_response_format.py::test_what_is_no_form_is_refused_by_name",
    ),
    Mutation(
        "a schema has any depth",
        "kvrelay/structured_output/schema_source.py",
        "        if depth > MAX_DEPTH:",
        "        if False:",
        "tests/structured_output/test_json_schema.py::test_schemas_nested_more_than_a_hundred_levels_deep_are_refused_before_they_are_followed",
    ),
    Mutation(
        "a slow reader is waited for",
        "gateway/requests/runner.py",
        "        if not self._paused and self._readers.are_behind:",
        "        if False:",
        "tests/gateway/streaming/test_slow_readers.py"
        "::test_a_reader_that_stays_behind_ends_the_request_with_resource_exhausted",
        60,
    ),
)

CONNECTIONS = (
    Mutation(
        "messages have gRPC's own bound",
        LIMITS,
        '            ("grpc.max_receive_message_length", self.max_message_bytes),\n',
        "",
        f"{LIMITS_TESTS}::test_a_message_above_the_bound_is_refused_and_an_answer_is_not",
    ),
    Mutation(
        "a connection has any number of calls",
        LIMITS,
        '            ("grpc.max_concurrent_streams", self.max_streams),\n',
        "",
        f"{LIMITS_TESTS}::test_a_server_tells_how_many_calls_a_connection_may_have",
    ),
    Mutation(
        "there is any number of connections",
        LIMITS,
        '            ("grpc.max_allowed_incoming_connections", self.max_connections),\n',
        "",
        f"{LIMITS_TESTS}::test_connections_above_the_bound_are_closed_and_room_is_given_back",
    ),
    Mutation(
        "a connection may rest for ever",
        LIMITS,
        '            ("grpc.max_connection_idle_ms", self.idle_timeout_ms),\n',
        "",
        f"{LIMITS_TESTS}::test_a_connection_that_asks_nothing_is_closed[without calls]",
    ),
    Mutation(
        "a handshake may last",
        LIMITS,
        '            ("grpc.server_handshake_timeout_ms", self.handshake_timeout_ms),\n',
        "",
        f"{LIMITS_TESTS}::test_a_connection_that_asks_nothing_is_closed[silent]",
    ),
    Mutation(
        "calls that are reset count against others",
        LIMITS,
        '            ("grpc.server.max_pending_requests", MAX_PENDING_REQUESTS),\n'
        '            ("grpc.server.max_pending_requests_hard_limit", PENDING_HARD_LIMIT),\n',
        "",
        f"{LIMITS_TESTS}"
        "::test_calls_that_wait_for_a_handler_are_cancelled_only_far_above_what_a_few_connections_may_have",
    ),
    Mutation(
        "memory is trimmed only right after it has grown",
        "kvrelay/runtime/freed_memory.py",
        "        elif has_burst or num_looks > pause:",
        "        elif has_burst:",
        "tests/runtime/test_freed_memory.py::test_what_a_burst_has_in_use_is_given_back_later_with_few_trims",
    ),
    Mutation(
        "memory of large messages is never trimmed",
        "kvrelay/runtime/freed_memory.py",
        "lambda: trim(0)",
        "lambda: None",
        "tests/security/test_header_bombs.py::test_a_gateway_keeps_little_of_header_lists_that_are_too_large",
        300,
    ),
    Mutation(
        "a gateway takes messages as large as a worker does",
        "gateway/main.py",
        "create_server(guard=security.guard, limits=settings.connection_limits)",
        "create_server(guard=security.guard)",
        f"{SERVICE_TESTS}::test_a_message_above_the_gateways_bound_is_not_even_read",
    ),
)

HTTP = (
    Mutation(
        "any Host may ask",
        HTTP_SERVER,
        "middlewares = [check_hosts(bounds.names or HostNames((host,)))]",
        "middlewares = []",
        f"{HTTP_TESTS}::test_a_foreign_host_name_is_refused_on_every_route",
    ),
    Mutation(
        "a name that begins as one's own is one",
        HTTP_BOUNDS,
        "host in self._names or",
        "host.startswith(tuple(self._names)) or",
        f"{HTTP_TESTS}::test_a_foreign_host_name_is_refused_on_every_route",
    ),
    Mutation(
        "the first of several Hosts counts",
        HTTP_BOUNDS,
        'hosts[0] if len(hosts) == 1 else ""',
        'hosts[0] if hosts else ""',
        f"{PAGE_TESTS}::test_other_pages_and_foreign_host_names_are_refused",
    ),
    Mutation(
        "HTTP has any number of connections",
        HTTP_BOUNDS,
        "if len(server.connections) < max_connections",
        "if max_connections",
        f"{HTTP_TESTS}::test_connections_above_the_bound_are_closed_and_room_is_given_back",
    ),
    Mutation(
        "an HTTP connection may be silent",
        HTTP_SERVER,
        "        keepalive_timeout=bounds.silence_timeout_s,\n",
        "        keepalive_timeout=3600.0,\n",
        f"{HTTP_TESTS}::test_a_connection_that_asks_nothing_more_is_closed",
    ),
    Mutation(
        "a header has any length",
        HTTP_SERVER,
        "        max_field_size=MAX_LINE_BYTES,\n",
        "        max_field_size=2**20,\n",
        f"{HTTP_TESTS}::test_a_large_head_is_refused",
    ),
    Mutation(
        "there is any number of headers",
        HTTP_SERVER,
        "        max_headers=MAX_HEADERS,\n",
        "        max_headers=10_000,\n",
        f"{HTTP_TESTS}::test_a_large_head_is_refused",
    ),
    Mutation(
        "a body has aiohttp's own bound",
        HTTP_SERVER,
        ", client_max_size=MAX_BODY_BYTES)",
        ")",
        f"{HTTP_TESTS}::test_a_large_body_is_refused_before_it_is_read",
    ),
    Mutation(
        "packed bodies are unpacked",
        HTTP_SERVER,
        "        auto_decompress=False,  # no route takes a packed body, which may be far larger than it looks\n",
        "",
        f"{TRY_TESTS}::test_compressed_bodies_are_refused",
    ),
    Mutation(
        "the page loads what it likes",
        "gateway/page/live_page.py",
        "default-src 'none'",
        "default-src *",
        "tests/gateway/page/test_live_page.py::test_the_pages_policy_allows_only_its_own_script_and_style",
    ),
    Mutation(
        "any page may send prompts",
        "gateway/page/page_guard.py",
        "    _check_page(headers)\n",
        "",
        f"{PAGE_TESTS}::test_other_pages_and_foreign_host_names_are_refused",
    ),
    Mutation(
        "an HTML form may send prompts",
        "gateway/page/page_guard.py",
        "    if given != JSON_TYPE:",
        "    if False:",
        f"{PAGE_TESTS}::test_bodies_that_html_forms_can_send_are_refused",
    ),
    Mutation(
        "the box asks nobody where a prompt comes from",
        TRY_BOX,
        "            check_sender(request.headers, self._names)\n",
        "",
        f"{TRY_TESTS}::test_other_pages_are_refused",
    ),
    Mutation(
        "the box takes a body of any size",
        TRY_BOX,
        "                if len(body) > MAX_BODY_BYTES:",
        "                if False:",
        f"{TRY_TESTS}::test_large_and_slow_bodies_are_refused",
    ),
    Mutation(
        "the box waits for a body",
        TRY_BOX,
        "        async with asyncio.timeout(BODY_TIMEOUT_S):",
        "        async with asyncio.timeout(None):",
        f"{TRY_TESTS}::test_large_and_slow_bodies_are_refused",
        60,
    ),
    Mutation(
        "the box runs any number of prompts",
        TRY_BOX,
        "        if self._num_now >= MAX_AT_ONCE:",
        "        if False:",
        f"{TRY_TESTS}::test_only_a_few_prompts_run_at_once",
        60,
    ),
    Mutation(
        "the box is always open",
        TRY_BOX,
        "            if not self.is_open:",
        "            if False:",
        f"{TRY_TESTS}::test_the_box_can_be_switched_off",
    ),
    Mutation(
        "strangers get the box too",
        "kvrelay/config/settings.py",
        "        return is_loopback(self.server.host) if chosen is None else chosen",
        "        return True if chosen is None else chosen",
        f"{TRY_TESTS}::test_by_default_only_users_of_this_machine_get_the_box",
    ),
)

MUTATIONS = (*NAMES_AND_IDS, *REQUESTS, *TEXT, *PROTOCOLS, *CONNECTIONS, *HTTP)

if __name__ == "__main__":
    sys.exit(run_mutations(MUTATIONS))
