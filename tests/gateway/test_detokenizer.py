"""Text of tokens that come one at a time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from gateway.detokenizer import Detokenizer
from tests.gateway.small_tokenizer import make_tokenizer

TOKENIZER = make_tokenizer()


def pieces(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [detokenizer.add(token_id).text for token_id in ids] + [detokenizer.flush()]


@given(text=st.text(max_size=40))
def test_the_pieces_make_up_the_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert "".join(pieces(Detokenizer(TOKENIZER), ids)) == TOKENIZER.decode(ids)


@given(ids=st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=40))
def test_any_tokens_give_the_text_of_a_decoding_of_all(ids: list[int]) -> None:
    assert "".join(pieces(Detokenizer(TOKENIZER), ids)) == TOKENIZER.decode(ids)


@given(ids=st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=40), cut=st.integers(0, 40))
def test_a_replay_continues_where_the_first_run_would(ids: list[int], cut: int) -> None:
    whole = pieces(Detokenizer(TOKENIZER, ["ab"]), ids)
    replayed = Detokenizer(TOKENIZER, ["ab"])
    for token_id in ids[:cut]:
        replayed.add(token_id)
    assert pieces(replayed, ids[cut:]) == whole[cut:] if cut <= len(ids) else True


def test_an_incomplete_character_is_held_back() -> None:
    ids = TOKENIZER.encode("é!", add_special_tokens=False).ids
    assert len(ids) == 3, "é is two bytes and so two tokens"
    assert pieces(Detokenizer(TOKENIZER), ids) == ["", "é", "!", ""]
    assert pieces(Detokenizer(TOKENIZER), ids[:1]) == ["", "\ufffd"]


def test_special_tokens_have_no_text() -> None:
    eos = TOKENIZER.token_to_id("<|eos|>")
    assert eos is not None
    assert pieces(Detokenizer(TOKENIZER), [*TOKENIZER.encode("a", add_special_tokens=False).ids, eos]) == ["a", "", ""]


def test_a_stop_string_over_several_tokens_cuts_the_text() -> None:
    detokenizer = Detokenizer(TOKENIZER, ["END"])
    ids = TOKENIZER.encode("ok ENDless", add_special_tokens=False).ids
    results = [detokenizer.add(token_id) for token_id in ids]
    assert "".join(result.text for result in results) == "ok "
    assert results[-1].stopped
    assert detokenizer.flush() == ""


@pytest.mark.parametrize(("context", "text"), [([], "world"), ([0], " world")])
def test_the_prompt_decides_whether_the_first_word_begins_with_a_space(context: list[int], text: str) -> None:
    tokenizer = Tokenizer(models.WordLevel({"▁Hello": 0, "▁world": 1}, unk_token="▁Hello"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert Detokenizer(tokenizer, (), context).add(1).text == text
