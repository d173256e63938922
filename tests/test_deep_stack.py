"""Functions on a deep stack: they reach further down than usual threads do, and what they raise is their caller's."""

import threading
from collections.abc import Callable

import pytest

from kvrelay.deep_stack import STACK_BYTES, call_on_deep_stack, start_on_deep_stack
from kvrelay.errors import InvalidRequestError
from kvrelay.grammar import TokenVocabulary, check_form
from kvrelay.response_format import MAX_FORMAT_BYTES, ResponseFormat
from tests.gateway.small_tokenizer import eos_token_id, make_tokenizer


def test_results_and_errors_come_back() -> None:
    assert call_on_deep_stack(lambda: threading.current_thread().name, "of a test") == "of a test"
    with pytest.raises(InvalidRequestError, match="field is wrong"):
        call_on_deep_stack(lambda: _raise(InvalidRequestError("field", "is wrong")), "of a test")


def _raise(error: Exception) -> None:
    raise error


def test_other_threads_keep_their_stacks() -> None:
    before = threading.stack_size()
    thread = start_on_deep_stack(lambda: None, "of a test")
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
    outcomes = {_outcome(form, use) for form in (chain, nested) for use in (check_form, vocabulary.compile)}
    assert outcomes <= {"compiled", "refused"}


def _outcome(form: ResponseFormat, use: Callable[[ResponseFormat], object]) -> str:
    try:
        call_on_deep_stack(lambda: use(form), "of a test")
    except InvalidRequestError:
        return "refused"
    return "compiled"
