"""Settings in tokenizer_config.json give the same tokens and texts as in transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from gateway.text.tokenizer import KNOWN_FILES, ModelTokenizer
from kvrelay.testing.tiny_model import BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, VOCAB_SIZE, train_tokenizer

TEXTS = ["Hello, world!", "  two  spaces\n", "a <tool> b<new>c <x> d", "<|im_start|>user", "x , y . don 't"]
BASE = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS_TOKEN,
    "eos_token": EOS_TOKEN,
    "pad_token": PAD_TOKEN,
}
ANY_NUMBER = 1000
PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}

CASES: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "begins": {"add_bos_token": True},
    "begins and ends": {"add_bos_token": True, "add_eos_token": True},
    "ends": {"add_bos_token": False, "add_eos_token": True},
    "neither": {"add_bos_token": False},
    "bos as an object": {
        "add_bos_token": True,
        "bos_token": {"__type": "AddedToken", "content": BOS_TOKEN, "special": True, **PLAIN},
    },
    "begins without bos": {"add_bos_token": True, "bos_token": None},
    "listed tokens": {
        "added_tokens_decoder": {
            str(VOCAB_SIZE): {"content": "<tool>", "special": True, **PLAIN},
            str(VOCAB_SIZE + 1): {"content": "<new>", "special": False, **PLAIN},
            str(VOCAB_SIZE + 2): {"content": "<x>", "special": True, **PLAIN, "lstrip": True, "rstrip": True},
        }
    },
    "eos that is no token yet": {"eos_token": "<new>", "add_eos_token": True},
    "further special tokens": {"additional_special_tokens": ["<tool>", "<x>"]},
    "other flags": {"added_tokens_decoder": {"4": {"content": "<|im_end|>", "special": True, **PLAIN, "lstrip": True}}},
}


def save(folder: Path, config: dict[str, Any], post_processor: Any = None) -> None:
    tokenizer: Tokenizer = train_tokenizer()
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(BASE | config))


def assert_as_transformers(folder: Path) -> ModelTokenizer:
    from transformers import AutoTokenizer

    ours = ModelTokenizer({path.name: path.read_bytes() for path in folder.iterdir() if path.name in KNOWN_FILES})
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, ANY_NUMBER).token_ids == ids
        assert (
            ours.encode(text, ANY_NUMBER, rendered=True).token_ids
            == theirs(text, add_special_tokens=False)["input_ids"]
        )
        for keep in (False, True):
            decoded = theirs.decode(ids, skip_special_tokens=not keep, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, keep_special_tokens=keep) == decoded
    return ours


@pytest.mark.parametrize("begins", [False, True], ids=["bare", "with a post-processor"])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_settings_of_a_tokenizer_are_applied_as_transformers_does(
    config: dict[str, Any], begins: bool, tmp_path: Path
) -> None:
    template = (
        processors.TemplateProcessing(single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, 1)]) if begins else None
    )
    save(tmp_path, config, template)
    assert_as_transformers(tmp_path)


def test_listed_tokens_are_one_token_each_and_special_ones_have_no_text(tmp_path: Path) -> None:
    save(tmp_path, CASES["listed tokens"])
    tokenizer = assert_as_transformers(tmp_path)
    ids = tokenizer.encode("<tool><new>", ANY_NUMBER).token_ids
    assert ids == [VOCAB_SIZE, VOCAB_SIZE + 1]
    assert tokenizer.decode(ids) == "<new>"
    assert tokenizer.decode(ids, keep_special_tokens=True) == "<tool><new>"


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"x": 1, "7": None, "8": {"content": 5}, "9": {"content": ""}}},
        {"added_tokens_decoder": [], "additional_special_tokens": 4, "extra_special_tokens": [None, "", 3]},
        {"add_bos_token": True, "bos_token": 7},
        {"add_bos_token": True, "bos_token": ["<s>"]},
    ],
)
def test_invalid_settings_change_nothing(config: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path, config)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    text = TEXTS[0]
    assert ModelTokenizer(files).encode(text, ANY_NUMBER).token_ids == train_tokenizer().encode(text).ids
