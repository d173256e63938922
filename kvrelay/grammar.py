"""Grammars of structured output, by llguidance: which tokens may come next of a sequence, given those that came.

    ResponseFormat --check_form--> is it one?                                    gateways
                   --TokenVocabulary.compile--> CompiledGrammar --matcher--> GrammarMatcher, one for each sequence     workers

Needs neither torch nor transformers, and imports llguidance only when a form is met. Knows nothing of logits. llguidance recurses
as deep as a grammar's rules refer to one another: what checks and compiles must be called on a deep stack (`kvrelay.deep_stack`).
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from math import isfinite, lcm
from typing import TYPE_CHECKING, Any

from kvrelay.deep_stack import call_on_deep_stack
from kvrelay.errors import InvalidRequestError, PreconditionError
from kvrelay.response_format import FormatKind, ResponseFormat

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits

JSON_LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` writes. With any white space allowed, small models write it until they reach max_tokens."""
MAX_MULTIPLE = 10_000
"""A number is a multiple of n by an automaton of n states, which llguidance builds without looking at its limits."""
MAX_LEXER_STATES = 50_000
"""Some MB of a grammar's cache of states, which all its sequences share."""
MAX_PROBLEM_CHARACTERS = 300


def check_form(form: ResponseFormat) -> None:
    """Whether the form can be compiled, without a vocabulary: in a millisecond or so.

    Raises:
        InvalidRequestError: it is wrong, too large or uses what is not supported.
    """
    from llguidance import LLMatcher

    is_error, messages = LLMatcher.validate_grammar_with_warnings(_definition(form), limits=_limits())
    if is_error:
        raise _refusal(form, messages[0] if messages else "")


class TokenVocabulary:
    """The tokens of a model as llguidance knows them. Made within a second; its methods may be called in any thread.

    Args:
        tokenizer_json: content of the model's tokenizer.json.
        vocab_size: of the model's output layer.
        eos_token_ids: tokens that end a sequence.

    Raises:
        PreconditionError: the model cannot do it.
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

    def compile(self, form: ResponseFormat) -> "CompiledGrammar":
        """The form as a grammar over these tokens.

        Raises:
            InvalidRequestError: it is wrong, too large or uses what is not supported.
        """
        definition = _definition(form)
        return CompiledGrammar(form, lambda: self._new_matcher(form, definition))

    def _new_matcher(self, form: ResponseFormat, definition: str) -> "LLMatcher":
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens, definition, log_level=0, limits=_limits())
        if matcher.is_error():
            raise _refusal(form, matcher.get_error())
        return matcher


class CompiledGrammar:
    """A form over a model's tokens, at its beginning. Shared by all its sequences, in any thread.

    Args:
        form: for messages.
        compile_matcher: makes a matcher from nothing.
    """

    def __init__(self, form: ResponseFormat, compile_matcher: "Callable[[], LLMatcher]") -> None:
        self.form = form
        self._compile_matcher = compile_matcher
        self._matcher = compile_matcher()

    def matcher(self) -> "GrammarMatcher":
        """A sequence's way through the grammar, at its beginning: within microseconds."""
        return GrammarMatcher(self)

    def copy_matcher(self) -> "LLMatcher":
        return self._matcher.deep_copy()

    def renew(self) -> "LLMatcher":
        """A matcher that shares nothing with older ones.

        Sequences of a grammar share a cache of states. Its limit counts those of all sequences that ever were: it says nothing of
        the one that reaches it.
        """
        self._matcher = call_on_deep_stack(self._compile_matcher, "compile of a form")
        return self.copy_matcher()


class GrammarMatcher:
    """Where one sequence is in its grammar: a function of its tokens alone, which can be made anew from them at any time.

    Args:
        grammar: of its request.
    """

    def __init__(self, grammar: CompiledGrammar) -> None:
        self._grammar = grammar
        self._matcher = grammar.copy_matcher()
        self._num_consumed = 0

    def masks(
        self, output_token_ids: Sequence[int], drafts: Sequence[int], ending_token_ids: Iterable[int]
    ) -> list[bytes | None]:
        """Which tokens may follow.

        Args:
            output_token_ids: all tokens that the sequence has generated.
            drafts: guesses for what follows them.
            ending_token_ids: may also come where the output may end.

        Returns:
            For the token behind the output, and that behind each draft: bits for the vocabulary, that of token t at `t % 8` of
            byte `t // 8`. None behind a draft that must not come, or that ends the sequence: nothing follows it.

        Raises:
            InvalidRequestError: the grammar is too complex to go on, or leaves no token.
        """
        ending = frozenset(ending_token_ids)
        try:
            return self._masks(output_token_ids, drafts, ending)
        except InvalidRequestError:
            # The limit may have been reached by all sequences of this grammar together.
            self._matcher, self._num_consumed = self._grammar.renew(), 0
            return self._masks(output_token_ids, drafts, ending)

    def _masks(self, output_token_ids: Sequence[int], drafts: Sequence[int], ending: frozenset[int]) -> list[bytes | None]:
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
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise self._failure("leaves no token that could follow")
        if self._matcher.is_accepting():
            mask = _with_bits(mask, ending)
        if not any(mask):
            raise self._failure("leaves no token that could follow")
        return mask

    def _failure(self, what: str) -> InvalidRequestError:
        problem = _one_line(self._matcher.get_error()) or what
        return InvalidRequestError(self._grammar.form.field, f"cannot be followed any further: {problem}; make it simpler")


def _definition(form: ResponseFormat) -> str:
    """The form in llguidance's own terms."""
    from llguidance import LLMatcher

    match form.kind:
        case FormatKind.JSON_SCHEMA:
            _check_multiples(form)
            return LLMatcher.grammar_from_json_schema(form.source, defaults=JSON_LAYOUT)
        case FormatKind.REGEX:
            return LLMatcher.grammar_from_regex(form.source)
        case FormatKind.GRAMMAR:
            return LLMatcher.grammar_from_lark(_as_lark(form))


def _as_lark(form: ResponseFormat) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    if "%json" in form.source and re.search(r"multipleOf|\\u", form.source):
        raise InvalidRequestError(form.field, "has a schema with multipleOf or \\u in it; send it as json_schema")
    try:
        return any_to_lark(form.source)
    except Exception as error:  # the converter raises nothing narrower
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else _one_line(str(error))
        raise InvalidRequestError(
            form.field, f"is no grammar: {problem}; send Lark with a rule start, or EBNF with root ::="
        ) from None


def _check_multiples(form: ResponseFormat) -> None:
    """Multiples that allOf brings together become one of their least common multiple: so that of all is bounded."""
    multiples = [Fraction(str(value)) for value in _multiples(json.loads(form.source)) if value and isfinite(value)]
    scale = lcm(*(multiple.denominator for multiple in multiples))
    if lcm(*(abs(int(multiple * scale)) for multiple in multiples)) > MAX_MULTIPLE:
        problem = (
            f"has multipleOf whose least common multiple is above {MAX_MULTIPLE:,}; leave it away, and check numbers yourself"
        )
        raise InvalidRequestError(form.field, problem)


def _multiples(schema: object) -> Iterator[int | float]:
    left = [schema]
    while left:
        match left.pop():
            case dict() as members:
                left.extend(members.values())
                multiple = members.get("multipleOf")
                if isinstance(multiple, int | float):
                    yield multiple
            case list() as items:
                left.extend(items)


def _limits() -> "LLParserLimits":
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)


def _refusal(form: ResponseFormat, message: str) -> InvalidRequestError:
    return InvalidRequestError(form.field, f"cannot be used: {_one_line(message)}; correct it, or leave that part away")


def _one_line(message: str) -> str:
    """llguidance's messages have lines with carets, and some repeat the whole source."""
    text = " ".join(message.replace("<non-verbose/>", "").split())
    return text if len(text) <= MAX_PROBLEM_CHARACTERS else text[:MAX_PROBLEM_CHARACTERS] + "..."


def _with_bits(mask: bytes, token_ids: frozenset[int]) -> bytes:
    changed = bytearray(mask)
    for token_id in token_ids:
        if token_id // 8 < len(changed):
            changed[token_id // 8] |= 1 << token_id % 8
    return bytes(changed)
