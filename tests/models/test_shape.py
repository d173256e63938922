"""Sizes read from a folder's files are those that the loaded model has."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvrelay.engine.model_loader import load_model
from kvrelay.errors import ModelLoadError
from kvrelay.models.shape import read_model_shape
from tests.support.tiny_models import make_tiny_model

LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def write_config(folder: Path, config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_bigcode"])
def test_sizes_are_those_of_the_loaded_model(kind: str, tmp_path: Path) -> None:
    folder = make_tiny_model(kind, tmp_path)
    model = load_model(folder, kind)
    shape = read_model_shape(folder)
    assert shape.kv_layout("float32") == model.spec.kv_layout
    assert shape.max_context_tokens == model.spec.max_context_tokens
    assert shape.weights.num_parameters == sum(parameter.numel() for parameter in model.module.parameters())
    assert not shape.is_estimated


def test_without_weights_they_are_counted_by_the_config(tmp_path: Path) -> None:
    made = make_tiny_model("llama", tmp_path)
    exact = read_model_shape(made)
    (tmp_path / "config-only").mkdir()
    shutil.copy(made / "config.json", tmp_path / "config-only")
    estimated = read_model_shape(tmp_path / "config-only")
    assert estimated.is_estimated
    assert estimated.weights == exact.weights


def test_a_known_model_has_its_known_size(tmp_path: Path) -> None:
    shape = read_model_shape(write_config(tmp_path, LLAMA_3_8B))
    assert shape.weights.num_parameters == 8_030_261_248
    assert shape.kv_layout("bfloat16").bytes_per_token == 128 * 1024


def test_a_tied_head_is_no_parameter_of_its_own(tmp_path: Path) -> None:
    shape = read_model_shape(write_config(tmp_path, LLAMA_3_8B | {"tie_word_embeddings": True}))
    assert shape.weights.num_tied_head == 128256 * 4096
    assert shape.weights.num_parameters == 8_030_261_248 - 128256 * 4096


def test_sizes_of_a_model_with_several_parts_are_those_of_its_text_part(tmp_path: Path) -> None:
    shape = read_model_shape(write_config(tmp_path, {"model_type": "gemma3", "text_config": LLAMA_3_8B}))
    assert shape.num_layers == 32


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ([], "names no model_type"),
        ({}, "names no model_type"),
        ({"model_type": "t5"}, "has none of num_attention_heads"),
    ],
)
def test_a_config_without_sizes_is_refused(config: object, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=problem):
        read_model_shape(write_config(tmp_path, config))


@pytest.mark.parametrize(
    "content", [b"", b"\x05\x00\x00\x00\x00\x00\x00\x00[1,2]", b'\x0f\0\0\0\0\0\0\0{"a": {"b": 1}}']
)
def test_a_broken_weights_file_is_refused(content: bytes, tmp_path: Path) -> None:
    write_config(tmp_path, LLAMA_3_8B)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadError, match="is no safetensors file"):
        read_model_shape(tmp_path)
