"""Grammars of structured output, by llguidance: which tokens may come next in a sequence.

    ResponseFormat --check_response_format--> is it one?               gateways
                   --TokenVocabulary.compile--> CompiledGrammar        workers
                        --matcher--> GrammarMatcher, one per sequence

Check and compile on a large stack: llguidance recurses as deep as a grammar's rules.
"""

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from kvrelay.core.response_format import FormatKind, ResponseFormat
from kvrelay.errors import InvalidRequestError, PreconditionError
from kvrelay.runtime.large_stack import call_with_large_stack
from kvrelay.structured_output.grammar_definition import NO_WAY_ON, define, problem_of, refusal, refusing
from kvrelay.structured_output.grammar_limits import NUM_BYTES, byte_tokens, parser_limits

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

SLOW_MASK_S = 0.003
"""Processor time. Slower masks are computed beside the engine thread."""
NUM_MASKS_UNTIL_FAST = 16
"""After a slow mask, a grammar counts as slow until this many fast ones."""
MAX_MASKS_S = 0.5
"""Processor time. A sequence that needs more in one step is refused."""
MAX_PREFIXES_AHEAD = 100
NO_TOKEN_FOLLOWS = "leaves no token that could follow"
MAX_NAMED_TOKENS = 256
ANY_TOKEN = "<|any|>"
_TOKEN_IDS = re.compile(r"<\[[^<>\s]*\]>")
"""Such as `<[100-200]>`."""
_TOKEN_NAMES = re.compile(r"<[^<>\s]+>")
"""Such as `<|end|>` or `<think>`. Quoted text may match too."""


def check_response_format(response_format: ResponseFormat) -> "CompiledGrammar":
    """Compiles over a vocabulary of bytes and looks ahead. Call it where it can be stopped.

    Raises:
        InvalidRequestError: it is wrong, too complex, matches nothing, or is not supported.
    """
    grammar = compile_over_bytes(response_format)
    _look_ahead(grammar)
    return grammar


def _look_ahead(grammar: "CompiledGrammar") -> None:
    """Follows the shortest prefixes. Raises InvalidRequestError at a dead end."""
    ways: deque[tuple[int, ...]] = deque([()])
    for _ in range(MAX_PREFIXES_AHEAD):
        if not ways or grammar.is_slow:
            return
        way = ways.popleft()
        try:
            (mask,) = grammar.matcher().masks(way, (), (NUM_BYTES,))
        except _DeadEndError:
            raise
        except InvalidRequestError:  # too complex further on: its request will get the error
            continue
        assert mask is not None, "there are no drafts"
        if len(ways) < MAX_PREFIXES_AHEAD:
            ways.extend((*way, byte) for byte in range(NUM_BYTES) if mask[byte // 8] >> byte % 8 & 1)


def compile_over_bytes(response_format: ResponseFormat) -> "CompiledGrammar":
    """A grammar's named tokens stand for themselves: the model, which has them, is not known."""
    if response_format.kind is not FormatKind.GRAMMAR:
        return _compile(response_format, byte_tokens())
    source = _TOKEN_IDS.sub(ANY_TOKEN, response_format.source)
    names = tuple(sorted({*_TOKEN_NAMES.findall(source)}))
    if len(names) > MAX_NAMED_TOKENS:
        raise InvalidRequestError(response_format.field, f"names {len(names)} tokens; it may name {MAX_NAMED_TOKENS}")
    return _compile(ResponseFormat.grammar(source), byte_tokens(names))


class TokenVocabulary:
    """Made within a second. Thread-safe.

    Raises:
        PreconditionError: the model does not allow structured output.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        from llguidance import LLTokenizer

        if not eos_token_ids:
            raise PreconditionError(
                "the model has no end-of-sequence token, with which structured output ends; use another model"
            )
        try:
            self._tokens = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids))
        except ValueError as error:
            raise PreconditionError(
                f"the model's tokenizer does not allow structured output: {error}; use another model"
            ) from error

    def compile(self, response_format: ResponseFormat) -> "CompiledGrammar":
        return _compile(response_format, self._tokens)


def _compile(response_format: ResponseFormat, tokens: "LLTokenizer") -> "CompiledGrammar":
    definition = define(response_format)

    def new_matcher() -> "LLMatcher":
        from llguidance import LLMatcher

        with refusing(response_format):
            matcher = LLMatcher(tokens, definition, log_level=0, limits=parser_limits())
        if matcher.is_error():
            raise refusal(response_format, matcher.get_error())
        return matcher

    return CompiledGrammar(response_format, new_matcher)


class CompiledGrammar:
    """Shared by sequences of all threads. Raises InvalidRequestError if no token may come first."""

    def __init__(self, response_format: ResponseFormat, compile_matcher: "Callable[[], LLMatcher]") -> None:
        self.response_format = response_format
        self._compile_matcher = compile_matcher
        self._matcher = compile_matcher()
        self._num_masks_until_fast = 0
        self.matcher().masks((), (), ())

    @property
    def is_slow(self) -> bool:
        return self._num_masks_until_fast > 0

    def record_mask_cost(self, cost_s: float) -> None:
        if cost_s > SLOW_MASK_S:
            self._num_masks_until_fast = NUM_MASKS_UNTIL_FAST
        elif self._num_masks_until_fast > 0:
            self._num_masks_until_fast -= 1

    def matcher(self) -> "GrammarMatcher":
        return GrammarMatcher(self)

    def copy_matcher(self) -> "LLMatcher":
        return self._matcher.deep_copy()

    def renew(self) -> "LLMatcher":
        """Empties the cache of states, because its limit counts those of all sequences ever."""
        self._matcher = call_with_large_stack(self._compile_matcher, "compile of a response format")
        return self.copy_matcher()


class GrammarMatcher:
    """One sequence's place in its grammar. Used by one thread at a time."""

    def __init__(self, grammar: CompiledGrammar) -> None:
        self._grammar = grammar
        self._matcher = grammar.copy_matcher()
        self._num_consumed = 0
        self._last: tuple[int, tuple[int, ...], frozenset[int]] | None = None
        self._last_masks: list[bytes | None] = []

    @property
    def is_slow(self) -> bool:
        return self._grammar.is_slow

    def has_masks(self, num_output_tokens: int, drafts: Sequence[int], ending_token_ids: Iterable[int]) -> bool:
        """Whether `masks` would return at once."""
        return self._last == (num_output_tokens, tuple(drafts), frozenset(ending_token_ids))

    def masks(
        self, output_token_ids: Sequence[int], drafts: Sequence[int], ending_token_ids: Iterable[int]
    ) -> list[bytes | None]:
        """Which tokens may follow the output and each draft. Keeps the last result.

        Returns:
            Masks in which token t has bit `t % 8` of byte `t // 8`.
            None behind a draft that is not allowed, or ends the sequence.

        Raises:
            InvalidRequestError: the grammar is too complex, or leaves no token.
        """
        if self.has_masks(len(output_token_ids), drafts, ending_token_ids):
            return self._last_masks
        ending = frozenset(ending_token_ids)
        # This thread's own time, because a loaded machine makes no format slow.
        began_at = time.thread_time()
        try:
            masks = self._masks_or_anew(output_token_ids, drafts, ending)
        finally:
            cost_s = time.thread_time() - began_at
            self._grammar.record_mask_cost(cost_s)
        if cost_s > MAX_MASKS_S:
            raise InvalidRequestError(
                self._grammar.response_format.field,
                f"took {cost_s:.1f} s of processor time for one token; "
                "simplify the response format, above all counted repetitions",
            )
        self._last, self._last_masks = (len(output_token_ids), tuple(drafts), ending), masks
        return masks

    def _masks_or_anew(
        self, output_token_ids: Sequence[int], drafts: Sequence[int], ending: frozenset[int]
    ) -> list[bytes | None]:
        began_at = time.thread_time()
        try:
            return self._masks(output_token_ids, drafts, ending)
        except _UsedUpError as used_up:
            # All sequences of this grammar share its states; too many break it for all of them.
            if used_up.is_of_one_mask and time.thread_time() - began_at > SLOW_MASK_S:
                raise used_up.error from None
        self._matcher, self._num_consumed = self._grammar.renew(), 0
        try:
            return self._masks(output_token_ids, drafts, ending)
        except _UsedUpError as used_up:
            raise used_up.error from None

    def _masks(
        self, output_token_ids: Sequence[int], drafts: Sequence[int], ending: frozenset[int]
    ) -> list[bytes | None]:
        news = list(output_token_ids[self._num_consumed :])
        if news and not self._matcher.consume_tokens(news):
            raise self._failure("does not allow what was generated")
        self._num_consumed += len(news)
        masks: list[bytes | None] = [self._mask(ending)]
        num_tried = 0
        for draft in drafts:
            if draft in ending or self._matcher.try_consume_tokens([draft]) == 0:
                break
            num_tried += 1
            masks.append(self._mask(ending))
        if num_tried and not self._matcher.rollback(num_tried):
            raise self._failure("cannot be gone back in")
        return masks + [None] * (len(drafts) - num_tried)

    def _mask(self, ending: frozenset[int]) -> bytes:
        began_at = time.thread_time()
        mask = self._matcher.compute_bitmask()
        is_accepting = self._matcher.is_accepting()
        if not is_accepting and time.thread_time() - began_at > SLOW_MASK_S / 3:
            self._probe(mask)
        if self._matcher.is_error():
            raise self._failure(NO_TOKEN_FOLLOWS)
        if is_accepting:
            mask = _with_bits(mask, ending)
        if not any(mask):
            raise self._failure(NO_TOKEN_FOLLOWS)
        return mask

    def _probe(self, mask: bytes) -> None:
        """Makes the matcher report a mask that it gave up in the middle."""
        rest = mask.lstrip(b"\0")
        if not rest:
            return
        token_id = (len(mask) - len(rest)) * 8 + (rest[0] & -rest[0]).bit_length() - 1
        if self._matcher.try_consume_tokens([token_id]):
            self._matcher.rollback(1)

    def _failure(self, what: str) -> "InvalidRequestError | _UsedUpError":
        problem = problem_of(self._matcher.get_error()) or what
        says = f"cannot be followed any further: {problem}; simplify the response format"
        if problem in (NO_WAY_ON, NO_TOKEN_FOLLOWS):
            return _DeadEndError(self._grammar.response_format.field, says)
        error = InvalidRequestError(self._grammar.response_format.field, says)
        for limit in ("too many states", "too many expressions"):
            if limit in problem:
                return _UsedUpError(error, is_of_one_mask=limit == "too many expressions")
        return error


class _DeadEndError(InvalidRequestError):
    """No token may come, nor may the output end."""


class _UsedUpError(Exception):
    """Another sequence may have used up the limit of the shared cache."""

    def __init__(self, error: InvalidRequestError, *, is_of_one_mask: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.is_of_one_mask = is_of_one_mask


def _with_bits(mask: bytes, token_ids: frozenset[int]) -> bytes:
    changed = bytearray(mask)
    for token_id in token_ids:
        if token_id // 8 < len(changed):
            changed[token_id // 8] |= 1 << token_id % 8
    return bytes(changed)
