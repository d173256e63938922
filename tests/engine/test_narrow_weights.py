"""float32 models that are stored in bfloat16: the kernels take the weights as they are stored, and
compute the same bits. No load holds much more than the weights that it serves.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.load_memory import measure_loads
from benchmarks.random_models import save_llama
from kvrelay.engine import kernel_backend
from kvrelay.engine.kernel_backend import use_native_kernels
from kvrelay.engine.mapped_weights import READ_BYTES, stored_dtypes
from kvrelay.engine.model_loader import load_model
from kvrelay.engine.model_runner import LoadedModel
from kvrelay.engine.native import load_library
from tests.engine.test_bfloat16 import make_tied_model
from tests.engine.test_experts import save_in_mxfp4
from tests.engine.test_native_decoder import run_in_chunks, tokens
from tests.support import left_out
from tests.support.tiny_models import make_tiny_model

SLACK_BYTES = 64 * 1024 * 1024  # rows of a step, one layer that is being packed

pytestmark = pytest.mark.skipif(load_library() is None, reason=left_out.C_COMPILER)


def in_bfloat16(source: Path, folder: Path) -> Path:
    """The same model, stored in bfloat16."""
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    weights = {name: weight.bfloat16() for name, weight in load_file(source / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def load_both(folder: Path) -> tuple[LoadedModel, LoadedModel]:
    narrow, wide = (load_model(folder, "m", "float32", "cpu", for_kernels=for_kernels) for for_kernels in (True, False))
    assert narrow.is_narrow
    assert not wide.is_narrow
    assert narrow.weight_bytes < 0.6 * wide.weight_bytes
    assert narrow.spec == wide.spec, "workers pair, whether they have kernels or not"
    return narrow, wide


def check_same_bits(folder: Path, *, int8: bool) -> None:
    narrow, wide = (use_native_kernels(model, int8=int8) for model in load_both(folder))
    assert narrow.decoder is not None
    assert narrow.spec == wide.spec
    assert torch.equal(run_in_chunks(narrow, tokens(1), [70, 20]), run_in_chunks(wide, tokens(1), [70, 20]))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "qwen2", "gemma3_text", "qwen3_moe", "gpt_oss"])
def test_kernels_compute_the_same_bits(tiny_models: Path, tmp_path: Path, kind: str, int8: bool) -> None:
    check_same_bits(in_bfloat16(make_tiny_model(kind, tiny_models), tmp_path / kind), int8=int8)


def test_kernels_compute_the_same_bits_with_tied_embeddings(tmp_path: Path) -> None:
    check_same_bits(make_tied_model(tmp_path / "tied"), int8=False)


def test_kernels_compute_the_same_bits_of_experts_in_mxfp4(tiny_models: Path, tmp_path: Path) -> None:
    source = in_bfloat16(make_tiny_model("gpt_oss", tiny_models), tmp_path / "bfloat16")
    save_in_mxfp4(source, tmp_path / "mxfp4")
    assert stored_dtypes(tmp_path / "mxfp4") == {"BF16", "U8"}
    check_same_bits(tmp_path / "mxfp4", int8=False)


def test_what_the_kernels_cannot_take_as_a_whole_is_computed_alike(tmp_path: Path, tiny_models: Path) -> None:
    folder = in_bfloat16(make_tiny_model("gpt2", tiny_models), tmp_path / "gpt2")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"gelu_new"', '"relu"'))
    narrow, wide = map(use_native_kernels, load_both(folder))
    assert narrow.decoder is None
    computed, expected = (run_in_chunks(model, tokens(1), [70, 20]) for model in (narrow, wide))
    torch.testing.assert_close(computed, expected, rtol=1e-4, atol=1e-4)


def test_without_kernels_all_weights_become_float32(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = in_bfloat16(make_tiny_model("qwen3_moe", tiny_models), tmp_path / "model")
    narrow, wide = load_both(folder)
    monkeypatch.setattr(kernel_backend, "load_library", lambda variant: None)
    widened = use_native_kernels(narrow)
    assert not widened.is_narrow
    assert widened.weight_bytes == wide.weight_bytes
    assert all(weight.dtype == torch.float32 for weight in widened.module.state_dict().values())
    assert torch.equal(run_in_chunks(widened, tokens(1), [70, 20]), run_in_chunks(wide, tokens(1), [70, 20]))


def test_a_model_with_one_weight_in_float32_is_loaded_in_float32(tiny_models: Path, tmp_path: Path) -> None:
    folder = in_bfloat16(make_tiny_model("llama", tiny_models), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert not load_model(folder, "m", "float32", "cpu", for_kernels=True).is_narrow


def test_a_file_that_is_cut_short_has_no_types(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 9)
    assert stored_dtypes(tmp_path) == set()


@pytest.fixture(scope="module")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One with 57 million weights in two types, and a first one."""
    folder = tmp_path_factory.mktemp("small")
    stored = {
        dtype: save_llama(
            folder / dtype, dtype, vocab_size=16384, hidden_size=512, intermediate_size=2048, num_hidden_layers=12
        )
        for dtype in ("bfloat16", "float32")
    }
    first = save_llama(folder / "first", "bfloat16", vocab_size=512, hidden_size=64, intermediate_size=64)
    return {**stored, "first": first}


def test_a_load_holds_little_more_than_the_weights_that_it_serves(small_models: dict[str, Path]) -> None:
    """The weights, the pages that are read at once, and a layer."""
    served = (("float32", "none"), ("float32", "int8"), ("bfloat16", "none"))
    cases = [(small_models[stored], *each) for stored in ("bfloat16", "float32") for each in served]
    found = measure_loads(small_models["first"], *cases)
    assert len(found) == len(cases)
    for case, load in zip(cases, found, strict=True):
        most = load.weight_bytes + READ_BYTES + SLACK_BYTES
        if case[:2] == (small_models["float32"], "bfloat16"):  # rounded by transformers, which reads all pages
            most += 2 * load.weight_bytes
        assert load.peak_bytes <= most, (case, load)
    assert found[0].weight_bytes > 200_000_000
