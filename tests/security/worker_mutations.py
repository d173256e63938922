"""`python -m tests.security.worker_mutations`: lets a stranger command workers.

In a copy of the sources, where a test has to fail. `-O` does so without asserts.
"""

import sys

from tests.support.mutations import Mutation, run_mutations

SESSION = "kvrelay/worker/gateway_session.py"
SESSION_TESTS = "tests/worker/test_gateway_session.py"
SESSIONS = "kvrelay/worker/gateway_sessions.py"
SESSIONS_TESTS = "tests/worker/test_gateway_sessions.py"
LEASES = "kvrelay/worker/job_leases.py"
LEASES_TESTS = "tests/worker/test_job_leases.py"
OWNERSHIP = "kvrelay/worker/ownership.py"
OWNERSHIP_TESTS = "tests/worker/test_ownership.py"
ROGUE = "tests/security/test_rogue_workers.py"
WATCH = "decode_worker/reservation_watch.py"
DECODE = "decode_worker/service.py"
SCHEDULER = "decode_worker/scheduling/scheduler.py"
SCHEDULER_TESTS = "tests/decode_worker/scheduling/test_scheduler.py"
RESERVATIONS = "decode_worker/scheduling/reservations.py"
RESERVATIONS_TESTS = "tests/decode_worker/test_reservations.py"
JOBS = "kvrelay/core/job_validation.py"
GRANTS = "decode_worker/receiving/write_grants.py"
GRANTS_TESTS = "tests/decode_worker/receiving/test_write_grants.py"
RECEIVER = "decode_worker/kv_receiver.py"
PUSH_TESTS = "tests/kv_transfer/test_push.py"
REASSEMBLY = "decode_worker/receiving/kv_reassembly.py"
REASSEMBLY_TESTS = "tests/decode_worker/receiving/test_kv_reassembly.py"
REGIONS = "kvrelay/kv_transfer/shm_fd_passing.py"
MEMORY = "kvrelay/kv_transfer/shared_memory.py"
MESSAGES = "gateway/workers/session_messages.py"
MESSAGES_TESTS = "tests/gateway/workers/test_session_messages.py"
TOKENIZER_TESTS = "tests/gateway/workers/test_tokenizer_cache.py"
VLLM_TESTS = "tests/vllm_engine/test_worker_service.py"
MEMORY_TESTS = "tests/kv_transfer/test_shared_memory.py"

SESSION_MUTATIONS = (
    Mutation(
        "who does not greet is waited for",
        SESSION,
        "            async with asyncio.timeout(HELLO_TIMEOUT_S):",
        "            async with asyncio.timeout(None):",
        f"{SESSION_TESTS}::test_who_does_not_greet_in_time_is_sent_away",
        90,
    ),
    Mutation(
        "any version may begin a session",
        SESSION,
        "        if request.hello.protocol_version != PROTOCOL_VERSION:",
        "        if False:",
        f"{SESSIONS_TESTS}::test_a_session_that_begins_otherwise_is_refused[version]",
    ),
    Mutation(
        "anything is a greeting",
        SESSION,
        'if request is grpc.aio.EOF or request.WhichOneof("message") != "hello":',
        "if request is grpc.aio.EOF:",
        f"{SESSIONS_TESTS}::test_a_session_that_begins_otherwise_is_refused[no hello]",
    ),
    Mutation(
        "a gateway is called as it likes",
        SESSION,
        "        self.gateway_id = _checked_gateway_id(request.hello.gateway_id)",
        "        self.gateway_id = request.hello.gateway_id",
        f"{ROGUE}::test_a_gateway_id_that_no_gateway_has_is_refused",
    ),
    Mutation(
        "a gateway's id breaks lines of the log",
        SESSION,
        "    if not gateway_id or not gateway_id.isprintable():",
        "    if not gateway_id:",
        f"{ROGUE}::test_a_gateway_id_that_no_gateway_has_is_refused",
    ),
    Mutation(
        "a gateway may be silent as long as it says",
        SESSION,
        "min(max(request.hello.liveness_window_ms, MIN_WINDOW_MS), MAX_WINDOW_MS)",
        "max(request.hello.liveness_window_ms, MIN_WINDOW_MS)",
        f"{SESSION_TESTS}::test_the_window_lies_within_bounds_whatever_is_asked_for",
    ),
    Mutation(
        "a silent gateway keeps its session",
        SESSION,
        "            if self._liveness.lost(now):",
        "            if False:",
        f"{SESSION_TESTS}::test_a_gateway_that_falls_silent_loses_its_session",
        90,
    ),
    Mutation(
        "a gateway that does not read keeps its session",
        SESSION,
        "            async with asyncio.timeout(self._window_s):",
        "            async with asyncio.timeout(None):",
        f"{SESSION_TESTS}::test_a_gateway_that_answers_and_does_not_read_loses_its_session",
        90,
    ),
    Mutation(
        "events pile up",
        SESSION,
        "asyncio.Queue(MAX_QUEUED_MESSAGES)",
        "asyncio.Queue()",
        f"{SESSION_TESTS}::test_events_that_a_gateway_does_not_take_are_bounded_and_end_its_session",
        90,
    ),
    Mutation(
        "texts of commands have any length",
        SESSION,
        "                _check_texts(name, command)\n",
        "",
        f"{SESSIONS_TESTS}::test_a_text_that_no_gateway_sends_ends_the_session",
    ),
    Mutation(
        "there is any number of sessions",
        SESSIONS,
        "        if self._num_calls >= MAX_SESSIONS:",
        "        if False:",
        f"{ROGUE}::test_sessions_and_their_jobs_are_bounded",
    ),
    Mutation(
        "who has not greeted takes no place",
        SESSIONS,
        "        if self._num_calls >= MAX_SESSIONS:",
        "        if len(self._sessions) >= MAX_SESSIONS:",
        f"{SESSION_TESTS}::test_who_has_not_greeted_yet_takes_a_place_too",
        90,
    ),
    Mutation(
        "a session has any number of jobs",
        SESSIONS,
        "        if self.leases.num_jobs_of(session) >= MAX_JOBS_PER_SESSION:",
        "        if False:",
        f"{ROGUE}::test_sessions_and_their_jobs_are_bounded",
    ),
    Mutation(
        "jobs outlive their session",
        SESSIONS,
        "            num_jobs = self.end_jobs_of(session)",
        "            num_jobs = 0",
        f"{SESSIONS_TESTS}::test_a_session_that_ends_frees_everything_of_it_and_nothing_else",
    ),
    Mutation(
        "tokens are read before they are counted",
        SESSIONS,
        "            check_num_tokens(len(message.token_ids), self._model)\n",
        "",
        f"{SESSION_TESTS}::test_a_job_of_too_many_tokens_is_refused_before_it_is_read",
    ),
    Mutation(
        "jobs are not checked",
        SESSIONS,
        "            validate_job(job, self._model)\n",
        "",
        f"{SESSIONS_TESTS}::test_what_cannot_be_served_is_refused",
    ),
    Mutation(
        "any token id reaches the engine",
        JOBS,
        "    if max(job.token_ids) >= model.vocab_size or min(job.token_ids) < 0:",
        "    if False:",
        f"{SESSIONS_TESTS}::test_what_cannot_be_served_is_refused",
    ),
    Mutation(
        "an attempt has any number",
        JOBS,
        "not 1 <= job.job_id.attempt <= MAX_ATTEMPT:",
        "job.job_id.attempt < 1:",
        f"{ROGUE}::test_a_stranger_with_a_victims_request_id_is_refused_and_the_victim_is_served",
    ),
    Mutation(
        "a draining worker begins jobs",
        SESSIONS,
        "        if self._draining:\n            self.refuse(",
        "        if False:\n            self.refuse(",
        f"{SESSIONS_TESTS}::test_a_draining_worker_refuses_new_jobs_lets_running_job_end_and_says_so",
    ),
)

OWNERSHIP_MUTATIONS = (
    Mutation(
        "another gateway cancels jobs",
        SESSIONS,
        "        if self.leases.session_of(job_id) is session:\n            self.leases.release(job_id)",
        "        if True:\n            self.leases.release(job_id)",
        f"{SESSIONS_TESTS}::test_another_gateway_cannot_cancel_or_command_a_job",
    ),
    Mutation(
        "another gateway commands jobs",
        DECODE,
        "        if self.sessions.leases.session_of(command.job_id) is session:",
        "        if True:",
        f"{SESSIONS_TESTS}::test_another_gateway_cannot_cancel_or_command_a_job",
    ),
    Mutation(
        "whoever asks is the owner",
        SESSIONS,
        "            if is_owner:\n",
        "            if True:\n",
        f"{ROGUE}::test_a_stranger_with_a_victims_request_id_is_refused_and_the_victim_is_served",
    ),
    Mutation(
        "a superseded session hears nothing",
        SESSIONS,
        "            self.refuse(session, job_id, FailureKind.SUPERSEDED, TAKEN_OVER_MESSAGE)",
        "            pass",
        f"{ROGUE}::test_a_superseded_session_is_told_at_once",
    ),
    Mutation(
        "a job begins that was cancelled meanwhile",
        SESSIONS,
        "        self._ownership.cancel(session, job_id)\n",
        "",
        f"{ROGUE}::test_a_job_that_is_cancelled_while_redis_is_asked_does_not_begin",
    ),
    Mutation(
        "any answer of Redis is a proof",
        OWNERSHIP,
        "on_answer(None if owner is None else owner == gateway_id)",
        "on_answer(None if owner is None else True)",
        f"{OWNERSHIP_TESTS}::test_only_the_owner_proves_itself",
    ),
    Mutation(
        "there is any number of questions",
        OWNERSHIP,
        "self._owners is None or len(self._tasks) >= MAX_QUESTIONS",
        "self._owners is None",
        f"{OWNERSHIP_TESTS}::test_more_questions_than_there_may_be_are_not_asked",
    ),
    Mutation(
        "an answer is waited for",
        OWNERSHIP,
        "            async with asyncio.timeout(QUESTION_TIMEOUT_S):",
        "            async with asyncio.timeout(None):",
        f"{OWNERSHIP_TESTS}::test_a_question_that_is_not_answered_proves_nothing",
        90,
    ),
    Mutation(
        "nobody needs a proof",
        LEASES,
        "        if not owns_request and self._needs_proof(job_id, gateway_id, known):",
        "        if False:",
        f"{LEASES_TESTS}::test_another_gateway_ends_running_jobs_only_as_the_owner_and_their_session_is_told",
    ),
    Mutation(
        "a first attempt may be far ahead",
        LEASES,
        "            return job_id.attempt > MAX_ATTEMPT_JUMP",
        "            return False",
        f"{LEASES_TESTS}::test_attempts_far_ahead_do_not_shut_the_owner_out",
    ),
    Mutation(
        "a next attempt may be far ahead",
        LEASES,
        "        if job_id.attempt > known.attempt + MAX_ATTEMPT_JUMP:",
        "        if False:",
        f"{LEASES_TESTS}::test_attempts_far_ahead_do_not_shut_the_owner_out",
    ),
    Mutation(
        "running jobs of another gateway may be ended",
        LEASES,
        "(is_open or job_id.attempt <= known.attempt)",
        "(job_id.attempt <= known.attempt)",
        f"{LEASES_TESTS}::test_another_gateway_ends_running_jobs_only_as_the_owner_and_their_session_is_told",
    ),
    Mutation(
        "another gateway repeats an attempt",
        LEASES,
        "(is_open or job_id.attempt <= known.attempt)",
        "(is_open)",
        f"{LEASES_TESTS}::test_a_request_without_jobs_goes_on_at_another_gateway_with_a_newer_attempt",
    ),
    Mutation(
        "a job begins that the engine still has",
        LEASES,
        "        if job_id in self._leases or job_id in self._ending:",
        "        if job_id in self._leases:",
        f"{LEASES_TESTS}::test_a_job_that_the_engine_still_has_does_not_begin_again_even_for_the_owner",
    ),
    Mutation(
        "older attempts begin again",
        LEASES,
        "(job_id.attempt < known.attempt or job_id in known.jobs)",
        "job_id in known.jobs",
        f"{LEASES_TESTS}::test_older_attempts_and_jobs_that_were_here_are_refused_even_after_their_end",
    ),
    Mutation(
        "a job begins twice",
        LEASES,
        "(job_id.attempt < known.attempt or job_id in known.jobs)",
        "job_id.attempt < known.attempt",
        f"{LEASES_TESTS}::test_older_attempts_and_jobs_that_were_here_are_refused_even_after_their_end",
    ),
    Mutation(
        "attempts are remembered for ever",
        LEASES,
        "        while len(self._requests) > NUM_REMEMBERED_REQUESTS:",
        "        while False:",
        f"{LEASES_TESTS}::test_memory_of_attempts_is_bounded",
    ),
    Mutation(
        "a job has no deadline",
        LEASES,
        "call_later(deadline_ms / 1000, self._on_expired, job_id)",
        "call_later(deadline_ms * 1000, self._on_expired, job_id)",
        f"{LEASES_TESTS}::test_a_deadline_is_told_once_and_leaves_the_lease_to_be_ended",
        90,
    ),
)

RESERVATION_MUTATIONS = (
    Mutation(
        "an isolated reservation stops others for ever",
        WATCH,
        "(ISOLATED_LIMIT_S, self._lapse) if job_id in self._isolated else (IDLE_LIMIT_S, self._set_idle)",
        "IDLE_LIMIT_S, self._set_idle",
        f"{ROGUE}::test_an_isolated_reservation_without_a_prompt_stops_others_for_a_moment_only",
    ),
    Mutation(
        "isolated reservations follow each other",
        WATCH,
        "        self._rests_until = asyncio.get_running_loop().time() + REST_S\n",
        "",
        f"{ROGUE}::test_an_isolated_reservation_without_a_prompt_stops_others_for_a_moment_only",
    ),
    Mutation(
        "an isolated job stops others paused",
        SCHEDULER,
        "sequence.decode_job.paused and sequence.decode_job is not self._isolated_job",
        "sequence.decode_job.paused",
        f"{ROGUE}::test_an_isolated_job_that_runs_cannot_be_paused",
    ),
    Mutation(
        "idle reservations keep their blocks",
        WATCH,
        "        if self._look is None:\n            self._offer()",
        "        pass",
        f"{ROGUE}::test_reservations_with_nothing_behind_them_give_way_to_others",
    ),
    Mutation(
        "a reservation is taken under its writer",
        RESERVATIONS,
        "if job.awaits_push and self._writers.is_unused(job.job_id)]",
        "if job.awaits_push]",
        f"{RESERVATIONS_TESTS}::test_the_holder_of_most_unused_blocks_gives_its_youngest_back_for_others",
    ),
    Mutation(
        "who holds the fewest gives back",
        RESERVATIONS,
        "            if num_held[holder] < num_blocks:",
        "            if False:",
        f"{RESERVATIONS_TESTS}::test_the_holder_of_most_unused_blocks_gives_its_youngest_back_for_others",
    ),
    Mutation(
        "any number of jobs waits for blocks",
        SCHEDULER,
        "        if self._reservations.num_waiting >= self._limits.max_waiting_works and not self._make_place_for(job):",
        "        if False:",
        f"{SCHEDULER_TESTS}::test_a_full_queue_refuses",
    ),
    Mutation(
        "jobs that run alone do so at once",
        "decode_worker/scheduling/fair_admission.py",
        "        if job.spec.isolated and isolated is not None:",
        "        if False:",
        f"{SCHEDULER_TESTS}::test_jobs_that_run_alone_do_so_one_after_the_other",
    ),
    Mutation(
        "another model's requests take blocks",
        DECODE,
        "        if message.fingerprint != self._model.fingerprint:",
        "        if False:",
        f"{SESSIONS_TESTS}::test_another_fingerprint_is_refused_before_anything_is_reserved",
    ),
    Mutation(
        "a prompt is computed for a push that cannot be",
        "prefill_worker/service.py",
        "        if len(message.ticket) != TICKET_BYTES or not 0 <= message.num_cached_tokens < len(message.token_ids):",
        "        if False:",
        f"{SESSIONS_TESTS}::test_a_push_that_could_never_be_is_refused_before_the_prompt_is_computed",
    ),
)

PUSH_MUTATIONS = (
    Mutation(
        "KV goes to any address",
        "kvrelay/kv_transfer/registered_receivers.py",
        "        if not await self._is_registered(address):",
        "        if False:",
        f"{ROGUE}::test_a_prefill_worker_dials_registered_decode_workers_only",
    ),
    Mutation(
        "a worker of any role may be dialled",
        "kvrelay/state/registered_peers.py",
        "for member in self._view.members(role))",
        "for member in self._view.members())",
        f"{ROGUE}::test_an_address_of_a_client_is_not_dialled",
    ),
    Mutation(
        "a client's address is dialled",
        "decode_worker/vllm_engine/service.py",
        "            await self._check_address(address)\n",
        "",
        "tests/decode_worker/vllm_engine/test_addresses.py::test_a_strangers_address_begins_nothing",
    ),
    Mutation(
        "parameters of any length are parsed",
        "kvrelay/vllm_engine/transfer_params.py",
        "    check_length(_FIELD, params, MAX_PARAMS_BYTES)\n",
        "",
        "tests/vllm_engine/test_vllm_engine.py::test_long_parameters_are_not_parsed",
    ),
    Mutation(
        "any ticket opens a reservation",
        GRANTS,
        "if grant is None or not matches or",
        "if grant is None or",
        f"{GRANTS_TESTS}::test_another_ticket_opens_nothing_and_uses_nothing_up",
    ),
    Mutation(
        "a ticket opens twice",
        GRANTS,
        " or not matches or grant._state is not _State.GRANTED:",
        " or not matches:",
        f"{GRANTS_TESTS}::test_a_ticket_opens_its_own_reservation_once",
    ),
    Mutation(
        "a ticket outlives its reservation",
        GRANTS,
        "                del self._grants[job_id]\n                return True",
        "                return True",
        f"{GRANTS_TESTS}::test_closing_before_a_writer_came_frees_at_once_and_kills_the_ticket",
    ),
    Mutation(
        "a push may say nothing",
        RECEIVER,
        "            async with asyncio.timeout(HEADER_TIMEOUT_S):",
        "            async with asyncio.timeout(None):",
        f"{PUSH_TESTS}::test_a_push_that_says_nothing_is_ended",
    ),
    Mutation(
        "any version is read",
        RECEIVER,
        "        if header.wire_version != WIRE_VERSION:",
        "        if False:",
        f"{PUSH_TESTS}::test_another_wire_version_is_refused",
    ),
    Mutation(
        "KV of another model is taken",
        RECEIVER,
        "        if header.fingerprint != self._context.model.fingerprint:",
        "        if False:",
        f"{PUSH_TESTS}::test_a_header_without_the_right_leaves_the_reservation_as_it_is",
    ),
    Mutation(
        "ids of pushes have any length",
        RECEIVER,
        '        check_length("header.job_id.request_id", header.job_id.request_id)\n',
        "",
        f"{PUSH_TESTS}::test_a_header_with_a_long_id_is_refused_before_anything_is_looked_up",
    ),
    Mutation(
        "a push is of other tokens",
        RECEIVER,
        "        if (header.token_begin, header.token_end) != expected:",
        "        if False:",
        f"{PUSH_TESTS}::test_another_range_than_the_reservation_s_ends_the_push",
    ),
    Mutation(
        "a chunk's digest counts for nothing",
        RECEIVER,
        "        if not hmac.compare_digest(expected, chunk.digest):",
        "        if False:",
        f"{PUSH_TESTS}::test_a_wrong_chunk_is_refused_and_not_written",
    ),
    Mutation(
        "an end's digest counts for nothing",
        RECEIVER,
        "        if not hmac.compare_digest(expected, request.end.digest):",
        "        if False:",
        f"{PUSH_TESTS}::test_an_end_of_another_ticket_ends_the_push",
    ),
    Mutation(
        "a push ends with any tokens",
        RECEIVER,
        "        _check_first_tokens(tokens, grant.job, self._context.model)\n",
        "",
        f"{PUSH_TESTS}::test_wrong_first_tokens_end_the_push",
    ),
    Mutation(
        "a first token is outside of the vocabulary",
        RECEIVER,
        "    if any(token.token.token_id >= model.vocab_size for token in tokens):",
        "    if False:",
        f"{PUSH_TESTS}::test_wrong_first_tokens_end_the_push",
    ),
    Mutation(
        "a sender takes no answers for ever",
        RECEIVER,
        "            async with asyncio.timeout(ANSWER_TIMEOUT_S):",
        "            async with asyncio.timeout(None):",
        f"{PUSH_TESTS}::test_a_sender_that_takes_no_answer_keeps_its_blocks_for_a_bounded_time",
        90,
    ),
    Mutation(
        "a chunk lies outside of the reservation",
        REASSEMBLY,
        "        if not self._token_begin <= span.token_begin < span.token_end <= self._token_end:",
        "        if False:",
        f"{REASSEMBLY_TESTS}::test_whatever_comes_each_cell_of_the_reservation_is_taken_at_most_once",
    ),
    Mutation(
        "a chunk is written twice",
        REASSEMBLY,
        "        if any(self._overlaps(layer, span) for layer in range(span.layer_begin, span.layer_end)):",
        "        if False:",
        f"{REASSEMBLY_TESTS}::test_whatever_comes_each_cell_of_the_reservation_is_taken_at_most_once",
    ),
    Mutation(
        "a payload has any size",
        REASSEMBLY,
        "        if num_bytes != span.num_bytes(self._layout):",
        "        if False:",
        f"{REASSEMBLY_TESTS}::test_a_payload_of_another_size_is_a_problem",
    ),
    Mutation(
        "chunks are refused for ever",
        REASSEMBLY,
        "        if name in self._refused or len(self._refused) >= MAX_REFUSALS:",
        "        if False:",
        f"{REASSEMBLY_TESTS}::test_refusals_are_bounded",
    ),
    Mutation(
        "a push ends with a part missing",
        REASSEMBLY,
        "        if not self.is_complete:",
        "        if False:",
        f"{REASSEMBLY_TESTS}::test_an_end_before_the_last_part_or_with_another_count_is_an_error",
    ),
)

MEMORY_MUTATIONS = (
    Mutation(
        "any key opens shared memory",
        REGIONS,
        "            if not hmac.compare_digest(message, self.endpoint.key):",
        "            if False:",
        f"{MEMORY_TESTS}::test_without_the_key_nothing_is_taken",
    ),
    Mutation(
        "a key is waited for",
        REGIONS,
        "        connection.timer = loop.call_later(KEY_TIMEOUT_S, self._drop, connection)",
        "        connection.timer = loop.call_later(3600, self._drop, connection)",
        f"{MEMORY_TESTS}::test_a_connection_that_shows_no_key_is_ended",
        90,
    ),
    Mutation(
        "another user shares memory",
        REGIONS,
        "        if len(self._connections) >= MAX_CONNECTIONS or not peer_is_same_user(accepted):",
        "        if len(self._connections) >= MAX_CONNECTIONS:",
        f"{MEMORY_TESTS}::test_another_user_is_not_asked_for_a_key",
        90,
    ),
    Mutation(
        "there is any number of connections for memory",
        REGIONS,
        "        if len(self._connections) >= MAX_CONNECTIONS or not peer_is_same_user(accepted):",
        "        if not peer_is_same_user(accepted):",
        f"{MEMORY_TESTS}::test_connections_are_bounded",
        90,
    ),
    Mutation(
        "there is any number of regions",
        REGIONS,
        "        if region_id in self._regions or len(connection.region_ids) >= MAX_REGIONS:",
        "        if region_id in self._regions:",
        f"{MEMORY_TESTS}::test_only_so_many_regions_are_taken",
    ),
    Mutation(
        "two pushes share a region",
        REGIONS,
        "        if region is None or region_id in self._lent:",
        "        if region is None:",
        f"{MEMORY_TESTS}::test_a_region_has_one_push_at_a_time",
    ),
    Mutation(
        "memory that may shrink is mapped",
        MEMORY,
        "    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:",
        "    if False:",
        f"{MEMORY_TESTS}::test_memory_that_could_do_harm_is_not_taken",
    ),
    Mutation(
        "a region has any size",
        MEMORY,
        "    if not 0 < num_bytes <= MAX_REGION_BYTES:",
        "    if False:",
        f"{MEMORY_TESTS}::test_memory_that_could_do_harm_is_not_taken",
    ),
    Mutation(
        "the receiver writes into a region",
        MEMORY,
        ", prot=mmap.PROT_READ)",
        ", prot=mmap.PROT_READ | mmap.PROT_WRITE)",
        f"{MEMORY_TESTS}::test_what_one_side_writes_the_other_reads",
    ),
)

GATEWAY_MUTATIONS = (
    Mutation(
        "a worker's names have any length",
        MESSAGES,
        '        check_length(f"hello.model.{name}", getattr(message.model, name), MAX_ADDRESS_BYTES)',
        "        pass",
        f"{MESSAGES_TESTS}::test_a_model_has_short_names",
    ),
    Mutation(
        "a worker's id has any length",
        MESSAGES,
        '    check_length("hello.worker_id", message.worker_id)\n',
        "",
        f"{MESSAGES_TESTS}::test_a_worker_has_a_short_id_and_few_end_tokens",
    ),
    Mutation(
        "a model has any number of end tokens",
        MESSAGES,
        '    check_count("hello.model.eos_token_ids", message.model.eos_token_ids, MAX_END_TOKENS)\n',
        "",
        f"{MESSAGES_TESTS}::test_a_worker_has_a_short_id_and_few_end_tokens",
    ),
    Mutation(
        "a worker's sentence is kept whole",
        MESSAGES,
        "    message = shortened(failed.message, MAX_FAILURE_CHARACTERS)",
        "    message = failed.message",
        f"{MESSAGES_TESTS}::test_a_sentence_about_a_failure_is_cut",
    ),
    Mutation(
        "any number of times of chunks is read",
        MESSAGES,
        "message.chunks[:MAX_CHUNK_TIMES]",
        "message.chunks",
        f"{MESSAGES_TESTS}::test_a_bounded_number_of_chunk_times_is_read",
    ),
    Mutation(
        "a tokenizer has any size",
        "gateway/workers/tokenizer_cache.py",
        "            if num_bytes > MAX_TOTAL_BYTES:",
        "            if False:",
        f"{TOKENIZER_TESTS}::test_files_beyond_the_bound_are_broken_off",
        90,
    ),
    Mutation(
        "a tokenizer is waited for",
        "gateway/workers/tokenizer_cache.py",
        ", timeout=FETCH_TIMEOUT_S\n",
        "\n",
        f"{TOKENIZER_TESTS}::test_files_that_do_not_come_are_given_up",
        90,
    ),
    Mutation(
        "files of any name are kept",
        "gateway/workers/tokenizer_cache.py",
        "            if piece.file_name in KNOWN_FILES:",
        "            if True:",
        f"{TOKENIZER_TESTS}::test_files_of_unknown_names_are_not_kept",
    ),
    Mutation(
        "commands pile up",
        "gateway/workers/session.py",
        "asyncio.Queue(MAX_QUEUED_COMMANDS)",
        "asyncio.Queue()",
        "tests/gateway/workers/test_session.py::test_a_worker_that_does_not_read_its_commands_loses_its_session",
    ),
    Mutation(
        "a push is read into memory to its end",
        "decode_worker/receiving/push_inbox.py",
        "                while len(self._messages) >= MAX_READ_AHEAD:",
        "                while False:",
        "tests/decode_worker/receiving/test_push_inbox.py::test_no_more_is_read_than_a_few_messages_ahead",
    ),
    Mutation(
        "a worker takes a front's ids of any length",
        "kvrelay/vllm_engine/worker_service.py",
        "        check_client_id(request.request_id)\n",
        "",
        f"{VLLM_TESTS}::test_a_clients_id_is_short",
    ),
    Mutation(
        "a worker reads a front's tokens before it counts them",
        "kvrelay/vllm_engine/worker_service.py",
        "        if num_tokens >= self._engine.max_tokens:",
        "        if False:",
        f"{VLLM_TESTS}::test_tokens_are_counted_before_they_are_read",
    ),
    Mutation(
        "one abort names everything at a worker",
        "kvrelay/vllm_engine/worker_service.py",
        '        check_count("request_ids", request.request_ids, MAX_ABORTED)\n',
        "",
        f"{VLLM_TESTS}::test_one_abort_names_a_bounded_number_of_requests",
    ),
)

MUTATIONS = (
    *SESSION_MUTATIONS,
    *OWNERSHIP_MUTATIONS,
    *RESERVATION_MUTATIONS,
    *PUSH_MUTATIONS,
    *MEMORY_MUTATIONS,
    *GATEWAY_MUTATIONS,
)

if __name__ == "__main__":
    sys.exit(run_mutations(MUTATIONS))
