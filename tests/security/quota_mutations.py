"""`python -m tests.security.quota_mutations`: lets one key take what is others'.

In a copy of the sources, where a test has to fail. `-O` does so without asserts.
"""

import sys

from tests.support.mutations import Mutation, run_mutations

ADMISSION = "gateway/requests/admission.py"
ADMISSION_TESTS = "tests/gateway/requests/test_admission.py"
USAGE = "gateway/requests/key_usage.py"
BUCKET = "gateway/requests/token_bucket.py"
BUCKET_TESTS = "tests/gateway/requests/test_token_bucket.py"
CALLER = "gateway/requests/caller.py"
CALLER_TESTS = "tests/gateway/requests/test_caller.py"
PLACES = "gateway/requests/place_queue.py"
PLACES_TESTS = "tests/gateway/requests/test_places.py"
RUNNER = "gateway/requests/runner.py"
COUNTS_TESTS = "tests/gateway/requests/test_quota_counts.py"
TURNS = "kvrelay/core/fair_turns.py"
TURNS_TESTS = "tests/core/test_fair_turns.py"
FAIR = "decode_worker/scheduling/fair_admission.py"
FAIR_TESTS = "tests/decode_worker/scheduling/test_fair_admission.py"
REPORTED_TESTS = "tests/gateway/requests/test_reported_usage.py"
PREFILL_TESTS = "tests/prefill_worker/scheduling"
HOLDINGS = "decode_worker/scheduling/share_holdings.py"

GATEWAY = (
    Mutation(
        "there is a place for everybody",
        ADMISSION,
        "        if self._num_running >= self._bounds.max_running_requests:",
        "        if False:",
        f"{ADMISSION_TESTS}::test_requests_beyond_the_bound_are_refused_until_one_ends",
    ),
    Mutation(
        "a freed place is given to all who wait",
        ADMISSION,
        "        while self._num_running < self._bounds.max_running_requests:",
        "        while True:",
        f"{ADMISSION_TESTS}::test_freed_places_go_to_tenants_in_turn_whoever_came_first",
    ),
    Mutation(
        "a place that was given back is lost",
        ADMISSION,
        "            self._leave_place(waiting.caller)\n            self._give_places(now)",
        "            self._leave_place(waiting.caller)",
        f"{ADMISSION_TESTS}::test_a_place_that_its_waiter_gives_back_goes_to_the_next",
    ),
    Mutation(
        "limits of a key are not looked at",
        ADMISSION,
        "        self.usage_of(caller, now).check_new(self._mean_run_s, now)\n        if",
        "        if",
        f"{ADMISSION_TESTS}::test_a_key_runs_no_more_requests_than_it_may_and_others_are_served",
    ),
    Mutation(
        "who waits gets more than its key may have",
        ADMISSION,
        "        except QuotaError:\n            return False",
        "        except QuotaError:\n            return True",
        f"{ADMISSION_TESTS}::test_a_waiter_whose_key_has_all_that_it_may_lets_others_pass",
    ),
    Mutation(
        "prompt tokens of a key are not counted",
        ADMISSION,
        "        usage.check_prompt(num_tokens, self._mean_queue_s)\n",
        "",
        f"{ADMISSION_TESTS}::test_a_key_queues_no_more_prompt_tokens_than_it_may",
    ),
    Mutation(
        "prompt tokens of all are not counted",
        ADMISSION,
        "        if num_keys == 1 or usage.num_queued_tokens + num_tokens > bound // num_keys:",
        "        if False:",
        f"{ADMISSION_TESTS}::test_prompt_tokens_count_until_the_first_token",
    ),
    Mutation(
        "one key's prompts keep all others out",
        ADMISSION,
        "        if num_keys == 1 or usage.num_queued_tokens + num_tokens > bound // num_keys:",
        "        if True:",
        f"{ADMISSION_TESTS}::test_prompts_of_one_key_do_not_keep_small_prompts_of_another_out",
    ),
    Mutation(
        "a key has more than its part of the prompt tokens",
        ADMISSION,
        "        if num_keys == 1 or usage.num_queued_tokens + num_tokens > bound // num_keys:",
        "        if num_keys == 1:",
        f"{ADMISSION_TESTS}::test_prompts_of_one_key_do_not_keep_small_prompts_of_another_out",
    ),
    Mutation(
        "keys are kept for ever",
        ADMISSION,
        "            if len(self._keys) >= MAX_KEYS_KEPT:",
        "            if False:",
        f"{ADMISSION_TESTS}::test_keys_that_are_at_rest_are_forgotten_and_others_keep_what_they_took",
    ),
    Mutation(
        "a busy key is forgotten, and its debts",
        ADMISSION,
        "self._keys.items() if not usage.is_at_rest(now)}\n            usage =",
        "self._keys.items() if not usage}\n            usage =",
        f"{ADMISSION_TESTS}::test_keys_that_are_at_rest_are_forgotten_and_others_keep_what_they_took",
    ),
    Mutation(
        "a request that ended keeps its key's place",
        ADMISSION,
        "        self._running = False\n        self._usage.num_running -= 1\n",
        "        self._running = False\n",
        f"{ADMISSION_TESTS}::test_a_key_runs_no_more_requests_than_it_may_and_others_are_served",
    ),
    Mutation(
        "a request that was not prepared keeps its place",
        "gateway/requests/starter.py",
        "            if not place.is_started:\n                place.release(time.monotonic())",
        "            pass",
        f"{PLACES_TESTS}::test_a_request_that_cannot_be_prepared_gives_its_place_back",
    ),
    Mutation(
        "a place is waited for without end",
        "gateway/requests/starter.py",
        "asyncio.timeout_at(min(loop.time() + self._quotas.place_wait_ms / 1000, deadline))",
        "asyncio.timeout_at(deadline)",
        f"{PLACES_TESTS}::test_a_wait_for_a_place_ends_with_a_refusal_that_says_when_to_retry",
        60,
    ),
    Mutation(
        "who hung up keeps its turn",
        "gateway/requests/starter.py",
        "        except BaseException:\n            self._admission.withdraw(waiting, time.monotonic())\n            raise",
        "        except BaseException:\n            raise",
        f"{PLACES_TESTS}::test_a_client_that_hangs_up_while_it_waits_leaves_the_queue",
        60,
    ),
)

KEYS = (
    Mutation(
        "a key runs any number of requests",
        USAGE,
        "        if limits.running_requests is not None and num_running >= limits.running_requests:",
        "        if False:",
        f"{ADMISSION_TESTS}::test_a_key_runs_no_more_requests_than_it_may_and_others_are_served",
    ),
    Mutation(
        "a key gets any number of output tokens",
        USAGE,
        "        if self._output is not None and (wait_s := self._output.seconds_until(1, now)):",
        "        if wait_s := 0.0:",
        f"{ADMISSION_TESTS}::test_a_key_over_its_output_tokens_starts_nothing_until_they_are_refilled",
    ),
    Mutation(
        "a key stores any number of bytes",
        USAGE,
        "        if limits.stored_bytes is not None and num_bytes >= limits.stored_bytes:",
        "        if False:",
        f"{ADMISSION_TESTS}::test_a_keys_bytes_count_until_redis_has_dropped_them",
    ),
    Mutation(
        "bytes count for ever",
        USAGE,
        "            self._stored_bytes -= self._expiring.popleft()[1]",
        "            self._expiring.popleft()",
        f"{ADMISSION_TESTS}::test_a_keys_bytes_count_until_redis_has_dropped_them",
    ),
    Mutation(
        "a key queues any number of prompt tokens",
        USAGE,
        "        if limit is not None and num_queued and num_queued + num_tokens > limit:",
        "        if False:",
        f"{ADMISSION_TESTS}::test_a_key_queues_no_more_prompt_tokens_than_it_may",
    ),
    Mutation(
        "a key has any number of formats compiled",
        USAGE,
        "        if wait_s := self._formats.seconds_until(1, now):",
        "        if wait_s := 0.0:",
        f"{ADMISSION_TESTS}::test_a_key_has_no_more_response_formats_compiled_than_it_may",
    ),
    Mutation(
        "a format costs nothing",
        USAGE,
        "        self._formats.take()\n",
        "",
        f"{ADMISSION_TESTS}::test_a_key_has_no_more_response_formats_compiled_than_it_may",
    ),
    Mutation(
        "a key leaves any number of requests alone",
        USAGE,
        "        if limit is not None and num_unattended >= limit:",
        "        if False:",
        f"{ADMISSION_TESTS}::test_a_key_leaves_no_more_requests_without_a_client_than_it_may",
    ),
    Mutation(
        "another limit forgives the debt",
        USAGE,
        "    bucket.set_rate(per_minute, now)\n    return bucket",
        "    return TokenBucket(per_minute, now)",
        f"{ADMISSION_TESTS}::test_a_changed_limit_forgives_no_debt",
    ),
    Mutation(
        "a key saves up for hours",
        BUCKET,
        "        self._level = min(self._level + added, float(self._per_minute))",
        "        self._level += added",
        f"{BUCKET_TESTS}::test_a_rest_of_hours_saves_up_a_minute_only",
    ),
    Mutation(
        "another rate keeps what the old one had",
        BUCKET,
        "        self._level = min(self._level, float(per_minute))\n",
        "",
        f"{BUCKET_TESTS}::test_another_rate_keeps_the_debt_and_gives_nothing",
    ),
    Mutation(
        "a key without limits has all places",
        CALLER,
        "_first(own.running_requests, quotas.key_running_requests, half_of_places)",
        "_first(own.running_requests, quotas.key_running_requests)",
        f"{PLACES_TESTS}::test_a_key_gets_half_of_the_places_and_is_refused_by_name",
    ),
    Mutation(
        "a key without limits has all prompt tokens",
        CALLER,
        "_first(own.queued_prompt_tokens, quotas.key_queued_prompt_tokens, half_of_tokens)",
        "_first(own.queued_prompt_tokens, quotas.key_queued_prompt_tokens)",
        f"{CALLER_TESTS}::test_a_key_without_limits_has_at_most_half_of_the_gateway_and_a_bound_of_each_other_kind",
    ),
    Mutation(
        "settings bound no stored bytes",
        CALLER,
        "_first(own.stored_bytes, quotas.key_stored_bytes)",
        "own.stored_bytes",
        f"{CALLER_TESTS}::test_settings_bound_every_key_and_its_own_entry_goes_before",
    ),
    Mutation(
        "local callers leave any number of requests alone",
        CALLER,
        "limits=Limits(unattended_requests=unattended)",
        "limits=Limits()",
        f"{CALLER_TESTS}::test_callers_without_credentials_share_one_bound_on_requests_without_a_client",
    ),
    Mutation(
        "output tokens are not counted",
        RUNNER,
        "        self._admitted.count_output_token()\n",
        "",
        f"{COUNTS_TESTS}::test_each_output_token_counts",
    ),
    Mutation(
        "nobody counts requests without a client",
        RUNNER,
        "                self._admitted.set_unattended(True)",
        "                pass",
        f"{COUNTS_TESTS}::test_a_request_that_its_client_has_left_counts_until_one_is_back",
    ),
    Mutation(
        "a client that is back still counts as gone",
        RUNNER,
        "        self._admitted.set_unattended(False)\n",
        "",
        f"{COUNTS_TESTS}::test_a_request_that_its_client_has_left_counts_until_one_is_back",
    ),
    Mutation(
        "what the store keeps costs nothing",
        RUNNER,
        "            self._admitted.set_stored_bytes(SUMMARY_BYTES + num_kept)",
        "            self._admitted.set_stored_bytes(0)",
        f"{COUNTS_TESTS}::test_what_the_store_keeps_of_an_ended_request_counts_on",
    ),
)

ELSEWHERE = (
    Mutation(
        "requests at another gateway do not count",
        USAGE,
        "num_running = self.num_running + self.elsewhere.num_running",
        "num_running = self.num_running",
        f"{REPORTED_TESTS}::test_requests_in_progress_count_at_both",
    ),
    Mutation(
        "bytes of another gateway do not count",
        USAGE,
        "num_bytes = self._stored_bytes + self.elsewhere.stored_bytes",
        "num_bytes = self._stored_bytes",
        f"{REPORTED_TESTS}::test_waiting_prompt_tokens_and_bytes_and_unattended_requests_count_at_both",
    ),
    Mutation(
        "output tokens of another gateway do not count",
        USAGE,
        "            self._output.take(num_output_tokens)\n",
        "            pass\n",
        f"{REPORTED_TESTS}::test_output_tokens_of_a_minute_are_one_budget",
    ),
    Mutation(
        "who fills a worker's queue keeps others out",
        "kvrelay/core/fair_waiting.py",
        "    if most <= num_waiting[newcomer.holder] + 1:",
        "    if True:",
        "tests/core/test_fair_waiting.py"
        "::test_the_youngest_of_the_greediest_gives_way_and_equals_never_push_each_other_out",
    ),
)

SHARES = (
    Mutation(
        "any number waits for a place",
        PLACES,
        "        if self._num_waiting >= self._max_waiting:",
        "        if False:",
        f"{ADMISSION_TESTS}::test_the_queue_is_bounded_and_its_longest_part_gives_way",
    ),
    Mutation(
        "who fills the queue keeps others out",
        PLACES,
        "            if longest is None or len(longest) <= num_own + 1:",
        "            if True:",
        f"{ADMISSION_TESTS}::test_the_queue_is_bounded_and_its_longest_part_gives_way",
    ),
    Mutation(
        "places are given by who came first",
        PLACES,
        "                    self._turns.charge(share, 1, waiting.caller.limits.weight)\n",
        "",
        f"{ADMISSION_TESTS}::test_freed_places_go_to_tenants_in_turn_whoever_came_first",
    ),
    Mutation(
        "weights of tenants do not count",
        PLACES,
        "self._turns.charge(share, 1, waiting.caller.limits.weight)",
        "self._turns.charge(share, 1)",
        f"{ADMISSION_TESTS}::test_tenants_get_places_by_their_weights",
    ),
    Mutation(
        "who comes late claims what was before",
        TURNS,
        "max(self._left.pop(share, 0.0), self._served_tag)",
        "self._left.pop(share, 0.0)",
        f"{TURNS_TESTS}::test_a_share_that_comes_late_is_next_and_claims_nothing_for_before",
    ),
    Mutation(
        "who leaves and comes back is new",
        TURNS,
        "            self._left[share] = tag\n",
        "",
        f"{TURNS_TESTS}::test_a_share_that_leaves_and_comes_back_at_once_gains_nothing",
    ),
    Mutation(
        "shares that left are kept for ever",
        TURNS,
        "            if len(self._left) > MAX_SHARES_KEPT:",
        "            if False:",
        f"{TURNS_TESTS}::test_what_is_kept_of_shares_that_left_is_bounded",
    ),
    Mutation(
        "a decode worker serves who came first",
        FAIR,
        "key=lambda each: (holdings.of(each), self._age_of_next(each)))",
        "key=self._age_of_next)",
        f"{FAIR_TESTS}::test_freed_room_goes_to_the_share_that_holds_less_though_another_waits_longer",
    ),
    Mutation(
        "who holds all of a worker keeps it",
        FAIR,
        "        if isolated is not None or not self._make_room(job, need, holdings):",
        "        if True:",
        f"{FAIR_TESTS}::test_a_share_that_holds_less_takes_a_slot_from_the_one_with_the_most",
    ),
    Mutation(
        "a share takes from those that hold less",
        FAIR,
        "            if holdings.with_more(giver, -given[0], -given[1]) < wanted:",
        "            if False:",
        f"{FAIR_TESTS}::test_a_share_that_holds_less_takes_a_slot_from_the_one_with_the_most",
    ),
    Mutation(
        "reservations take a whole worker",
        FAIR,
        "        if self._seen_shares.are_several and not holdings.leaves_room(job.spec.share, *need):",
        "        if False:",
        f"{FAIR_TESTS}::test_reservations_of_one_share_leave_a_quarter_to_others",
    ),
    Mutation(
        "those that go on take what the poorest waits for",
        FAIR,
        "            if held == 0 or holdings.with_more(share, *need) <= holdings.most_of_others(share):",
        "            if False:",
        f"{FAIR_TESTS}::test_nobody_passes_a_share_that_holds_nothing_and_needs_much",
    ),
    Mutation(
        "weights do not count at a worker",
        HOLDINGS,
        " / self._weights.get(share, 1)",
        "",
        f"{FAIR_TESTS}::test_a_heavier_share_keeps_more_of_a_full_worker",
    ),
    Mutation(
        "only slots are shared, not blocks",
        HOLDINGS,
        "        return max(num_slots / self._max_sequences, num_blocks / self._num_blocks)",
        "        return num_slots / self._max_sequences",
        f"{FAIR_TESTS}::test_a_share_of_many_blocks_holds_more_than_one_of_many_slots",
    ),
    Mutation(
        "one share's prompts take all of a step",
        "decode_worker/scheduling/prompt_turns.py",
        "key=lambda each: (self._turns.tag(each), by_share[each][0].num_uncomputed_tokens))",
        "key=list(by_share).index)",
        f"{FAIR_TESTS}::test_prompts_of_shares_take_turns_in_a_steps_prompt_tokens",
    ),
    Mutation(
        "weights do not count in a step's prompt tokens",
        "decode_worker/scheduling/prompt_turns.py",
        "self._turns.charge(share, given[prompt], prompt.job.share_weight)",
        "self._turns.charge(share, given[prompt])",
        f"{FAIR_TESTS}::test_prompts_of_shares_take_turns_in_a_steps_prompt_tokens",
    ),
)

PREFILL = (
    Mutation(
        "any number of prompts waits",
        "prefill_worker/scheduling/scheduler.py",
        "        if len(waiting) < self._limits.max_waiting_works:",
        "        if True:",
        f"{PREFILL_TESTS}/test_scheduler.py::test_too_long_prompts_and_too_long_queues_are_refused",
    ),
    Mutation(
        "one share's prompts hold a whole prefill worker",
        "prefill_worker/scheduling/scheduler.py",
        "            if num_held + num_needed > self._blocks.num_blocks * (1 - KEPT_FOR_OTHERS):",
        "            if False:",
        f"{PREFILL_TESTS}/test_scheduler.py::test_prompts_of_one_share_leave_a_quarter_of_the_pool_to_others",
    ),
    Mutation(
        "prompts of all shares stand in one queue",
        "prefill_worker/scheduling/prompt_queue.py",
        "ranked if len(self._num_of_share) <= 1 else self._in_turns(ranked)",
        "ranked",
        f"{PREFILL_TESTS}/test_prompt_queue.py"
        "::test_many_aged_prompts_of_one_share_do_not_go_before_a_short_one_of_another",
    ),
    Mutation(
        "weights do not count at a prefill worker",
        "prefill_worker/scheduling/prompt_queue.py",
        "self._turns.charge(prompt.share, num_tokens, prompt.share_weight)",
        "self._turns.charge(prompt.share, num_tokens)",
        f"{PREFILL_TESTS}/test_prompt_queue.py::test_shares_get_tokens_by_their_weights",
    ),
    Mutation(
        "a worker's inbox takes any number of jobs",
        "kvrelay/worker/engine_thread.py",
        "            if len(self._commands) >= self._max_commands:",
        "            if False:",
        "tests/worker/test_engine_thread.py::test_a_full_inbox_refuses_new_jobs_and_takes_everything_else",
    ),
)

MUTATIONS = (*GATEWAY, *KEYS, *ELSEWHERE, *SHARES, *PREFILL)

if __name__ == "__main__":
    sys.exit(run_mutations(MUTATIONS))
