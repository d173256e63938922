"""Grammars over a tokenizer of bytes: which tokens may come, with drafts and ends, anew from any
tokens; and what is refused.
"""

import json
from collections.abc import Iterable

import pytest

from kvrelay.core.response_format import ResponseFormat
from kvrelay.errors import InvalidRequestError, PreconditionError
from kvrelay.structured_output.grammar import CompiledGrammar, GrammarMatcher, TokenVocabulary, check_response_format
from kvrelay.structured_output.schema_source import MAX_MULTIPLE
from tests.support.small_tokenizer import eos_token_id, make_tokenizer

TOKENIZER = make_tokenizer()
VOCAB_SIZE = TOKENIZER.get_vocab_size()
EOS = eos_token_id(TOKENIZER)


@pytest.fixture(scope="module")
def vocabulary() -> TokenVocabulary:
    return TokenVocabulary(TOKENIZER.to_str(), VOCAB_SIZE, [EOS])


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text).ids)


def allowed(mask: bytes | None) -> set[int]:
    assert mask is not None
    return {token for token in range(VOCAB_SIZE) if mask[token // 8] >> token % 8 & 1}


def of(*texts: str) -> set[int]:
    return {token for text in texts for token in ids(text)}


def next_tokens(grammar: CompiledGrammar, text: str, ending: Iterable[int] = (EOS,)) -> set[int]:
    (mask,) = grammar.matcher().masks(ids(text), [], ending)
    return allowed(mask)


def test_only_what_goes_on_in_the_form_may_come_and_the_end_only_where_it_may_end(vocabulary: TokenVocabulary) -> None:
    grammar = vocabulary.compile(ResponseFormat.regex("ab+|ad"))
    assert next_tokens(grammar, "") == of("a")
    assert next_tokens(grammar, "a") == of("b", "d")
    assert next_tokens(grammar, "ab") == of("b") | {EOS}
    assert next_tokens(grammar, "ad") == {EOS}


def test_a_stop_token_may_come_where_the_end_may(vocabulary: TokenVocabulary) -> None:
    grammar = vocabulary.compile(ResponseFormat.regex("ab+"))
    stop = TOKENIZER.token_to_id("<|im_end|>")
    assert stop is not None
    assert stop not in next_tokens(grammar, "a", {EOS, stop})
    assert {EOS, stop} <= next_tokens(grammar, "ab", {EOS, stop})


def test_a_matcher_made_anew_from_tokens_allows_what_one_does_that_went_along(vocabulary: TokenVocabulary) -> None:
    """As after a recovery, or when a job goes from the prefill to the decode worker."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
    }
    grammar = vocabulary.compile(ResponseFormat.json_schema(schema))
    text = json.dumps({"a": "y", "b": True})
    along = grammar.matcher()
    for number in range(len(text) + 1):
        tokens = ids(text[:number])
        assert along.masks(tokens, [], {EOS}) == grammar.matcher().masks(tokens, [], {EOS})
    (mask,) = along.masks(ids(text), [], {EOS})
    assert EOS in allowed(mask)


def test_each_draft_that_may_come_has_a_mask_and_leaves_no_trace(vocabulary: TokenVocabulary) -> None:
    matcher = vocabulary.compile(ResponseFormat.regex("abc+")).matcher()
    masks = matcher.masks(ids("a"), ids("bcx") + ids("c"), {EOS})
    assert [None if mask is None else allowed(mask) for mask in masks] == [
        of("b"),
        of("c"),
        of("c") | {EOS},
        None,
        None,
    ]
    assert allowed(matcher.masks(ids("a"), [], {EOS})[0]) == of("b")
    assert matcher.masks(ids("abc"), [EOS, *ids("c")], {EOS})[1:] == [None, None]


def test_what_the_form_does_not_allow_is_said_of_the_form(vocabulary: TokenVocabulary) -> None:
    grammar = vocabulary.compile(ResponseFormat.regex("ab"))
    with pytest.raises(InvalidRequestError, match=r"^response_format\.regex cannot be followed any further"):
        grammar.matcher().masks(ids("ax"), [], {EOS})


def test_json_is_written_as_json_dumps_does(vocabulary: TokenVocabulary) -> None:
    """White space at will is what small models write until max_tokens."""
    schema = {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["a", "b"]}
    grammar = vocabulary.compile(ResponseFormat.json_schema({**schema, "additionalProperties": False}))
    text = '{"a": 1, "b": 2}'
    for number, character in enumerate(text):
        assert next_tokens(grammar, text[:number]) == of(character)
    assert next_tokens(grammar, text) == {EOS}


@pytest.mark.parametrize("text", ["left (1)", "right [2]", "a|b", "50%", "C:\\x", "é", "-", "~x/#"])
def test_a_choice_is_just_its_text(vocabulary: TokenVocabulary, text: str) -> None:
    grammar = vocabulary.compile(ResponseFormat.choice([text]))
    tokens = ids(text)
    for number, token in enumerate(tokens):
        (mask,) = grammar.matcher().masks(tokens[:number], [], {EOS})
        assert allowed(mask) == {token}
    (mask,) = grammar.matcher().masks(tokens, [], {EOS})
    assert allowed(mask) == {EOS}


def test_grammars_are_written_in_lark_or_gbnf(vocabulary: TokenVocabulary) -> None:
    lark = vocabulary.compile(ResponseFormat.grammar('start: word ("," word)*\nword: "x" | "y"'))
    gbnf = vocabulary.compile(ResponseFormat.grammar('root ::= word ("," word)*\nword ::= "x" | "y"'))
    for grammar in (lark, gbnf):
        assert next_tokens(grammar, "") == of("x", "y")
        assert next_tokens(grammar, "x,y") == of(",") | {EOS}


def test_a_grammar_that_was_used_up_by_others_is_made_anew(
    vocabulary: TokenVocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of a grammar's states counts those of all sequences that ever were."""
    grammar = vocabulary.compile(ResponseFormat.regex("ab+"))
    matcher = grammar.matcher()
    matcher.masks(ids("a"), [], {EOS})

    class UsedUp:
        def consume_tokens(self, tokens: list[int]) -> bool:
            return False

        def get_error(self) -> str:
            return "too many states"

    monkeypatch.setattr(matcher, "_matcher", UsedUp())
    (mask,) = matcher.masks(ids("ab"), [], {EOS})
    assert allowed(mask) == of("b") | {EOS}


@pytest.mark.parametrize(
    ("response_format", "problem"),
    [
        (ResponseFormat.regex("(?=a)b"), r"response_format\.regex cannot be used"),
        (ResponseFormat.regex("("), r"response_format\.regex cannot be used"),
        (ResponseFormat.json_schema({"type": "nothing"}), r"response_format\.json_schema cannot be used"),
        (ResponseFormat.json_schema({"multipleOf": MAX_MULTIPLE + 1}), "least common multiple is above 10,000"),
        (ResponseFormat.json_schema({"allOf": [{"multipleOf": 101}, {"multipleOf": 103}]}), "least common multiple"),
        (ResponseFormat.json_schema({"multipleOf": 0.00001, "allOf": [{"multipleOf": 1}]}), "least common multiple"),
        (ResponseFormat.grammar("nonsense ((("), "is no grammar|cannot be used"),
        (ResponseFormat.grammar('start: %json {"multipleOf": 3}'), "multipleOf"),
    ],
)
def test_what_cannot_be_is_refused_by_gateways_by_name(response_format: ResponseFormat, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        check_response_format(response_format)


def follow(matcher: GrammarMatcher, token_ids: list[int]) -> None:
    for number in range(len(token_ids) + 1):
        matcher.masks(token_ids[:number], [], {EOS})


SLOW = [
    "a{1000000000}",
    "(?:abcdefgh){500000000}",
    "((a{1000}){1000}){1000}",
    "(?:b{1000}){1000000}",
]


@pytest.mark.parametrize("pattern", SLOW)
def test_a_pattern_whose_masks_take_long_is_refused_by_gateways(pattern: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"response_format\.regex .*simplify the response format"):
        check_response_format(ResponseFormat.regex(pattern))


@pytest.mark.parametrize("pattern", SLOW)
def test_a_pattern_whose_masks_take_long_is_refused_by_workers(vocabulary: TokenVocabulary, pattern: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"response_format\.regex .*simplify the response format"):
        vocabulary.compile(ResponseFormat.regex(pattern))


@pytest.mark.parametrize("pattern", [f":(?:{pattern})" for pattern in SLOW[:3]])
def test_what_begins_to_take_long_later_ends_there_and_is_not_tried_anew(
    vocabulary: TokenVocabulary, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = vocabulary.compile(ResponseFormat.regex("[a-z]{0,9}" + pattern))
    compiled: list[None] = []
    monkeypatch.setattr(grammar, "_compile_matcher", lambda: compiled.append(None))
    with pytest.raises(InvalidRequestError, match=r"response_format\.regex .*simplify the response format"):
        follow(grammar.matcher(), ids(":" + "a" * 20))
    assert grammar.is_slow
    assert not compiled


@pytest.mark.parametrize(
    "response_format",
    [
        ResponseFormat.json_schema({"type": "string", "minLength": 10**9}),
        ResponseFormat.json_schema({"type": "string", "maxLength": 10**9}),
        ResponseFormat.json_schema({"type": "array", "minItems": 10**9, "maxItems": 10**9}),
        ResponseFormat.json_schema({"enum": [f"{number * 7919 % 100_003:09d}" for number in range(4000)]}),
        ResponseFormat.regex("[a-z ]{1000000000}"),
        ResponseFormat.choice(["word " * 4000]),
    ],
)
def test_large_forms_that_are_cheap_to_follow_are_taken(
    vocabulary: TokenVocabulary, response_format: ResponseFormat
) -> None:
    check_response_format(response_format)
    vocabulary.compile(response_format)


@pytest.mark.parametrize(
    "response_format",
    [
        ResponseFormat.regex(r"[^\s\S]"),
        ResponseFormat.grammar("start: start"),
        ResponseFormat.grammar('start: a "x"\na[lazy]: /.*/'),
        ResponseFormat.json_schema({"$ref": "#"}),
    ],
)
def test_a_form_that_nothing_begins_is_refused_without_a_compilers_inside(response_format: ResponseFormat) -> None:
    with pytest.raises(InvalidRequestError, match=r"simplify the response format|leave that part away") as refused:
        check_response_format(response_format)
    assert not {"panic", "assertion", "NoExtension"} & set(refused.value.message.replace(":", " ").split())


@pytest.mark.parametrize(
    "source",
    [
        'start: "abc" b\nb: b "x"',
        'start: ("k" | "m") A\nA: /a+/ & /b+/',
        'start: /[a-z]/ b "y" | "0"\nb: b "x"',
    ],
)
def test_a_dead_end_behind_the_first_bytes_is_refused_by_gateways(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="nothing may come behind what is written so far"):
        check_response_format(ResponseFormat.grammar(source))


@pytest.mark.parametrize(
    "source", ['start: "a" (b | "c")\nb: b "x"', 'start: "k" A\nA: /[a-z]{3}/ & /[^a]+/', 'start: "é"? A\nA: /a*/']
)
def test_a_way_that_goes_on_passes_a_gateways_check(source: str) -> None:
    check_response_format(ResponseFormat.grammar(source))


def test_a_grammar_with_tokens_of_a_model_passes_a_gateways_check(vocabulary: TokenVocabulary) -> None:
    response_format = ResponseFormat.grammar('start: "a" <|im_end|> "b"')
    check_response_format(response_format)
    vocabulary.compile(response_format)
    with pytest.raises(InvalidRequestError, match="unknown special token"):
        vocabulary.compile(ResponseFormat.grammar('start: "a" <|nothing_such|>'))


def test_a_sequence_that_takes_too_long_breaks_nothing_for_others_of_its_form(vocabulary: TokenVocabulary) -> None:
    grammar = vocabulary.compile(ResponseFormat.regex("b{1000000}|xa+"))
    before = grammar.matcher()
    follow(before, ids("x"))
    with pytest.raises(InvalidRequestError, match="simplify the response format"):
        follow(grammar.matcher(), ids("b"))
    follow(before, ids("xaa"))
    follow(grammar.matcher(), ids("xa"))


def test_messages_are_short_however_long_the_form_is() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_response_format(ResponseFormat.regex("(" + "a" * 20_000))
    assert len(refused.value.message) < 500
    assert "\n" not in refused.value.message


def test_a_model_without_an_end_token_cannot_do_it() -> None:
    with pytest.raises(PreconditionError, match="no end-of-sequence token"):
        TokenVocabulary(TOKENIZER.to_str(), VOCAB_SIZE, [])
