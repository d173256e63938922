import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from kvrelay.core.model_spec import KVLayout
from kvrelay.engine.kernel_batch import SequenceInput
from kvrelay.engine.model_loader import load_model
from kvrelay.engine.native import load_library
from kvrelay.engine.paged_kv_cache import PagedKVCache
from kvrelay.errors import TransferError
from kvrelay.kv_cache.block_manager import BlockCopy
from kvrelay.kv_transfer.layout import KVSpan
from tests.engine.paged_generation import PagedGeneration, exported_kv, slots_of
from tests.support import left_out
from tests.support.tiny_models import VOCAB_SIZE, make_tiny_model

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype="float32")
BLOCKS = [5, 0, 3]
"""Out of order, so that block numbers and positions cannot be mistaken for each other."""
PROMPT = [(5 * i * i + i + 9) % VOCAB_SIZE for i in range(23)]


def make_cache(layout: KVLayout = LAYOUT, block_size: int = 4, num_blocks: int = 8) -> PagedKVCache:
    return PagedKVCache(layout, num_blocks, block_size)


def fill(cache: PagedKVCache, blocks: list[int], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes random K and V, and returns them: each [num_layers, num_tokens, num_kv_heads,
    head_dim].
    """
    layout = cache.layout
    shape = (layout.num_layers, num_tokens, layout.num_kv_heads, layout.head_dim)
    dtype = getattr(torch, layout.dtype)
    key, value = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    slots = slots_of(cache, blocks, num_tokens)
    for layer in range(layout.num_layers):
        cache.write(layer, slots, key[layer], value[layer])
    return key, value


def as_bytes(exported: torch.Tensor) -> bytes:
    return bytes(exported.numpy().data)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_export_gives_layers_then_k_and_v_then_tokens(dtype: str) -> None:
    cache = make_cache(KVLayout(3, 2, 8, dtype))
    key, value = fill(cache, BLOCKS, 11)
    exported = exported_kv(cache, KVSpan(1, 3, 2, 9), BLOCKS)
    # [2, 2, 7, num_kv_heads, head_dim]
    expected = torch.stack((key[1:3, 2:9], value[1:3, 2:9]), dim=1)
    assert exported.is_contiguous()
    assert exported.dtype == torch.uint8
    assert exported.shape == (2, 2, 7, 2, 8 * expected.element_size())
    assert as_bytes(exported) == as_bytes(expected.contiguous().view(torch.uint8))
    assert exported.numel() == KVSpan(0, 2, 0, 7).num_bytes(cache.layout)


def test_export_does_not_change_when_the_pool_does() -> None:
    cache = make_cache()
    fill(cache, BLOCKS, 11)
    exported = exported_kv(cache, KVSpan(0, 3, 0, 11), BLOCKS)
    before = as_bytes(exported)
    fill(cache, BLOCKS, 11)
    assert as_bytes(exported) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_puts_bytes_into_other_blocks_of_another_size(dtype: str) -> None:
    layout = KVLayout(3, 2, 8, dtype)
    source, target = make_cache(layout), make_cache(layout, block_size=16, num_blocks=2)
    fill(source, BLOCKS, 11)
    for layer_begin, layer_end in ((0, 1), (1, 3)):
        for token_begin, token_end in ((0, 5), (5, 11)):
            payload = as_bytes(exported_kv(source, KVSpan(layer_begin, layer_end, token_begin, token_end), BLOCKS))
            target.import_kv(memoryview(payload), KVSpan(layer_begin, layer_end, token_begin, token_end), [1])
    assert torch.equal(exported_kv(target, KVSpan(0, 3, 0, 11), [1]), exported_kv(source, KVSpan(0, 3, 0, 11), BLOCKS))
    assert not exported_kv(target, KVSpan(0, 3, 0, 16), [0]).any()


@pytest.mark.parametrize("change", [-1, 1, -64])
def test_import_refuses_a_payload_of_another_length_and_writes_nothing(change: int) -> None:
    source, target = make_cache(), make_cache()
    fill(source, BLOCKS, 11)
    payload = as_bytes(exported_kv(source, KVSpan(0, 3, 0, 11), BLOCKS))
    broken = payload[:change] if change < 0 else payload + bytes(change)
    with pytest.raises(TransferError, match="bytes"):
        target.import_kv(broken, KVSpan(0, 3, 0, 11), BLOCKS)
    assert not target._pool.any()


@pytest.mark.parametrize(
    ("layers", "tokens"), [((0, 4), (0, 4)), ((2, 1), (0, 4)), ((0, 3), (0, 13)), ((0, 3), (4, 2))]
)
def test_ranges_outside_of_model_and_blocks_are_a_defect(layers: tuple[int, int], tokens: tuple[int, int]) -> None:
    cache = make_cache()
    with pytest.raises(AssertionError):
        cache.export_kv(memoryview(bytearray()), KVSpan(*layers, *tokens), BLOCKS)
    with pytest.raises(AssertionError):
        cache.import_kv(b"", KVSpan(*layers, *tokens), BLOCKS)


def test_copies_are_made_in_order() -> None:
    cache = make_cache()
    fill(cache, BLOCKS, 12)
    first, second = exported_kv(cache, KVSpan(0, 3, 0, 4), [5]), exported_kv(cache, KVSpan(0, 3, 0, 4), [0])
    # Block 5 is copied, then given up and taken as the target of another copy.
    cache.copy_blocks([BlockCopy(5, 6), BlockCopy(0, 5)])
    assert torch.equal(exported_kv(cache, KVSpan(0, 3, 0, 4), [6]), first)
    assert torch.equal(exported_kv(cache, KVSpan(0, 3, 0, 4), [5]), second)
    cache.copy_blocks([])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequence_continues_on_another_cache_with_the_same_tokens(kind: str, dtype: str, tiny_models: Path) -> None:
    model = load_model(make_tiny_model(kind, tiny_models), kind, dtype, "cpu")
    num_layers = model.spec.kv_layout.num_layers
    prefill, decode = PagedGeneration(model, block_size=4), PagedGeneration(model, block_size=16)
    here = prefill.start(PROMPT, 8)
    prefill.generate(here, 1)
    there = decode.start(PROMPT, 1)
    for token_begin, token_end in ((0, 8), (8, 16), (16, 23)):
        payload = as_bytes(exported_kv(prefill.cache, KVSpan(0, num_layers, token_begin, token_end), here.table.blocks))
        decode.cache.import_kv(payload, KVSpan(0, num_layers, token_begin, token_end), there.table.blocks)
    there.token_ids.append(here.generated[0])
    there.num_computed = len(PROMPT)
    assert decode.generate(there, 20) == prefill.generate(here, 20)
    assert len(set(here.generated)) > 5


def test_other_threads_export_and_import_while_a_step_runs(tiny_models: Path) -> None:
    model = load_model(make_tiny_model("llama", tiny_models), "llama", "float32", "cpu")
    undisturbed, disturbed = PagedGeneration(model, num_blocks=64), PagedGeneration(model, num_blocks=64)
    expected = undisturbed.generate(undisturbed.start(PROMPT, 8), 60)
    item = disturbed.start(PROMPT, 8)
    own, cache = [50, 51, 52], disturbed.cache
    assert not set(own) & set(item.table.blocks)
    payload = torch.randint(0, 60, (KVSpan(0, 2, 0, 12).num_bytes(cache.layout),), dtype=torch.uint8)
    errors: list[BaseException] = []
    stop = threading.Event()
    rounds = []

    def transfer() -> None:
        try:
            while not stop.is_set():
                cache.import_kv(payload.numpy().data, KVSpan(0, 2, 0, 12), own)
                assert torch.equal(exported_kv(cache, KVSpan(0, 2, 0, 12), own).reshape(-1), payload)
                rounds.append(1)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=transfer)
    thread.start()
    generated = disturbed.generate(item, 60)
    stop.set()
    thread.join(timeout=30)
    assert not errors
    assert rounds
    assert generated == expected


def test_a_step_may_write_two_chunks_of_one_pool_at_once(tiny_models: Path) -> None:
    model = load_model(make_tiny_model("llama", tiny_models), "llama", "float32", "cpu")
    together, apart = PagedGeneration(model), PagedGeneration(model)
    a, b = SequenceInput(PROMPT[:7], 0, [9, 4], num_logits=1), SequenceInput(PROMPT[3:15], 0, [1, 7, 2], num_logits=1)
    together.runner.run([a, b])
    for one in (a, b):
        apart.runner.run([one])
    for one in (a, b):
        span = KVSpan(0, 2, 0, len(one.token_ids))
        expected = exported_kv(apart.cache, span, one.block_ids).view(torch.float32)
        computed = exported_kv(together.cache, span, one.block_ids).view(torch.float32)
        torch.testing.assert_close(computed, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("token_begin", "token_end"), [(0, 11), (2, 9), (4, 8), (5, 6), (3, 12)])
def test_kernels_copy_the_same_bytes_as_torch_and_touch_no_others(dtype: str, token_begin: int, token_end: int) -> None:
    library = load_library()
    if library is None:
        pytest.skip(left_out.C_COMPILER)
    layout = KVLayout(num_layers=3, num_kv_heads=2, head_dim=24, dtype=dtype)
    by_torch, by_kernels = PagedKVCache(layout, 8, 4), PagedKVCache(layout, 8, 4, kernels=library)
    everything = list(range(8))
    before = np.random.default_rng(0).bytes(KVSpan(0, 3, 0, 32).num_bytes(layout))
    payload = np.random.default_rng(1).bytes(KVSpan(0, 2, 0, token_end - token_begin).num_bytes(layout))
    for cache in (by_torch, by_kernels):
        cache.import_kv(before, KVSpan(0, 3, 0, 32), everything)
        cache.import_kv(payload, KVSpan(1, 3, token_begin, token_end), BLOCKS)
        assert as_bytes(exported_kv(cache, KVSpan(1, 3, token_begin, token_end), BLOCKS)) == payload
    first, second = (exported_kv(cache, KVSpan(0, 3, 0, 32), everything) for cache in (by_kernels, by_torch))
    assert as_bytes(first) == as_bytes(second)


def test_kernels_refuse_a_block_that_is_not_in_the_pool() -> None:
    library = load_library()
    if library is None:
        pytest.skip(left_out.C_COMPILER)
    cache = PagedKVCache(KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32"), 2, 4, kernels=library)
    for block in (-1, 2):
        with pytest.raises(AssertionError, match="outside of the pool"):
            exported_kv(cache, KVSpan(0, 1, 0, 8), [0, block])
