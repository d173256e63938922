"""`kvrelay bench attention` on a tiny random model: what it claims of KV holds."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention
from benchmarks.masked_model import MaskedModel, attention_mask
from kvrelay.engine.native.library import load_library
from kvrelay.errors import ConfigError
from tests.support import left_out
from tests.support.reference import Reference
from tests.support.tiny_models import make_tiny_model

NUM_LAYERS = 2


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """As many as before, whatever the benchmark sets."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def run(llama: Path, folder: Path, *, rounds: int, plots: bool = False) -> list[dict[str, Any]]:
    path = folder / "attention.json"
    attention.command(
        model=str(llama),
        prefix_tokens="70,9",
        new_tokens=5,
        continuations=2,
        prompts=3,
        tokens=8,
        rounds=rounds,
        threads=1,
        json=path,
        plots=folder if plots else None,
    )
    results: list[dict[str, Any]] = json.loads(path.read_text())["results"]
    return results


def of_kind(results: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [result for result in results if result["kind"] == kind]


@pytest.fixture(scope="module")
def results(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(llama, tmp_path_factory.mktemp("attention"), rounds=2)


def differences(results: list[dict[str, Any]], label: str) -> list[dict[str, Any]]:
    found = [result["differences"] for result in of_kind(results, "prefix") if result["label"] == label]
    assert len(found) == 2, "one of each length"
    return found


@pytest.mark.skipif(load_library() is None, reason=left_out.C_COMPILER)
def test_what_our_engine_computed_of_a_prefix_stays_whatever_follows(results: list[dict[str, Any]]) -> None:
    for each, num_tokens in zip(differences(results, "causal, kvrelay"), (9, 70), strict=True):
        assert each["num_elements"] == 2 * num_tokens * 2 * 16
        assert each["num_equal"] == [each["num_elements"]] * NUM_LAYERS
        assert each["max_difference"] == [0.0] * NUM_LAYERS


def test_under_two_way_attention_the_first_layer_alone_stays(results: list[dict[str, Any]]) -> None:
    for each, num_tokens in zip(differences(results, "two-way, transformers, same shape"), (9, 70), strict=True):
        first, second = each["num_equal"]
        assert first == each["num_elements"]
        assert second < each["num_elements"]
        assert each["num_stale_tokens"] == [0, num_tokens]
        assert each["max_difference"][1] > 1e-3


def test_in_matrices_of_one_shape_the_mask_alone_decides_what_stays(results: list[dict[str, Any]]) -> None:
    for each in differences(results, "causal, transformers, same shape"):
        assert each["num_equal"] == [each["num_elements"]] * NUM_LAYERS


def test_a_librarys_rounding_by_shape_is_small_beside_what_a_mask_does(results: list[dict[str, Any]]) -> None:
    causal, two_way = (differences(results, f"{form}, transformers, own shapes") for form in ("causal", "two-way"))
    for rounding, mask in zip(causal, two_way, strict=True):
        assert max(rounding["max_difference"]) < 1e-4 < mask["max_difference"][1]


def test_appending_computes_the_new_tokens_or_nearly_all(results: list[dict[str, Any]]) -> None:
    found = of_kind(results, "append")
    assert [(each["num_prefix_tokens"], each["causal_tokens"], each["two_way_layers"]) for each in found] == [
        (9, 5 * NUM_LAYERS, [5, 14]),
        (70, 5 * NUM_LAYERS, [5, 75]),
    ]
    assert [each["two_way_tokens"] for each in found] == [19, 80]
    assert all(each["time_ratio"]["num_values"] == 2 for each in found)


def test_kept_kv_gives_other_tokens_under_two_way_attention_only(results: list[dict[str, Any]]) -> None:
    causal, two_way = of_kind(results, "generation")
    assert causal["num_equal"] == [8, 8, 8]
    assert min(two_way["num_equal"]) < 8
    assert min(two_way["num_equal"]) >= 1, "the first token comes from the whole prompt in any case"


def test_without_rounds_nothing_is_timed_and_plots_are_drawn_where_wanted(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason=left_out.needs("matplotlib", "make install"))
    found = of_kind(run(llama, tmp_path, rounds=0, plots=True), "append")
    assert [(each["causal_ms"], each["two_way_ms"], each["time_ratio"]) for each in found] == [(None,) * 3] * 2
    assert (tmp_path / "attention-differences.png").is_file()


def test_lengths_that_are_no_numbers_are_refused() -> None:
    for text in ("", "0,5", "5,x"):
        with pytest.raises(ConfigError, match="--prefix-tokens"):
            attention.command(prefix_tokens=text)


def test_more_tokens_than_the_model_takes_are_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match="ask for fewer"):
        attention.command(model=str(llama), threads=1, prefix_tokens="9,510", new_tokens=5)
    with pytest.raises(ConfigError, match="ask for fewer"):
        attention.command(model=str(llama), threads=1, prefix_tokens="9", tokens=500)


def test_masks_say_who_sees_whom() -> None:
    def seen(mask: torch.Tensor) -> list[list[int]]:
        rows: list[list[int]] = mask[0, 0].int().tolist()
        return rows

    assert seen(attention_mask(3, 0, two_way=False)) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert seen(attention_mask(2, 1, two_way=False)) == [[1, 1, 0], [1, 1, 1]]
    assert seen(attention_mask(2, 1, two_way=True)) == [[1, 1, 1], [1, 1, 1]]
    assert seen(attention_mask(3, 0, two_way=True, num_seen=2)) == [[1, 1, 0]] * 3


def test_under_our_causal_mask_the_tokens_are_those_of_transformers(llama: Path) -> None:
    prompt = [7, 91, 13, 200, 55]
    ours = list(islice(MaskedModel(llama, 1).generate(prompt, two_way=False, keeps_cache=True), 12))
    assert Reference(llama).confirms(prompt, ours)
