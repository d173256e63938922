"""End tokens: the union of what the files of a model's folder declare, in every form that they are
found in.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from kvrelay.models.end_tokens import declared_end_tokens, within_vocabulary

TOKENIZER = {
    "added_tokens": [{"id": 90, "content": "<|im_end|>", "special": True}, {"id": 91, "content": "<|endoftext|>"}],
    "model": {"type": "BPE", "vocab": {"</s>": 2, "a": 3}},
}


def declared(folder: Path, **files: Any) -> list[int]:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return declared_end_tokens(folder)


def test_every_file_adds_its_tokens(tmp_path: Path) -> None:
    found = declared(
        tmp_path,
        generation_config={"eos_token_id": [5, 6]},
        config={"eos_token_id": 7, "text_config": {"eos_token_id": [8, 5]}},
        tokenizer_config={"eos_token": "<|im_end|>"},
        special_tokens_map={"eos_token": {"content": "</s>", "lstrip": False}},
        tokenizer=TOKENIZER,
    )
    assert found == [2, 5, 6, 7, 8, 90]


def test_a_tokenizer_that_was_fine_tuned_ends_turns_though_the_configs_still_say_the_base_models_token(
    tmp_path: Path,
) -> None:
    base = {"eos_token_id": 91}
    found = declared(
        tmp_path, generation_config=base, config=base, tokenizer_config={"eos_token": "<|im_end|>"}, tokenizer=TOKENIZER
    )
    assert found == [90, 91]


@pytest.mark.parametrize(
    ("eos", "expected"),
    [
        (4, [4]),
        ([4, 9, 4], [4, 9]),
        ([None, -1, 4], [4]),
        (None, []),
        (-1, []),
        (True, []),
        ("4", []),
        (1.0, []),
        ({}, []),
        ([[4]], []),
    ],
)
def test_ids_come_alone_or_in_lists_and_what_is_none_is_left_out(
    tmp_path: Path, eos: object, expected: list[int]
) -> None:
    assert declared(tmp_path, generation_config={"eos_token_id": eos}) == expected


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer": TOKENIZER},
        {"tokenizer": {"model": {"vocab": {"<|im_end|>": 90}}}},
        {"tokenizer": {"model": {"vocab": [["x", -1.0]] * 90 + [["<|im_end|>", 0.0]]}}},
        {"added_tokens": {"<|im_end|>": 90}},
        {"tokenizer_config": {"added_tokens_decoder": {"90": {"content": "<|im_end|>", "special": True}}}},
    ],
    ids=["added token", "vocabulary", "unigram", "added_tokens.json", "added_tokens_decoder"],
)
@pytest.mark.parametrize(
    "eos", ["<|im_end|>", {"__type": "AddedToken", "content": "<|im_end|>"}], ids=["text", "object"]
)
def test_the_tokenizers_eos_token_is_found_wherever_its_id_is(
    tmp_path: Path, files: dict[str, Any], eos: object
) -> None:
    settings = {"eos_token": eos} | files.get("tokenizer_config", {})
    assert declared(tmp_path, **files | {"tokenizer_config": settings}) == [90]


@pytest.mark.parametrize("eos", ["<|no such token|>", "", None, 7, ["<|im_end|>"]])
def test_an_eos_token_that_the_tokenizer_does_not_have_ends_nothing(tmp_path: Path, eos: object) -> None:
    assert declared(tmp_path, config={"eos_token_id": 3}, tokenizer_config={"eos_token": eos}, tokenizer=TOKENIZER) == [
        3
    ]


@pytest.mark.parametrize("content", ["{", "[]", "null", "[" * 100_000])
@pytest.mark.parametrize(
    "name", ["generation_config", "tokenizer_config", "special_tokens_map", "added_tokens", "tokenizer"]
)
def test_a_broken_file_declares_nothing_and_takes_nothing_from_the_others(
    tmp_path: Path, name: str, content: str
) -> None:
    files = {"config": {"eos_token_id": 3}, "tokenizer_config": {"eos_token": "<|im_end|>"}, name: content}
    assert declared(tmp_path, **files) == [3]


def test_ids_outside_of_the_vocabulary_are_left_out() -> None:
    assert within_vocabulary([5, 9, 10, 0, 5, -3], 10) == (0, 5, 9)
