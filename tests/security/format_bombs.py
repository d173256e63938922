"""Response formats that are short and take long: the grammar's compiler multiplies automata.

family   a pattern whose automaton grows with a number
bomb     many of them, joined so that all must hold at once
"""

import json

from hypothesis import strategies as st

from kvrelay.core.response_format import ResponseFormat

FAMILIES = (
    "a.{{0,{0}}}b",
    ".*a.{{{0}}}",
    "[ab]*a[ab]{{{0}}}",
    "(.{{{0}}})*",
    "(a|b{{{0}}})*c",
    "a{{{0},}}",
    "^.*(a.{{{0}}}|b).*$",
    "[a-z]{{{0}}}x?",
    "(ab?){{{0}}}",
    "([^a]{{{0}}}a)+",
)


def patterns(number: int, families: tuple[str, ...] = FAMILIES[:1], stride: int = 1) -> list[str]:
    return [families[index % len(families)].format(1 + index * stride) for index in range(number)]


def schema_of(texts: list[str]) -> dict[str, object]:
    return {"allOf": [{"type": "string", "pattern": text} for text in texts]}


def as_schema(texts: list[str]) -> ResponseFormat:
    return ResponseFormat.json_schema(schema_of(texts))


def as_names(texts: list[str]) -> ResponseFormat:
    return ResponseFormat.json_schema({"type": "object", "patternProperties": dict.fromkeys(texts, True)})


def as_terminal(texts: list[str]) -> ResponseFormat:
    """Lark's `&`, and `~` for every second one."""
    parts = [f"{'~' if index % 2 else ''}/{text}/" for index, text in enumerate(texts)]
    return ResponseFormat.grammar("start: T\nT: " + " & ".join(parts))


def as_terminal_with_token(texts: list[str]) -> ResponseFormat:
    """The grammar names a token, which only the model's vocabulary has."""
    return ResponseFormat.grammar(as_terminal(texts).source.replace("start: T", "start: <|im_end|>? T"))


def as_embedded_schema(texts: list[str]) -> ResponseFormat:
    return ResponseFormat.grammar("start: <think> %json " + json.dumps(schema_of(texts)))


def as_pattern(texts: list[str]) -> ResponseFormat:
    return ResponseFormat.regex("|".join(f"({text})*x" for text in texts))


JOINS = (as_schema, as_names, as_terminal, as_terminal_with_token, as_embedded_schema, as_pattern)

BOMBS = {
    "allOf of patterns": as_schema(patterns(60)),
    "automata of several families": as_schema(patterns(120, FAMILIES[1:5])),
    "terminals and their complements": as_terminal(patterns(40, FAMILIES[1:5:3])),
    "a schema within a grammar": as_embedded_schema(patterns(60)),
    "beside a model's token": as_terminal_with_token(patterns(60, FAMILIES[1:5:3], stride=2)),
}
"""Found by the search of `formats`, and made small."""


def formats() -> st.SearchStrategy[ResponseFormat]:
    families = st.lists(st.sampled_from(FAMILIES), min_size=1, max_size=4).map(tuple)
    texts = st.builds(patterns, st.integers(1, 150), families, st.sampled_from((1, 2, 7, 30)))
    return st.builds(lambda join, joined: join(joined), st.sampled_from(JOINS), texts)
