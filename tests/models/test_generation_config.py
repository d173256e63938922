"""What a model's authors recommend to sample with, as generation_config.json says it, well or
badly.
"""

import json
from pathlib import Path

import pytest

from kvrelay.core.sampling_params import SamplingDefaults, SamplingParams
from kvrelay.models.generation_config import read_sampling_defaults


def read(folder: Path, content: object) -> SamplingDefaults:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "generation_config.json").write_text(text)
    return read_sampling_defaults(folder)


def test_what_is_stated_is_read_and_nothing_else(tmp_path: Path) -> None:
    config = {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "do_sample": True,
        "eos_token_id": 2,
    }
    assert read(tmp_path, config) == SamplingDefaults(0.7, 20, 0.8, None, 1.05)
    assert read(tmp_path, {"do_sample": False, "min_p": 0.1}) == SamplingDefaults(min_p=0.1)


@pytest.mark.parametrize("top_k", [-1, 0, 0.0])
def test_both_ways_to_keep_all_tokens_are_known(tmp_path: Path, top_k: float) -> None:
    assert read(tmp_path, {"top_k": top_k}) == SamplingDefaults(top_k=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("temperature", True),
        ("top_k", 1.5),
        ("top_k", -2),
        ("top_k", 10**40),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", [0.9]),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", 10**400),
    ],
)
def test_a_value_out_of_range_is_left_out_alone(tmp_path: Path, name: str, value: object) -> None:
    sane = {"temperature": 0.6, "top_p": 0.9}
    expected = SamplingDefaults(**{key: number for key, number in sane.items() if key != name})  # type: ignore[arg-type]
    assert read(tmp_path, sane | {name: value}) == expected


@pytest.mark.parametrize("content", ["{", "[]", "null", "\x00", "[" * 100_000])
def test_a_broken_file_recommends_nothing(tmp_path: Path, content: str) -> None:
    assert read(tmp_path, content) == SamplingDefaults()


def test_a_model_without_the_file_recommends_nothing(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == SamplingDefaults()


def test_what_a_request_gives_wins_also_when_it_is_kvrelays_own_default() -> None:
    defaults = SamplingDefaults(0.6, 20, 0.95, 0.05, 1.1)
    sampling = SamplingParams(temperature=1.0, top_k=0, max_tokens=5)
    assert defaults.apply(sampling, {"temperature", "top_k"}) == SamplingParams(1.0, 0, 0.95, 0.05, 1.1, max_tokens=5)
    assert defaults.apply(sampling, ()) == SamplingParams(0.6, 20, 0.95, 0.05, 1.1, max_tokens=5)
    assert SamplingDefaults().apply(sampling, ()) == sampling
