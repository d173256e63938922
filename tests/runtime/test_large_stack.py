"""Functions on a deep stack: they reach further down than usual threads do, and what they raise is
their caller's.
"""

import threading
from collections.abc import Callable

import pytest

from kvrelay.core.response_format import MAX_FORMAT_BYTES, ResponseFormat
from kvrelay.errors import InvalidRequestError
from kvrelay.runtime.large_stack import STACK_BYTES, call_with_large_stack, start_with_large_stack
from kvrelay.structured_output.grammar import TokenVocabulary, check_response_format
from tests.support.small_tokenizer import eos_token_id, make_tokenizer


def test_results_and_errors_come_back() -> None:
    assert call_with_large_stack(lambda: threading.current_thread().name, "of a test") == "of a test"
    with pytest.raises(InvalidRequestError, match="field is wrong"):
        call_with_large_stack(lambda: _raise(InvalidRequestError("field", "is wrong")), "of a test")


def _raise(error: Exception) -> None:
    raise error


def test_other_threads_keep_their_stacks() -> None:
    before = threading.stack_size()
    thread = start_with_large_stack(lambda: None, "of a test")
    thread.join()
    assert threading.stack_size() == before != STACK_BYTES
    assert thread.daemon


def test_the_deepest_grammar_that_fits_is_compiled_or_refused_and_ends_no_process() -> None:
    """On a usual stack it ends it: by SIGSEGV, which no test would survive."""
    num_rules = MAX_FORMAT_BYTES // 16
    rules = "".join(f"r{number}: r{number + 1}\n" for number in range(num_rules))
    chain = ResponseFormat.grammar(f'start: r0\n{rules}r{num_rules}: "a"\n')
    nested = ResponseFormat.regex("(" * 30_000 + "a" + ")" * 30_000)
    tokenizer = make_tokenizer()
    vocabulary = TokenVocabulary(tokenizer.to_str(), tokenizer.get_vocab_size(), [eos_token_id(tokenizer)])
    outcomes = {
        _outcome(response_format, use)
        for response_format in (chain, nested)
        for use in (check_response_format, vocabulary.compile)
    }
    assert outcomes <= {"compiled", "refused"}


def _outcome(response_format: ResponseFormat, use: Callable[[ResponseFormat], object]) -> str:
    try:
        call_with_large_stack(lambda: use(response_format), "of a test")
    except InvalidRequestError:
        return "refused"
    return "compiled"
