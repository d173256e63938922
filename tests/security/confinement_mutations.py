"""`python -m tests.security.confinement_mutations`: sets free what strangers wrote.

That is response formats, chat templates and cached kernels, in a copy of the sources, where a test
has to fail. `-O` does so without asserts.
"""

import sys

from tests.support.mutations import Mutation, run_mutations

MAIN = "kvrelay/runtime/confined_main.py"
CHILD = "kvrelay/runtime/confined_child.py"
POOL = "kvrelay/runtime/confined_pool.py"
POOL_TESTS = "tests/runtime/test_confined_pool.py"
COMPILER = "kvrelay/structured_output/grammar_compiler.py"
COMPILER_TESTS = "tests/structured_output/test_grammar_compiler.py"
CHECKS = "kvrelay/structured_output/format_checks.py"
FORMATS_TESTS = "tests/gateway/requests/test_response_formats.py"
TEMPLATE = "gateway/text/chat_template.py"
TEMPLATE_TESTS = "tests/gateway/text/test_tokenizer.py"
RENDERER = "gateway/text/chat_renderer.py"
RENDERER_TESTS = "tests/gateway/text/test_chat_renderer.py"
BUILD = "kvrelay/engine/native/build.py"
LIBRARY = "kvrelay/engine/native/library.py"
BUILD_TESTS = "tests/engine/test_kernel_build.py"
CACHE = "kvrelay/runtime/cache_folder.py"
CACHE_TESTS = "tests/runtime/test_cache_folder.py"
HANG_S = 60

CHILDREN = (
    Mutation(
        "a child takes any memory",
        MAIN,
        "        _limit(resource.RLIMIT_AS, base + limits.memory_bytes + STACK_BYTES)",
        "        pass",
        f"{POOL_TESTS}::test_a_request_over_a_limit_ends_its_child_and_no_other_request",
    ),
    Mutation(
        "a child takes any processor time",
        MAIN,
        "    signal.setitimer(signal.ITIMER_PROF, cpu_ms / 1000)",
        "    signal.setitimer(signal.ITIMER_PROF, 0)",
        f"{POOL_TESTS}::test_processor_time_ends_a_request_whatever_the_clock_allows",
        HANG_S,
    ),
    Mutation(
        "a child takes any time",
        CHILD,
        "            async with own_time_limit(self._confinement.wall_ms / 1000):",
        "            async with own_time_limit(3600.0):",
        f"{POOL_TESTS}::test_a_request_that_uses_no_processor_time_ends_by_the_clock",
        HANG_S,
    ),
    Mutation(
        "an answer has any length",
        CHILD,
        "                if num_bytes > max_answer_bytes:",
        "                if False:",
        f"{POOL_TESTS}::test_a_request_over_a_limit_ends_its_child_and_no_other_request",
    ),
    Mutation(
        "a child over its limit lives on",
        CHILD,
        "            if not is_done:\n                self.kill()",
        "            pass",
        f"{POOL_TESTS}::test_a_request_over_a_limit_ends_its_child_and_no_other_request",
    ),
    Mutation(
        "a child keeps memory until it has all",
        MAIN,
        "        is_last = _address_space_bytes() > kept_bytes",
        "        is_last = False",
        f"{POOL_TESTS}::test_a_child_that_keeps_memory_is_replaced_before_it_reaches_its_limit",
    ),
    Mutation(
        "a child writes files",
        MAIN,
        "    _limit(resource.RLIMIT_FSIZE, 0)\n",
        "",
        f"{POOL_TESTS}::test_a_child_cannot_write_files_dump_its_memory_or_raise_its_limits",
    ),
    Mutation(
        "a child dumps its memory",
        MAIN,
        "    _limit(resource.RLIMIT_CORE, 0)\n",
        "",
        f"{POOL_TESTS}::test_a_child_cannot_write_files_dump_its_memory_or_raise_its_limits",
    ),
    Mutation(
        "a child opens any number of files",
        MAIN,
        "    _limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)\n",
        "",
        f"{POOL_TESTS}::test_a_child_cannot_write_files_dump_its_memory_or_raise_its_limits",
    ),
    Mutation(
        "a child raises its limits",
        MAIN,
        "    resource.setrlimit(kind, (value, value))",
        "    resource.setrlimit(kind, (value, hard))",
        f"{POOL_TESTS}::test_a_child_cannot_write_files_dump_its_memory_or_raise_its_limits",
    ),
    Mutation(
        "a child has the parent's outputs",
        MAIN,
        "        for output in (0, 1, 2):",
        "        for output in ():",
        f"{POOL_TESTS}::test_a_child_inherits_nothing_of_its_parent",
    ),
    Mutation(
        "a child has the parent's variables",
        CHILD,
        "            env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},",
        "            env=None,",
        f"{POOL_TESTS}::test_a_child_inherits_nothing_of_its_parent",
    ),
    Mutation(
        "a child reads the user's packages",
        CHILD,
        "*map(str, numbers), is_isolated=True)",
        "*map(str, numbers))",
        f"{POOL_TESTS}::test_a_child_inherits_nothing_of_its_parent",
    ),
    Mutation(
        "a child runs before others' work",
        MAIN,
        "    os.nice(limits.niceness)\n",
        "",
        f"{POOL_TESTS}::test_a_child_inherits_nothing_of_its_parent",
    ),
    Mutation(
        "a child outlives its parent",
        CHILD,
        "        return [*dying_with_this_process(), *main]",
        "        return main",
        f"{POOL_TESTS}::test_children_die_with_their_parent",
    ),
    Mutation(
        "there is any number of children",
        POOL,
        "        self._turns = asyncio.Semaphore(num_children)",
        "        self._turns = asyncio.Semaphore(1000)",
        f"{POOL_TESTS}::test_no_more_wait_before_the_children_than_may",
    ),
    Mutation(
        "any number waits for a child",
        POOL,
        "        if self._turns.locked() and self._num_waiting >= self._max_waiting:",
        "        if False:",
        f"{POOL_TESTS}::test_no_more_wait_before_the_children_than_may",
        HANG_S,
    ),
    Mutation(
        "a child is waited for",
        POOL,
        "            async with asyncio.timeout(self._max_wait_s):",
        "            async with asyncio.timeout(None):",
        f"{POOL_TESTS}::test_none_waits_for_a_child_longer_than_it_may",
        HANG_S,
    ),
)

FORMATS = (
    Mutation(
        "a gateway checks no format",
        "gateway/requests/response_formats.py",
        "                await self.checks.check(response_format)",
        "                pass",
        "tests/gateway/api/test_confined_work.py"
        "::test_a_bomb_is_refused_by_name_while_another_callers_format_is_served",
    ),
    Mutation(
        "formats cost a key nothing",
        "gateway/requests/response_formats.py",
        "                    self._take_format()",
        "                    pass",
        f"{FORMATS_TESTS}::test_a_key_pays_for_formats_that_are_new_and_none_is_checked_without",
    ),
    Mutation(
        "a worker compiles what no child has compiled",
        COMPILER,
        "        num_bytes = await self._check(response_format)\n",
        "        num_bytes = 0\n",
        f"{COMPILER_TESTS}::test_no_thread_begins_with_a_format_that_its_check_refuses",
    ),
    Mutation(
        "any number of formats is compiled at once",
        COMPILER,
        "        self._turns = asyncio.Semaphore(num_threads)",
        "        self._turns = asyncio.Semaphore(1000)",
        f"{COMPILER_TESTS}::test_few_are_compiled_at_a_time",
        60,
    ),
    Mutation(
        "any number of formats waits",
        COMPILER,
        " and self._results.num_running >= self._max_waiting:",
        " and False:",
        f"{COMPILER_TESTS}::test_too_many_that_wait_are_refused_and_told_to_come_again",
        60,
    ),
    Mutation(
        "a compile takes any time",
        COMPILER,
        "        deadline = loop.time() + self._timeout_ms / 1000",
        "        deadline = loop.time() + 3600",
        f"{COMPILER_TESTS}::test_a_form_that_takes_too_long_is_refused_and_keeps_its_place_until_its_thread_has_ended",
        60,
    ),
    Mutation(
        "a refused format burns again",
        CHECKS,
        "            self._find_verdict, max_kept,",
        "            self._find_verdict, 0 * max_kept,",
        "tests/security/test_formats_bounded.py::test_a_bomb_that_comes_again_costs_nothing_more",
    ),
    Mutation(
        "a slow format delays quick ones",
        CHECKS,
        "QUICK = Confinement(_MODULE, QUICK_CPU_MS,",
        "QUICK = Confinement(_MODULE, 10 * CPU_MS,",
        "tests/security/test_formats_bounded.py::test_bombs_end_with_their_children_while_others_formats_are_served",
    ),
    Mutation(
        "patterns and names are compared one by one",
        "kvrelay/structured_output/json_schema.py",
        "    if len(texts) * len(given) > MAX_PATTERN_CHECKS:",
        "    if False:",
        "tests/structured_output/test_json_schema.py"
        "::test_patterns_and_names_beyond_count_are_refused_before_they_are_compared",
    ),
)

TEMPLATES = (
    Mutation(
        "a template has any size",
        RENDERER,
        "        if len(template.source) > MAX_TEMPLATE_BYTES:",
        "        if False:",
        f"{RENDERER_TESTS}::test_a_template_that_does_not_compile_is_known_after_one_try[size]",
    ),
    Mutation(
        "a template says any amount of text",
        "gateway/text/template_child.py",
        '    if len(text) > asked["max_characters"]:',
        "    if False:",
        f"{RENDERER_TESTS}::test_a_template_that_says_far_more_than_the_chat_is_refused",
    ),
    Mutation(
        "chats are rendered by the gateway itself",
        RENDERER,
        "        answer = await self.pool.ask(json.dumps(asked).encode(),"
        " 1 + MAX_BYTES_PER_CHARACTER * max_characters)",
        "        from gateway.text.template_child import answer as render\n\n"
        "        answer = render(json.dumps(asked).encode())",
        "tests/gateway/api/test_confined_work.py::test_chats_are_rendered_by_a_child",
    ),
    Mutation(
        "a chat is rendered after its deadline",
        RENDERER,
        "            async with asyncio.timeout_at(deadline):",
        "            async with asyncio.timeout_at(None):",
        f"{RENDERER_TESTS}::test_a_chat_is_rendered_by_its_deadline_or_not_at_all",
    ),
    Mutation(
        "a template changes what it is given",
        TEMPLATE,
        "class _BudgetedEnvironment(ImmutableSandboxedEnvironment):",
        "class _BudgetedEnvironment(ImmutableSandboxedEnvironment.__base__):",
        f"{TEMPLATE_TESTS}::test_a_template_cannot_leave_the_sandbox",
    ),
    Mutation(
        "a template reaches Python's own names",
        TEMPLATE,
        "class _BudgetedEnvironment(ImmutableSandboxedEnvironment):",
        "class _BudgetedEnvironment(ImmutableSandboxedEnvironment.__base__.__base__):",
        f"{TEMPLATE_TESTS}::test_a_template_cannot_leave_the_sandbox",
    ),
    Mutation(
        "a namespace takes hidden names",
        TEMPLATE,
        '    if isinstance(name, str) and name.startswith("_"):',
        "    if False:",
        f"{TEMPLATE_TESTS}::test_a_template_cannot_leave_the_sandbox",
    ),
    Mutation(
        "loops are not counted",
        TEMPLATE,
        "        budget.spend()\n",
        "",
        f"{TEMPLATE_TESTS}::test_an_endless_template_is_stopped[loops]",
        HANG_S,
    ),
    Mutation(
        "calls are not counted",
        TEMPLATE,
        "        __context[_BUDGET].spend(_STEPS_PER_CALL)\n",
        "",
        f"{TEMPLATE_TESTS}::test_an_endless_template_is_stopped[calls]",
        HANG_S,
    ),
    Mutation(
        "a template computes large numbers",
        TEMPLATE,
        "        if _is_too_large(operator, left, right):",
        "        if False:",
        f"{TEMPLATE_TESTS}::test_a_template_multiplies_nothing_large[{{% set x = 9 ** 999 %}}{{{{ x * x * x * x }}}}]",
    ),
    Mutation(
        "a template writes words of its own",
        TEMPLATE,
        '        del environment.globals["lipsum"]  # writes any amount of text in one step\n',
        "",
        f"{TEMPLATE_TESTS}::test_a_template_has_no_words_of_its_own",
    ),
)

FILES = (
    Mutation(
        "kernels of anybody are loaded",
        BUILD,
        "if target.is_file() and is_private(target.parent) and is_private(target):",
        "if target.is_file() and is_private(target.parent):",
        f"{BUILD_TESTS}::test_a_library_that_others_could_have_put_there_is_not_loaded",
    ),
    Mutation(
        "kernels are loaded from anybody's folder",
        BUILD,
        "if target.is_file() and is_private(target.parent) and is_private(target):",
        "if target.is_file() and is_private(target):",
        f"{BUILD_TESTS}::test_a_library_in_a_folder_where_others_could_write_is_made_anew",
    ),
    Mutation(
        "kernels are compiled into anybody's folder",
        BUILD,
        "        if not make_private(folder):",
        "        if False:",
        f"{BUILD_TESTS}::test_a_folder_of_another_user_is_left_alone",
    ),
    Mutation(
        "what is loaded is not looked at",
        LIBRARY,
        "        if not is_own(os.fstat(descriptor)):",
        "        if False:",
        f"{BUILD_TESTS}::test_what_others_may_write_to_is_not_loaded_at_the_last_moment_either",
    ),
    Mutation(
        "a link is loaded",
        LIBRARY,
        "os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC",
        "os.O_RDONLY | os.O_CLOEXEC",
        f"{BUILD_TESTS}::test_a_link_is_not_loaded_whoever_owns_what_it_leads_to",
    ),
    Mutation(
        "what is loaded has been replaced",
        LIBRARY,
        "        return ctypes.CDLL(str(opened if opened.exists() else path))",
        "        return ctypes.CDLL(str(path))",
        f"{BUILD_TESTS}::test_the_file_that_was_looked_at_is_the_one_that_is_loaded",
    ),
    Mutation(
        "another user's file is private",
        CACHE,
        "return status.st_uid in (0, os.getuid()) and not status.st_mode & _WRITTEN_BY_OTHERS",
        "return not status.st_mode & _WRITTEN_BY_OTHERS",
        f"{CACHE_TESTS}::test_what_belongs_to_another_user_is_not_private",
    ),
    Mutation(
        "a file that others write is private",
        CACHE,
        "return status.st_uid in (0, os.getuid()) and not status.st_mode & _WRITTEN_BY_OTHERS",
        "return status.st_uid in (0, os.getuid())",
        f"{CACHE_TESTS}::test_what_others_may_write_to_is_not_private",
    ),
    Mutation(
        "a link is as private as what it leads to",
        CACHE,
        "        status = path.lstat()",
        "        status = path.stat()",
        f"{CACHE_TESTS}::test_links_are_not_followed",
    ),
    Mutation(
        "anybody's folder is the cache",
        CACHE,
        "        if not make_private(fallback):",
        "        if False:",
        f"{CACHE_TESTS}::test_a_folder_that_others_may_write_to_is_not_used",
    ),
)

MUTATIONS = (*CHILDREN, *FORMATS, *TEMPLATES, *FILES)

if __name__ == "__main__":
    sys.exit(run_mutations(MUTATIONS))
