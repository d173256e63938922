"""Compiled kernels: what transformers computes, and every row bit for bit the same however it comes
to be computed.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvrelay.engine.decoder_weights import CONV1D, LAYOUTS, is_experts
from kvrelay.engine.kernel_backend import use_native_kernels, with_kv_dtype
from kvrelay.engine.kernel_batch import SequenceInput
from kvrelay.engine.model_loader import load_model
from kvrelay.engine.model_runner import LoadedModel, ModelRunner
from kvrelay.engine.native import load_library
from kvrelay.engine.native_decoder import NativeDecoder
from kvrelay.engine.paged_kv_cache import PagedKVCache
from kvrelay.errors import ModelLoadError
from kvrelay.kv_transfer.layout import KVSpan
from tests.engine.paged_generation import PagedGeneration, exported_kv
from tests.support import left_out
from tests.support.reference import NearTies, Reference
from tests.support.tiny_models import TINY_KINDS, make_tiny_model

BLOCK_SIZE = 4
NUM_BLOCKS = 64
NUM_TOKENS = 90  # more than one tile of keys

pytestmark = pytest.mark.skipif(load_library() is None, reason=left_out.C_COMPILER)


def load(folder: Path, kind: str) -> LoadedModel:
    return load_model(make_tiny_model(kind, folder), kind, "float32", "cpu")


def fused(folder: Path, kind: str, *, int8: bool = False, kv_dtype: str = "auto") -> LoadedModel:
    model = with_kv_dtype(use_native_kernels(load(folder, kind), int8=int8), kv_dtype)
    assert isinstance(model.decoder, NativeDecoder)
    return model


def runner_of(model: LoadedModel) -> ModelRunner:
    return ModelRunner(model, PagedKVCache(model.spec.kv_layout, NUM_BLOCKS, BLOCK_SIZE))


def tokens(seed: int, count: int = NUM_TOKENS) -> list[int]:
    return torch.randint(3, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def blocks(first: int) -> list[int]:
    """Every second block from `first` on, backwards: no two neighbours of a sequence are neighbours
    in the pool.
    """
    return list(range(first, NUM_BLOCKS, 2))[::-1]


def run_in_chunks(model: LoadedModel, token_ids: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Logits of all tokens, computed in chunks of the given lengths."""
    runner = runner_of(model)
    parts, begin = [], 0
    for length in lengths:
        part = token_ids[begin : begin + length]
        parts.append(runner.run([SequenceInput(part, begin, blocks(0), num_logits=len(part))]))
        begin += length
    assert begin == len(token_ids)
    return torch.cat(parts)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_kernels_compute_what_transformers_computes(tiny_models: Path, kind: str) -> None:
    model = load(tiny_models, kind)
    expected = run_in_chunks(model, tokens(1), [70, 20])
    computed = run_in_chunks(use_native_kernels(model), tokens(1), [70, 20])
    torch.testing.assert_close(computed, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_greedy_tokens_are_those_of_transformers(tiny_models: Path, kind: str) -> None:
    generation = PagedGeneration(fused(tiny_models, kind))
    items = [generation.start(tokens(9 + length, length), 16) for length in (40, 3, 25)]
    reference, ties = Reference(make_tiny_model(kind, tiny_models)), NearTies()
    for item in items:
        generation.generate(item, 16)
        reference.check(item.token_ids[: item.num_prompt_tokens], item.generated[:16], ties)
    assert len(ties.places) <= 2, str(ties)
    assert len({token_id for item in items for token_id in item.generated}) > 10, "a test on one token proves little"


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_rows_are_the_same_bits_in_one_chunk_in_many_and_one_by_one(tiny_models: Path, kind: str, int8: bool) -> None:
    model = fused(tiny_models, kind, int8=int8)
    whole = run_in_chunks(model, tokens(2), [NUM_TOKENS])
    for lengths in ([65, 25], [7] * 12 + [6], [4] * 22 + [2], [1] * NUM_TOKENS):
        assert torch.equal(run_in_chunks(model, tokens(2), lengths), whole)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_rows_are_the_same_bits_alone_and_in_a_batch_of_16(tiny_models: Path, kind: str, int8: bool) -> None:
    model = fused(tiny_models, kind, int8=int8)
    alone = run_in_chunks(model, tokens(3, 13), [12, 1])[-1]
    runner = ModelRunner(model, PagedKVCache(model.spec.kv_layout, 16 * 8, BLOCK_SIZE))
    batch = [
        (tokens(3 if number == 5 else 20 + number, 13 + (number != 5) * number % 9), range(8 * number, 8 * number + 8))
        for number in range(16)
    ]
    runner.run([SequenceInput(ids[:-1], 0, list(table), num_logits=0) for ids, table in batch])
    together = runner.run([SequenceInput(ids[-1:], len(ids) - 1, list(table), num_logits=1) for ids, table in batch])
    assert torch.equal(together[5], alone)


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_rows_are_the_same_bits_on_one_thread_and_on_three(tiny_models: Path, kind: str) -> None:
    model = fused(tiny_models, kind)
    assert model.kernels is not None
    one = run_in_chunks(model, tokens(4), [80, 10])
    model.kernels.use_threads(3)
    try:
        assert torch.equal(run_in_chunks(model, tokens(4), [80, 10]), one)
    finally:
        model.kernels.use_threads(1)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_oss"])
def test_decoding_rows_are_the_same_bits_in_every_batch_on_any_number_of_threads(
    tiny_models: Path, kind: str, kv_dtype: str
) -> None:
    model = fused(tiny_models, kind, kv_dtype=kv_dtype)
    assert model.kernels is not None
    num_sequences, num_tokens, num_blocks = 16, [60 + 9 * number for number in range(16)], 50
    tables = [list(range(number, num_sequences * num_blocks, num_sequences)) for number in range(num_sequences)]
    runner = ModelRunner(model, PagedKVCache(model.spec.kv_layout, num_sequences * num_blocks, BLOCK_SIZE))
    prompts = [tokens(20 + number, count) for number, count in enumerate(num_tokens)]
    runner.run([SequenceInput(ids, 0, table, num_logits=0) for ids, table in zip(prompts, tables, strict=True)])
    last = [
        SequenceInput(ids[-1:], len(ids) - 1, table, num_logits=1) for ids, table in zip(prompts, tables, strict=True)
    ]
    alone = torch.cat([runner.run([step]) for step in last])
    try:
        for num_threads, batch_size in ((1, 16), (2, 16), (3, 16), (3, 4), (3, 1)):
            model.kernels.use_threads(num_threads)
            batches = [last[begin : begin + batch_size] for begin in range(0, 16, batch_size)]
            assert torch.equal(torch.cat([runner.run(batch) for batch in batches]), alone)
    finally:
        model.kernels.use_threads(1)


def test_layers_are_announced_in_order_and_their_kv_is_there(tiny_models: Path) -> None:
    model = fused(tiny_models, "llama")
    runner = runner_of(model)
    seen: list[tuple[int, bytes]] = []

    def note(layer: int) -> None:
        seen.append((layer, exported_kv(runner.cache, KVSpan(layer, layer + 1, 0, 10), blocks(0)).numpy().tobytes()))

    with_notes = runner.run([SequenceInput(tokens(5, 10), 0, blocks(0), num_logits=1)], note)
    assert [layer for layer, _ in seen] == [0, 1]
    expected = [exported_kv(runner.cache, KVSpan(n, n + 1, 0, 10), blocks(0)).numpy().tobytes() for n in (0, 1)]
    assert [kv for _, kv in seen] == expected
    assert any(any(kv) for _, kv in seen)
    assert torch.equal(with_notes, runner_of(model).run([SequenceInput(tokens(5, 10), 0, blocks(0), num_logits=1)]))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_int8_is_near_float32_and_has_another_fingerprint(tiny_models: Path, kind: str) -> None:
    model = fused(tiny_models, kind)
    quantized = fused(tiny_models, kind, int8=True)
    assert model.decoder is not None
    assert quantized.decoder is not None
    with model.decoder.comparable({}), quantized.decoder.comparable({}):  # rounding must not choose other experts
        expected = run_in_chunks(model, tokens(6), [NUM_TOKENS])
        computed = run_in_chunks(quantized, tokens(6), [NUM_TOKENS])
    assert not torch.equal(computed, expected)
    similarity = torch.cosine_similarity(computed, expected, dim=-1)
    assert similarity.median() > 0.99
    assert similarity.min() > (0.9 if LAYOUTS[kind].experts else 0.98)  # a router's softmax enlarges a difference
    assert quantized.spec.fingerprint != model.spec.fingerprint
    assert quantized.weight_bytes < model.weight_bytes


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_kv_in_bfloat16_takes_half_the_bytes_and_computes_nearly_the_same(tiny_models: Path, kind: str) -> None:
    model = use_native_kernels(load(tiny_models, kind))
    halved = with_kv_dtype(model, "bfloat16")
    assert halved.spec.kv_layout.bytes_per_token * 2 == model.spec.kv_layout.bytes_per_token
    assert halved.spec.fingerprint != model.spec.fingerprint
    expected = run_in_chunks(model, tokens(7), [60, 1, 29])
    computed = run_in_chunks(halved, tokens(7), [60, 1, 29])
    assert not torch.equal(computed, expected)
    assert torch.cosine_similarity(computed, expected, dim=-1).min() > 0.99


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_oss"])
def test_a_fused_model_lets_go_of_the_modules_weights(tiny_models: Path, kind: str) -> None:
    model = fused(tiny_models, kind)
    linears = [part for part in model.module.modules() if isinstance(part, (torch.nn.Linear, CONV1D))]
    assert len(linears) > 8
    assert all(part.weight.numel() == 0 for part in linears)
    experts = [part for part in model.module.modules() if is_experts(part)]
    assert len(experts) == (2 if kind == "gpt_oss" else 0)
    assert all(weight.numel() == 0 for part in experts for weight in part.parameters())


@pytest.mark.parametrize("kind", [kind for kind in TINY_KINDS if kind not in LAYOUTS])
def test_other_models_have_their_linear_layers_and_attention_in_kernels(tiny_models: Path, kind: str) -> None:
    expected = run_in_chunks(load(tiny_models, kind), tokens(1), [70, 1, 19])
    model = use_native_kernels(load(tiny_models, kind))
    assert model.decoder is None
    assert model.kernels is not None
    torch.testing.assert_close(run_in_chunks(model, tokens(1), [70, 1, 19]), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("int8", [False, True])
def test_a_step_in_which_nobody_samples_has_no_logits(tiny_models: Path, kind: str, int8: bool) -> None:
    model = use_native_kernels(load(tiny_models, kind), int8=int8)
    assert runner_of(model).run([SequenceInput(tokens(1), 0, blocks(0), num_logits=0)]).shape == (
        0,
        model.spec.vocab_size,
    )


def test_other_models_run_in_int8_too(tiny_models: Path) -> None:
    expected = run_in_chunks(load(tiny_models, "opt"), tokens(1), [70, 20])
    computed = run_in_chunks(use_native_kernels(load(tiny_models, "opt"), int8=True), tokens(1), [70, 20])
    assert not torch.equal(computed, expected)
    assert torch.cosine_similarity(computed, expected, dim=-1).min() > 0.98


def test_kernels_that_disagree_with_the_model_are_refused(tiny_models: Path) -> None:
    model = load(tiny_models, "qwen3")
    # not what its config says, which the kernels go by
    model.module.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    with pytest.raises(ModelLoadError, match="--kernels off"):
        use_native_kernels(model)


def test_half_precision_models_run_in_torch_and_refuse_int8(tiny_models: Path) -> None:
    model = load_model(make_tiny_model("llama", tiny_models), "llama", "float16", "cpu")
    assert use_native_kernels(model) is model
    with pytest.raises(ModelLoadError, match=r"cannot be served in int8.*--quantize none"):
        use_native_kernels(model, int8=True)
