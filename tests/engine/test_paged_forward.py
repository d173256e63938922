"""Paged attention against transformers, for every architecture that is served: prompts in chunks,
decoding in mixed batches.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvrelay.engine.kernel_batch import SequenceInput
from kvrelay.engine.model_loader import load_model
from kvrelay.engine.model_runner import LoadedModel, ModelRunner
from kvrelay.engine.paged_kv_cache import PagedKVCache
from kvrelay.kv_transfer.layout import KVSpan
from tests.engine.paged_generation import PagedGeneration, RunningPrompt, exported_kv
from tests.support.reference import NearTies, Reference
from tests.support.tiny_models import SLIDING_WINDOW_TOKENS, TINY_KINDS, VOCAB_SIZE, make_tiny_model

NUM_GENERATED = 12
PROMPTS = [
    [(7 * i * i + 13 * i + 3 + 31 * n) % VOCAB_SIZE for i in range(length)] for n, length in enumerate((27, 1, 9, 40))
]
assert len(PROMPTS[0]) > SLIDING_WINDOW_TOKENS

Load = Callable[[str], LoadedModel]


@pytest.fixture(scope="module")
def load(tiny_models: Path) -> Load:
    @cache
    def loaded(kind: str) -> LoadedModel:
        return load_model(make_tiny_model(kind, tiny_models), kind, "float32", "cpu")

    return loaded


@pytest.fixture(scope="module")
def reference(tiny_models: Path) -> Callable[[str], Reference]:
    return cache(lambda kind: Reference(make_tiny_model(kind, tiny_models)))


@pytest.fixture(scope="module")
def full_logits(tiny_models: Path) -> Callable[[str, list[int]], torch.Tensor]:
    """Logits of transformers' eager attention for all positions of a sequence, in one forward:
    [num_tokens, vocab_size].
    """

    @cache
    def eager(kind: str) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(
            make_tiny_model(kind, tiny_models), dtype=torch.float32, attn_implementation="eager"
        )
        return model.eval()

    def logits(kind: str, token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            result: torch.Tensor = eager(kind)(torch.tensor([token_ids]), use_cache=False).logits[0]
        return result

    return logits


@pytest.mark.parametrize("kind", TINY_KINDS)
@pytest.mark.parametrize(("chunk_tokens", "block_size"), [(64, 4), (5, 16), (1, 4)])
def test_logits_and_tokens_equal_transformers(
    kind: str,
    chunk_tokens: int,
    block_size: int,
    load: Load,
    reference: Callable[[str], Reference],
    full_logits: Callable[[str, list[int]], torch.Tensor],
) -> None:
    generation = PagedGeneration(load(kind), block_size=block_size)
    first = generation.start(PROMPTS[0], chunk_tokens)
    generation.generate(first, 2)
    # The others come while the first decodes, so that steps mix prompt chunks with decode tokens.
    items = [first, *(generation.start(prompt, chunk_tokens) for prompt in PROMPTS[1:])]
    for item in items:
        generation.generate(item, NUM_GENERATED)
    ties = NearTies()
    for item in items:
        reference(kind).check(item.token_ids[: item.num_prompt_tokens], item.generated[:NUM_GENERATED], ties)
        _assert_logits_equal(item, full_logits(kind, item.token_ids[: item.num_computed]))
    assert len(ties.places) <= 2, str(ties)
    assert len({token_id for item in items for token_id in item.generated}) > 10, "a test on one token proves little"


def _assert_logits_equal(item: RunningPrompt, expected: torch.Tensor) -> None:
    chunk_ends = [*range(item.chunk_tokens, item.num_prompt_tokens, item.chunk_tokens), item.num_prompt_tokens]
    positions = [end - 1 for end in chunk_ends] + list(range(item.num_prompt_tokens, item.num_computed))
    torch.testing.assert_close(torch.stack(item.logits), expected[positions], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gpt_oss", "mistral"])
def test_a_sequence_gives_the_same_alone_and_in_a_batch(kind: str, load: Load) -> None:
    alone = PagedGeneration(load(kind))
    in_batch = PagedGeneration(load(kind))
    one = alone.start(PROMPTS[2], 4)
    other = in_batch.start(PROMPTS[2], 4)
    for prompt in PROMPTS:
        in_batch.start(prompt, 7)
    alone.generate(one, 20)
    in_batch.generate(other, 20)
    assert one.generated == other.generated
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(other.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_sequences_of_very_different_lengths_decode_together(
    kind: str, load: Load, full_logits: Callable[[str, list[int]], torch.Tensor]
) -> None:
    generation = PagedGeneration(load(kind), num_blocks=256)
    prompts = [[(11 * i + length) % VOCAB_SIZE for i in range(length)] for length in (400, 3, 150, 60, 290)]
    items = [generation.start(prompt, 512) for prompt in prompts]
    for _ in range(4):
        generation.step()
    for item in items:
        expected = full_logits(kind, item.token_ids[: item.num_computed])
        torch.testing.assert_close(
            torch.stack(item.logits), expected[item.num_prompt_tokens - 1 :], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_long_chunks_are_attended_to_in_pieces(
    kind: str, load: Load, full_logits: Callable[[str, list[int]], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvrelay.engine.paged_attention.MAX_SCORE_ELEMENTS", 4 * 40 * 7)
    generation = PagedGeneration(load(kind))
    item = generation.start(PROMPTS[3], 23)
    generation.generate(item, 1)
    _assert_logits_equal(item, full_logits(kind, PROMPTS[3]))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "mistral"])
def test_what_others_left_behind_in_a_block_is_never_read(kind: str, load: Load) -> None:
    model = load(kind)
    clean, poisoned = PagedGeneration(model), PagedGeneration(model)
    poisoned.cache._pool.fill_(float("nan"))
    items = [(generation.start(PROMPTS[2], 4), generation.start(PROMPTS[3], 64)) for generation in (clean, poisoned)]
    for generation in (clean, poisoned):
        for _ in range(12):
            generation.step()
    for expected, actual in zip(*items, strict=True):
        assert torch.isfinite(torch.stack(actual.logits)).all()
        assert torch.equal(torch.stack(actual.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(
    kind: str, dtype: str, tiny_models: Path, full_logits: Callable[[str, list[int]], torch.Tensor]
) -> None:
    model = load_model(make_tiny_model(kind, tiny_models), kind, dtype, "cpu")
    assert model.spec.kv_layout.dtype == dtype
    generation = PagedGeneration(model)
    item = generation.start(PROMPTS[0], 10)
    generation.generate(item, 6)
    logits = torch.stack(item.logits)
    assert logits.dtype == torch.float32
    expected = full_logits(kind, item.token_ids[: item.num_computed])[[9, 19, *range(26, item.num_computed)]]
    similarity = torch.cosine_similarity(logits, expected, dim=-1)
    assert float(similarity.median()) > 0.99


def test_layers_are_announced_in_order_with_their_kv_in_the_pool(load: Load) -> None:
    model = load("llama")
    cache_ = PagedKVCache(model.spec.kv_layout, 8, 4)
    blocks = [3, 1]
    written: dict[int, torch.Tensor] = {}

    def on_layer_written(layer: int) -> None:
        written[layer] = exported_kv(cache_, KVSpan(layer, layer + 1, 0, 6), blocks)

    ModelRunner(model, cache_).run([SequenceInput(PROMPTS[0][:6], 0, blocks, num_logits=1)], on_layer_written)
    assert list(written) == [0, 1]
    for layer, exported in written.items():
        assert torch.equal(exported, exported_kv(cache_, KVSpan(layer, layer + 1, 0, 6), blocks))
        assert exported.any()


def test_only_wanted_rows_have_logits(load: Load) -> None:
    model = load("llama")
    runner = ModelRunner(model, PagedKVCache(model.spec.kv_layout, 16, 4))
    batch = [
        SequenceInput(PROMPTS[0][:5], 0, [0, 1], num_logits=0),
        SequenceInput(PROMPTS[2], 0, [2, 3, 4], num_logits=1),
    ]
    both = runner.run(batch)
    assert both.shape == (1, VOCAB_SIZE)
    torch.testing.assert_close(both, runner.run(batch[1:]), atol=1e-4, rtol=1e-4)
    assert runner.run(batch[:1]).shape == (0, VOCAB_SIZE)


@pytest.mark.parametrize("keeps_logits", [True, False])
def test_the_last_rows_of_an_input_have_logits_in_order(load: Load, keeps_logits: bool) -> None:
    model = load("llama")
    runner = ModelRunner(model, PagedKVCache(model.spec.kv_layout, 16, 4))
    runner._keeps_logits = keeps_logits
    first, second = (
        SequenceInput(PROMPTS[0][:5], 0, [0, 1], num_logits=5),
        SequenceInput(PROMPTS[2][:9], 0, [2, 3, 4], num_logits=2),
    )
    logits = runner.run([first, second])
    assert logits.shape == (7, VOCAB_SIZE)
    expected = [runner.run([SequenceInput(PROMPTS[0][:end], 0, [0, 1], num_logits=1)]) for end in range(1, 6)]
    expected += [runner.run([SequenceInput(PROMPTS[2][:end], 0, [2, 3, 4], num_logits=1)]) for end in (8, 9)]
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_a_model_without_logits_to_keep_computes_all_and_returns_the_sampled(load: Load) -> None:
    model = load("llama")
    runner = ModelRunner(model, PagedKVCache(model.spec.kv_layout, 16, 4))
    batch = [
        SequenceInput(PROMPTS[0][:5], 0, [0, 1], num_logits=0),
        SequenceInput(PROMPTS[2], 0, [2, 3, 4], num_logits=1),
    ]
    expected = runner.run(batch)
    runner._keeps_logits = False
    torch.testing.assert_close(runner.run(batch), expected, atol=1e-4, rtol=1e-4)
