"""Text of tokens that come one at a time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from gateway.text.detokenizer import Detokenizer
from gateway.text.token_text import TokenTexts
from kvrelay.testing.tiny_model import train_tokenizer
from tests.support.small_tokenizer import make_tokenizer

TOKENIZER = make_tokenizer()
TEXTS = TokenTexts(TOKENIZER)


def pieces(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [detokenizer.add(token_id).text for token_id in ids] + [detokenizer.flush()]


@given(text=st.text(max_size=40))
def test_the_pieces_make_up_the_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert "".join(pieces(Detokenizer(TEXTS), ids)) == TOKENIZER.decode(ids)


@given(ids=st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=40))
def test_any_tokens_give_the_text_of_decoding_them_together(ids: list[int]) -> None:
    assert "".join(pieces(Detokenizer(TEXTS), ids)) == TOKENIZER.decode(ids)


@given(ids=st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=40), cut=st.integers(0, 40))
def test_a_replay_continues_where_the_first_run_would(ids: list[int], cut: int) -> None:
    whole = pieces(Detokenizer(TEXTS, ["ab"]), ids)
    replayed = Detokenizer(TEXTS, ["ab"])
    for token_id in ids[:cut]:
        replayed.add(token_id)
    assert pieces(replayed, ids[cut:]) == whole[cut:] if cut <= len(ids) else True


def test_an_incomplete_character_is_held_back() -> None:
    ids = TOKENIZER.encode("é!", add_special_tokens=False).ids
    assert len(ids) == 3, "é is two bytes and so two tokens"
    assert pieces(Detokenizer(TEXTS), ids) == ["", "é", "!", ""]
    assert pieces(Detokenizer(TEXTS), ids[:1]) == ["", "\ufffd"]


def test_special_tokens_have_no_text() -> None:
    eos = TOKENIZER.token_to_id("<|eos|>")
    assert eos is not None
    assert pieces(Detokenizer(TEXTS), [*TOKENIZER.encode("a", add_special_tokens=False).ids, eos]) == ["a", "", ""]


def test_a_stop_string_over_several_tokens_cuts_the_text() -> None:
    detokenizer = Detokenizer(TEXTS, ["END"])
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


# --- other tokenizers -----------------------------------------------------------------------------


def byte_fallback_tokenizer() -> Tokenizer:
    """Like Llama's: words with a mark for the space before them, and tokens for single bytes."""
    words = [
        "<unk>",
        "<s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁Hi",
        "▁a",
        "b",
        "é",
        "日",
        "\ufffd",
        "!",
    ]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """As a converted SentencePiece model without bytes."""
    words = ["<unk>", "<s>", "▁", "▁Hi", "▁a", "b", "é", "日", "\ufffd", "!"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


def word_piece_tokenizer() -> Tokenizer:
    """Like BERT's: tokens that continue a word are marked."""
    words = ["[UNK]", "hello", "##ing", "wor", "##ld", ".", "\ufffd", "##\ufffd", "日"]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[UNK]"])
    return tokenizer


OTHERS = {make.__name__: make() for make in (byte_fallback_tokenizer, metaspace_tokenizer, word_piece_tokenizer)}
OTHERS["byte_level_with_merges"] = train_tokenizer()
ALL = {"byte_level": TOKENIZER, **OTHERS}


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    ids = [tokenizer.token_to_id(token) for token in tokens]
    assert None not in ids
    return [token_id for token_id in ids if token_id is not None]


def is_text(tokenizer: Tokenizer, ids: list[int]) -> bool:
    """Whether the tokens are whole characters."""
    raw = b"".join(TokenTexts(tokenizer).of(token_id) or b"" for token_id in ids)
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_which_tokenizers_have_tokens_with_bytes_of_their_own() -> None:
    assert {name: TokenTexts(tokenizer).are_known for name, tokenizer in ALL.items()} == {
        name: name != "word_piece_tokenizer" for name in ALL
    }


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_prompt_and_output_make_up_the_text_of_both(name: str, data: st.DataObject) -> None:
    tokenizer = ALL[name]
    texts = TokenTexts(tokenizer)
    token_ids = st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=12)
    prompt, output = data.draw(token_ids), data.draw(token_ids)
    text = "".join(pieces(Detokenizer(texts, (), prompt), output))
    before, both = tokenizer.decode(prompt), tokenizer.decode(prompt + output)
    if not texts.are_known or (is_text(tokenizer, prompt) and is_text(tokenizer, output)):
        assert both == before + text
    else:
        assert len(text) <= len(tokenizer.decode(output)) + 1, "no text of the prompt is in it"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("prompt", ["caf\ufffd", "\ufffd", "a b \ufffd\ufffd\ufffd\ufffd"])
def test_prompt_that_ends_in_a_replacement_character_is_not_repeated(name: str, prompt: str) -> None:
    tokenizer = ALL[name]
    if name.startswith("byte_level"):
        context = tokenizer.encode(prompt, add_special_tokens=False).ids
        output = tokenizer.encode(" is", add_special_tokens=False).ids
        expected = " is"
    else:
        context = ids_of(tokenizer, *(["\ufffd"] * prompt.count("\ufffd")))
        words, expected = (("wor", "##ld"), " world") if name == "word_piece_tokenizer" else (("▁Hi", "b"), " Hib")
        output = ids_of(tokenizer, *words)
    assert "".join(pieces(Detokenizer(tokenizer, (), context), output)) == expected


def test_a_stop_string_is_not_found_in_the_prompt() -> None:
    prompt = TOKENIZER.encode("My name \ufffd", add_special_tokens=False).ids
    detokenizer = Detokenizer(TEXTS, ["name"], prompt)
    results = [detokenizer.add(token_id) for token_id in TOKENIZER.encode(" is", add_special_tokens=False).ids]
    assert not any(result.stopped for result in results)
    assert "".join(result.text for result in results) + detokenizer.flush() == " is"


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback_tokenizer"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_that_the_prompt_begins_belongs_to_the_output_that_completes_it(name: str, cut: int) -> None:
    tokenizer = ALL[name]
    if name == "byte_level":
        emoji = tokenizer.encode("😀", add_special_tokens=False).ids
        rest = tokenizer.encode("x", add_special_tokens=False).ids
    else:
        emoji, rest = ids_of(tokenizer, *(f"<0x{byte:02X}>" for byte in "😀".encode())), ids_of(tokenizer, "b")
    texts, context = TokenTexts(tokenizer), [*rest, *emoji[:cut]]
    assert "".join(pieces(Detokenizer(texts, (), context), [*emoji[cut:], *rest]))[0] == "😀"
    broken = "".join(pieces(Detokenizer(texts, (), context), rest))
    assert broken == tokenizer.decode(rest), "the prompt's end is a U+FFFD to whoever sent it"


@pytest.mark.parametrize("name", ["byte_fallback_tokenizer", "metaspace_tokenizer"])
def test_a_prompt_of_special_tokens_only_leaves_the_first_word_without_its_space(name: str) -> None:
    tokenizer = ALL[name]
    texts, output = TokenTexts(tokenizer), ids_of(tokenizer, "▁Hi", "▁a")
    assert pieces(Detokenizer(texts, (), ids_of(tokenizer, "<s>")), output) == ["Hi", " a", ""]
    assert pieces(Detokenizer(texts, (), ids_of(tokenizer, "<s>", "▁Hi")), output) == [" Hi", " a", ""]
    assert pieces(Detokenizer(texts, (), ids_of(tokenizer, "<s>", "▁Hi", "<s>")), output) == [" Hi", " a", ""]


class CountingTokenizer:
    """Counts decoded ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_decoded = 0

    def decode(self, ids: list[int], **options: bool) -> str:
        self.num_decoded += len(ids)
        return str(self._tokenizer.decode(ids, **options))

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback_tokenizer", "word_piece_tokenizer", "unknown"])
def test_invalid_bytes_show_at_once_and_at_constant_cost(name: str) -> None:
    tokenizer = ALL.get(name) or make_tokenizer()
    if name == "unknown":  # an unknown decoder that may split characters
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("zz", "z")])
    broken = {"byte_fallback_tokenizer": "<0x80>", "word_piece_tokenizer": "##\ufffd"}.get(name)
    token_id = ids_of(tokenizer, broken)[0] if broken else TOKENIZER.encode("é", add_special_tokens=False).ids[1]
    counting = CountingTokenizer(tokenizer)
    context = ids_of(tokenizer, "hello") if name == "word_piece_tokenizer" else []
    detokenizer = Detokenizer(TokenTexts(counting), (), context)  # type: ignore[arg-type]
    counting.num_decoded = longest_wait = wait = 0
    for _ in range(4000):
        text = detokenizer.add(token_id).text
        assert set(text) <= {"\ufffd"}
        wait = 0 if text else wait + 1
        longest_wait = max(longest_wait, wait)
    assert longest_wait < 4
    assert counting.num_decoded <= 4000 * 150
