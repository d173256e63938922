"""KV in int8: how far it is from what was written, and the same bits however a token comes to be
computed.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvrelay.config.settings import EngineSettings
from kvrelay.core.model_spec import KVLayout
from kvrelay.engine.kernel_backend import use_native_kernels, with_kv_dtype
from kvrelay.engine.kernel_batch import SequenceInput
from kvrelay.engine.model_loader import load_model
from kvrelay.engine.model_runner import LoadedModel, ModelRunner
from kvrelay.engine.native import load_library
from kvrelay.engine.native.library import KV_DTYPES, KVLayer
from kvrelay.engine.paged_kv_cache import PagedKVCache
from kvrelay.errors import ConfigError, ModelLoadError
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.worker.engine_setup import build_engine
from tests.engine.paged_generation import exported_kv, slots_of
from tests.engine.test_native_decoder import BLOCK_SIZE, blocks, load, run_in_chunks, runner_of, tokens
from tests.support import left_out
from tests.support.tiny_models import make_tiny_model

FUSED, IN_TORCH = "llama", "gpt_neox"
NUM_TOKENS = 120  # two tiles of keys

needs_kernels = pytest.mark.skipif(load_library() is None, reason=left_out.C_COMPILER)


def int8_kv(folder: Path, kind: str, *, int8: bool = False) -> LoadedModel:
    model = with_kv_dtype(use_native_kernels(load(folder, kind), int8=int8), "int8")
    assert (model.decoder is not None) == (kind == FUSED)
    return model


def read_back(cache: PagedKVCache, num_tokens: int) -> Tensor:
    """What the pool's bytes stand for: [layers, 2, tokens, num_kv_heads, head_dim]."""
    rows = exported_kv(cache, KVSpan(0, cache.layout.num_layers, 0, num_tokens), [1, 0])
    head_dim = cache.layout.head_dim
    return rows[..., :head_dim].view(torch.int8) * rows[..., head_dim:].contiguous().view(torch.float32)


def write(cache: PagedKVCache, key: Tensor, value: Tensor) -> None:
    library = load_library()
    assert library is not None
    slots = slots_of(cache, [1, 0], len(key))
    layout = cache.layout
    keys, values = cache.layer_addresses(0)
    kv = KVLayer(keys, values, KV_DTYPES[layout.dtype], cache.block_size, layout.num_kv_heads, layout.head_dim)
    library.write_kv(kv, len(key), slots.data_ptr(), key.data_ptr(), value.data_ptr())


@needs_kernels
def test_a_number_is_off_by_at_most_half_a_step_of_its_own_head_and_token() -> None:
    cache = PagedKVCache(KVLayout(num_layers=1, num_kv_heads=2, head_dim=48, dtype="int8"), num_blocks=2, block_size=16)
    # an outlier of one token is nothing to another
    scales = torch.logspace(-20, 20, 30).view(30, 1, 1)
    key, value = torch.randn(30, 2, 48) * scales, torch.randn(30, 2, 48) * scales.flip(0)
    key[3] = 0
    key[4] = 1e-42
    write(cache, key, value)
    kept = read_back(cache, 30)[0]
    for written, read in ((key, kept[0]), (value, kept[1])):
        half_step = written.abs().amax(dim=-1, keepdim=True) / 127 / 2
        assert ((written - read).abs() <= half_step * 1.001 + 1e-38).all()
    assert not kept[0, 3:5].any()


@needs_kernels
def test_the_pool_has_a_byte_for_each_number_and_four_for_each_row() -> None:
    cache = PagedKVCache(KVLayout(num_layers=2, num_kv_heads=3, head_dim=64, dtype="int8"), num_blocks=4, block_size=8)
    assert cache.pool_bytes == 2 * 2 * 4 * 8 * 3 * (64 + 4) == 32 * cache.layout.bytes_per_token
    assert KVSpan(0, 2, 0, 32).num_bytes(cache.layout) == cache.pool_bytes


@needs_kernels
@pytest.mark.parametrize("kind", [FUSED, IN_TORCH, "gpt2", "gpt_bigcode", "mistral", "qwen3"])
def test_logits_are_near_those_with_kv_in_float32(tiny_models: Path, kind: str) -> None:
    model = use_native_kernels(load(tiny_models, kind))
    smaller = with_kv_dtype(model, "int8")
    expected = run_in_chunks(model, tokens(7), [60, 1, 29])
    computed = run_in_chunks(smaller, tokens(7), [60, 1, 29])
    assert not torch.equal(computed, expected)
    assert torch.cosine_similarity(computed, expected, dim=-1).min() > 0.99
    assert smaller.spec.fingerprint != model.spec.fingerprint
    assert smaller.spec.kv_layout.bytes_per_token * 16 * 4 == model.spec.kv_layout.bytes_per_token * 20


@needs_kernels
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kind", [FUSED, "gpt2", "mistral", "gpt_oss", IN_TORCH])
def test_rows_are_the_same_bits_in_one_chunk_in_many_and_one_by_one(tiny_models: Path, kind: str, int8: bool) -> None:
    model = with_kv_dtype(use_native_kernels(load(tiny_models, kind), int8=int8), "int8")
    ids = tokens(2, NUM_TOKENS)
    whole = run_in_chunks(model, ids, [NUM_TOKENS])
    for lengths in ([65, 55], [7] * 17 + [1], [1] * NUM_TOKENS):
        computed = run_in_chunks(model, ids, lengths)
        if model.decoder is not None:
            assert torch.equal(computed, whole)
        else:  # norms and activations are torch's, whose last bits may differ with the number of rows
            torch.testing.assert_close(computed, whole, rtol=1e-3, atol=1e-3)


@needs_kernels
@pytest.mark.parametrize("kind", [FUSED, IN_TORCH])
def test_rows_are_the_same_bits_alone_and_beside_fifteen_others(tiny_models: Path, kind: str) -> None:
    model = int8_kv(tiny_models, kind)
    alone = run_in_chunks(model, tokens(3, 73), [72, 1])[-1]
    runner = ModelRunner(model, PagedKVCache(model.spec.kv_layout, 16 * 20, BLOCK_SIZE))
    batch = [
        (
            tokens(3 if number == 5 else 20 + number, 73 + (number != 5) * number % 7),
            list(range(20 * number, 20 * number + 20)),
        )
        for number in range(16)
    ]
    runner.run([SequenceInput(ids[:-1], 0, table, num_logits=0) for ids, table in batch])
    together = runner.run([SequenceInput(ids[-1:], len(ids) - 1, table, num_logits=1) for ids, table in batch])
    if model.decoder is not None:
        assert torch.equal(together[5], alone)
    else:
        torch.testing.assert_close(together[5], alone, rtol=1e-3, atol=1e-3)


@needs_kernels
def test_rows_are_the_same_bits_on_one_thread_and_on_three(tiny_models: Path) -> None:
    model = int8_kv(tiny_models, FUSED)
    assert model.kernels is not None
    one = run_in_chunks(model, tokens(4), [80, 10])
    model.kernels.use_threads(3)
    try:
        assert torch.equal(run_in_chunks(model, tokens(4), [80, 10]), one)
    finally:
        model.kernels.use_threads(1)


@needs_kernels
@pytest.mark.parametrize("kind", [FUSED, IN_TORCH])
def test_a_sequence_goes_on_with_the_same_bits_in_a_pool_that_imported_its_kv(tiny_models: Path, kind: str) -> None:
    model = int8_kv(tiny_models, kind)
    layout, ids = model.spec.kv_layout, tokens(5, 101)
    source = runner_of(model)
    source.run([SequenceInput(ids[:100], 0, blocks(0), num_logits=0)])
    expected = source.run([SequenceInput(ids[100:], 100, blocks(0), num_logits=1)])
    target = PagedKVCache(layout, 8, 16)
    table = [6, 1, 4, 0, 7, 2, 5]
    for begin, end in ((0, 64), (64, 67), (67, 100)):
        payload = exported_kv(source.cache, KVSpan(0, layout.num_layers, begin, end), blocks(0)).numpy().tobytes()
        assert len(payload) == (end - begin) * layout.bytes_per_token
        target.import_kv(payload, KVSpan(0, layout.num_layers, begin, end), table)
    assert torch.equal(ModelRunner(model, target).run([SequenceInput(ids[100:], 100, table, num_logits=1)]), expected)


@needs_kernels
def test_attention_that_the_kernels_do_not_compute_is_refused_at_load(tiny_models: Path) -> None:
    model = use_native_kernels(load(tiny_models, "gemma2"))
    with pytest.raises(ModelLoadError, match=r"cannot keep KV in int8: its attention .*--kv-dtype auto"):
        with_kv_dtype(model, "int8")


def test_a_model_that_is_not_on_kernels_is_refused_at_load(tiny_models: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"cannot keep KV in int8: it is not on compiled kernels.*--kv-dtype auto"):
        with_kv_dtype(load(tiny_models, FUSED), "int8")
    half = load_model(make_tiny_model(FUSED, tiny_models), FUSED, "float16", "cpu")
    with pytest.raises(ModelLoadError, match=r"bfloat16 weights, not float16.*--kv-dtype auto"):
        with_kv_dtype(half, "int8")


def test_a_worker_without_kernels_does_not_start_with_kv_in_int8(tiny_models: Path) -> None:
    folder = make_tiny_model(FUSED, tiny_models)
    with pytest.raises(ConfigError, match=r"--kernels at auto.*--kv-dtype at auto"):
        build_engine(EngineSettings(model=str(folder), kernels="off", kv_dtype="int8"))
