"""Long texts are refused by length, tokenized off the event loop, and give the usual tokens."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from gateway.text.texts import MARGIN_TOKENS, MIN_BYTES_PER_TOKEN, Texts, TokenBound
from gateway.text.tokenizer import EncodedText, ModelTokenizer
from kvrelay.errors import InvalidRequestError
from tests.support.small_tokenizer import make_tokenizer, tokenizer_files

BOUND_S = 60.0
ADVICE = "send less"
TOKENIZER = ModelTokenizer(tokenizer_files())


def soon() -> float:
    return asyncio.get_running_loop().time() + BOUND_S


class SpiedTokenizer(ModelTokenizer):
    """Records the lengths of tokenized texts."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(files)
        self.lengths: list[int] = []

    def encode(self, text: str, max_tokens: int, *, rendered: bool = False) -> EncodedText:
        self.lengths.append(len(text))
        return super().encode(text, max_tokens, rendered=rendered)


def with_long_token(length: int) -> dict[str, bytes]:
    """A tokenizer with one token of many dashes, and one token for each other byte."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("-" * length, special=False, normalized=False)])
    return {**tokenizer_files(), "tokenizer.json": tokenizer.to_str().encode()}


def test_the_longest_token_is_known_in_bytes() -> None:
    assert ModelTokenizer(with_long_token(300)).longest_token_bytes == 300


async def test_a_far_too_long_text_is_refused_without_tokenizing() -> None:
    tokenizer = SpiedTokenizer(tokenizer_files())
    limit = 100 * MIN_BYTES_PER_TOKEN
    for text in ("x" * (limit + 1), "é" * (limit // 2 + 1), "x" * 8_000_000):
        with pytest.raises(InvalidRequestError) as refusal:
            await Texts().encode(tokenizer, text, TokenBound("prompt", 100, ADVICE), soon())
        assert (refusal.value.field, tokenizer.lengths) == ("prompt", [])
        assert f"{len(text.encode())} bytes" in refusal.value.message
        assert str(limit) in refusal.value.message
        assert ADVICE in refusal.value.message


async def test_the_cost_of_a_too_long_text_is_bounded_by_the_allowed_tokens() -> None:
    tokenizer = SpiedTokenizer(with_long_token(1000))
    with pytest.raises(InvalidRequestError, match="more than 1000 tokens"):
        await Texts().encode(tokenizer, "a" * 900_000, TokenBound("prompt", 1000, ADVICE), soon())
    assert sum(tokenizer.lengths) <= 4 * (1000 + MARGIN_TOKENS)


async def test_a_long_text_of_few_tokens_is_tokenized_as_a_whole() -> None:
    tokenizer = SpiedTokenizer(with_long_token(1000))
    text = "-" * 500_000 + " end"
    token_ids = await Texts().encode(tokenizer, text, TokenBound("prompt", 1000, ADVICE), soon())
    assert token_ids == tokenizer.tokenizer.encode(text).ids
    assert len(tokenizer.lengths) > 1, "a beginning was looked at first"


async def test_a_slightly_too_long_text_is_refused_with_its_number_of_tokens() -> None:
    with pytest.raises(InvalidRequestError, match="has 101 tokens; send less"):
        await Texts().encode(TOKENIZER, "a" * 101, TokenBound("prompt", 100, ADVICE), soon())


@given(text=st.text(max_size=200))
def test_texts_are_tokenized_as_the_library_does(text: str) -> None:
    encode = TOKENIZER.tokenizer.encode
    assert TOKENIZER.encode(text, 10_000) == (len(encode(text).ids), encode(text).ids)
    assert TOKENIZER.encode(text, 10_000, rendered=True).token_ids == encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("step", ["encode", "decode"])
async def test_the_event_loop_runs_while_a_long_text_is_tokenized(step: str) -> None:
    texts = Texts()
    bound = TokenBound("prompt", 10_000_000, ADVICE)
    job: asyncio.Future[object]
    if step == "encode":
        job = asyncio.ensure_future(texts.encode(TOKENIZER, "some words " * 40_000, bound, soon()))
    else:
        job = asyncio.ensure_future(texts.decode(TOKENIZER, [70] * 1_000_000, soon()))
    num_turns = 0
    while not job.done():
        await asyncio.sleep(0.001)
        num_turns += 1
    await job
    assert num_turns > 5, "the interpreter was held for most of the time"
