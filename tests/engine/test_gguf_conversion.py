"""What a GGUF file says beside its weights is kept by the conversion."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from benchmarks.peers import gguf_writing
from kvrelay.engine.gguf_conversion import convert_gguf, gguf_end_tokens
from kvrelay.models.end_tokens import declared_end_tokens
from kvrelay.testing.tiny_model import BOS_TOKEN_ID, EOS_TOKEN_ID, make_tiny_llama


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({}, set()),
        ({"eos": 2}, {2}),
        ({"eos": 2, "eot": 7}, {2, 7}),
        ({"eot": 7, "eom": 8}, {7, 8}),
        ({"eos": 2, "eot": 2}, {2}),
    ],
)
def test_the_end_tokens_of_a_gguf_file_are_those_of_texts_turns_and_messages(
    declared: dict[str, int], expected: set[int], tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_bos_token_id(1)
    for name, token_id in declared.items():
        getattr(writer, f"add_{name}_token_id")(token_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert gguf_end_tokens(path) == expected


def test_a_converted_model_ends_its_output_where_its_file_ends_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_vocabulary = gguf_writing._add_vocabulary

    def with_end_of_turn(writer: gguf.GGUFWriter, *arguments: Any) -> None:
        add_vocabulary(writer, *arguments)
        writer.add_eot_token_id(BOS_TOKEN_ID)

    monkeypatch.setattr(gguf_writing, "_add_vocabulary", with_end_of_turn)
    source, target = tmp_path / "m.gguf", tmp_path / "converted"
    target.mkdir()
    folder = make_tiny_llama(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["rope_parameters"] = {"rope_theta": 10000.0}  # as transformers 5 writes it
    (folder / "config.json").write_text(json.dumps(config))
    gguf_writing.write_gguf(folder, source, "f32")
    convert_gguf(source, target, "float32", lambda stage, fraction: None)
    assert declared_end_tokens(target) == sorted({EOS_TOKEN_ID, BOS_TOKEN_ID})
