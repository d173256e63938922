"""Each benchmark once, with the smallest model and the fewest tokens: it runs and writes its
document.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import engine, kv_cache, memory, perplexity, roofline, variants
from benchmarks.weight_choices import make_weights
from kvrelay.errors import ConfigError
from tests.support.tiny_models import make_tiny_model

NOT_QUANTIZED = make_weights(["none"], ["auto"], ["split"])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model("llama", tmp_path_factory.mktemp("models")))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """As many as before, whatever the benchmark sets."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def document(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def test_kv_cache_gives_the_same_tokens_with_and_without_the_cache(llama: str, tmp_path: Path) -> None:
    path = tmp_path / "kv-cache.json"
    kv_cache.command(tokens=5, model=[llama], rounds=1, threads=1, json=path)
    results = document(path)["results"]
    variants = {(result["engine"], result["has_cache"]) for result in results}
    assert variants == {(engine, has_cache) for engine in ("kvrelay", "transformers") for has_cache in (True, False)}
    assert all(result["num_equal_tokens"] == len(result["token_ms"]) == 5 for result in results)
    assert "32.1 ± 0.7 s" in document(path)["notes"][0]


def test_engine_measures_prefill_and_decode_beside_the_machines_limits(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "READ_BYTES", 2**20)
    monkeypatch.setattr(engine, "LimitMeter", partial(roofline.LimitMeter, matrix_size=64))
    path = tmp_path / "engine.json"
    engine.command(
        model=llama,
        threads=1,
        prompt_lengths="8,20",
        chunk_sizes="8,64",
        batch_sizes="1,3",
        context_lengths="16",
        rounds=2,
        steps=2,
        json=path,
        plots=tmp_path,
    )
    limits, *cases, _ = document(path)["results"]
    assert limits["limit_bytes_per_s"]["median"] > 0
    prefill = {(case["num_tokens"], case["chunk_tokens"]) for case in cases if case["phase"] == "prefill"}
    assert prefill == {(8, 8), (20, 8), (20, 20)}
    assert {case["batch_size"] for case in cases if case["phase"] == "decode"} == {1, 3}
    assert all(case["tokens_per_s"] > 0 and case["percent_of_bound"] > 0 for case in cases)
    assert (tmp_path / "engine-decode.png").is_file()


@pytest.mark.parametrize("restarts", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_variants_of_settings_take_turns_and_are_compared_with_the_first(
    llama: str, tmp_path: Path, restarts: int
) -> None:
    path = tmp_path / "variants.json"
    variants.command(
        model=llama,
        threads=1,
        kv_dtype=["float32", "bfloat16"],
        prompt_lengths="8",
        batch_sizes="2",
        context_lengths="16",
        restarts=restarts,
        rounds=2,
        steps=2,
        json=path,
    )
    head, *results = document(path)["results"]
    assert head["variants"] == ["KV float32", "KV bfloat16"]
    cases = [(result["phase"], result["num_tokens"], result["batch_size"], result["variant"]) for result in results]
    assert cases == [(*case, name) for case in (("prefill", 8, None), ("decode", 16, 2)) for name in head["variants"]]
    for first, second in (results[:2], results[2:]):
        assert (first["ratio"]["min"], first["ratio"]["max"]) == (1.0, 1.0)
        assert second["ratio"]["num_values"] == second["seconds"]["num_values"] == 2 * restarts
        assert (
            second["ratio"]["min"]
            <= second["ratio_quartiles"][0]
            <= second["ratio_quartiles"][1]
            <= second["ratio"]["max"]
        )


def test_variants_may_be_of_another_source_tree(tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "benchmarks").mkdir(parents=True)
    with pytest.raises(ConfigError, match="root of a checkout"):
        variants.make_variants([variants.THIS_TREE, other], NOT_QUANTIZED, ["auto"])
    (other / "benchmarks" / "engine_cases.py").touch()
    weights = make_weights(["none", "int8", "none"], ["auto"], ["split"])
    made = variants.make_variants([variants.THIS_TREE, other, other], weights, ["auto"])
    assert [(each.tree, each.settings.get("quantize")) for each in made] == [
        (variants.THIS_TREE, None),
        (variants.THIS_TREE, "int8"),
        (other, None),
        (other, "int8"),
    ]


def test_variants_may_be_of_other_kernels() -> None:
    made = variants.make_variants([variants.THIS_TREE], NOT_QUANTIZED, ["auto"], ["auto", "avx2", "portable"])
    assert [(each.name, each.settings["kernel_variant"]) for each in made] == [
        ("auto", None),
        ("avx2", "avx2"),
        ("portable", "portable"),
    ]


def test_bfloat16_stands_beside_float32_and_int8() -> None:
    weights = make_weights(["none", "int8"], ["auto", "bfloat16"], ["split", "plain"])
    made = variants.make_variants([variants.THIS_TREE], weights, ["auto"])
    assert [each.name for each in made] == ["none", "bfloat16", "bfloat16, plain", "int8"]
    assert made[2].settings["dtype"] == "bfloat16"
    assert made[2].settings["bfloat16_activations"] == "plain"
    assert "dtype" not in made[3].settings


def test_an_engine_that_cannot_be_loaded_ends_the_comparison(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the engine of variant 'KV float32' ended"):
        variants.command(model=str(tmp_path / "none"), threads=1, kv_dtype=["float32", "bfloat16"])
    with pytest.raises(ConfigError, match="only one variant"):
        variants.command(model=str(tmp_path / "none"), threads=1)


def test_perplexity_compares_choices_of_types(llama: str, tmp_path: Path) -> None:
    path = tmp_path / "perplexity.json"
    perplexity.command(
        model=llama, tokens=100, window=40, quantize=["none"], kv_dtype=["float32", "bfloat16"], threads=1, json=path
    )
    head, *results = document(path)["results"]
    assert head["num_scored_tokens"] == 39 + 39 + 19
    assert [(result["kv_dtype"], len(result["window_ratios"])) for result in results] == [
        ("float32", 3),
        ("bfloat16", 3),
    ]
    assert results[0]["ratio"] == 1.0
    assert results[1]["ratio"] == pytest.approx(1.0, abs=0.05)


def test_memory_finds_the_bytes_that_are_predicted(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    memory.command(requests=20, quick=True, threads=1, json=path)
    results = document(path)["results"]
    measured = [result for result in results if result["kind"] == "bytes"]
    assert {result["attention"] for result in measured} == {"MHA", "GQA", "MQA"}
    for result in measured:
        assert result["exported"] == result["general_formula_computed"]
        if result["kv_dtype"] != "int8":  # transformers' cache has the weights' type
            assert result["exported"] == result["transformers"]
        assert result["general_formula_computed"] <= result["general_formula"] <= result["blocks"]
    assert [result["mha_formula"] == result["general_formula"] for result in measured if result["mha_formula"]] == [
        True
    ]
    assert results[-1] == {"kind": "block_manager_holds_what_is_predicted", "value": True}
