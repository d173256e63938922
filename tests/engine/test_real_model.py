"""SmolLM2-135M-Instruct: paged generation against transformers, token for token."""

import os
import random
from pathlib import Path

import pytest
import xxhash

from kvrelay.engine.kernel_backend import use_native_kernels, with_kv_dtype
from kvrelay.engine.model_loader import load_model
from kvrelay.engine.model_probe import least_cosine
from kvrelay.engine.model_runner import LoadedModel
from kvrelay.engine.native import available_variants, load_library
from kvrelay.models.store import DEMO_MODEL, default_model_dir
from tests.engine.paged_generation import PagedGeneration
from tests.engine.test_native_decoder import run_in_chunks
from tests.support import left_out
from tests.support.reference import NearTies, Reference

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(600)]

VOCABULARY = 49_152
NUM_PORTABLE = 1
"""Prompts for the variant that takes a minute for each."""
NUM_GENERATED = 24
"""More than a block, so that each prompt's decode enters a new one."""
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Keys and values of a token depend on nothing that comes after it. " * 12 + "Therefore",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    stored = default_model_dir(os.environ) / DEMO_MODEL
    if not stored.is_dir():
        pytest.skip(left_out.DEMO_MODEL)
    return stored


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder, DEMO_MODEL, "float32", "cpu")


@pytest.mark.skipif(load_library() is None, reason=left_out.C_COMPILER)
def test_bfloat16_computes_what_float32_computes_with_the_rounded_weights(folder: Path) -> None:
    model = use_native_kernels(load_model(folder, DEMO_MODEL, "bfloat16", "cpu"))
    rounded = load_model(folder, DEMO_MODEL, "float32", "cpu")
    for tensor in rounded.module.state_dict().values():
        tensor.data.copy_(tensor.bfloat16())
    wide = use_native_kernels(rounded)
    assert model.weight_bytes < 0.42 * wide.weight_bytes  # which keeps tied embeddings twice
    token_ids = list(range(300, 364))
    logits = [run_in_chunks(with_kv_dtype(each, "float32"), token_ids, [64]) for each in (model, wide)]
    assert least_cosine(*logits) > 0.99999


@pytest.mark.soak
@pytest.mark.skipif(load_library() is None, reason=left_out.C_COMPILER)
@pytest.mark.parametrize(("dtype", "int8"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_all_variants_give_the_same_logits_to_64_prompts(folder: Path, dtype: str, int8: bool) -> None:
    chance = random.Random(64)
    prompts = [[chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 64))] for _ in range(64)]

    def digests(variant: str) -> list[int]:
        model = use_native_kernels(load_model(folder, DEMO_MODEL, dtype, "cpu"), int8=int8, variant=variant)
        chosen = prompts[:NUM_PORTABLE] if variant == "portable" else prompts
        logits = (run_in_chunks(model, prompt, [len(prompt)]) for prompt in chosen)
        return [xxhash.xxh3_64_intdigest(rows.numpy().tobytes()) for rows in logits]

    found = {variant: digests(variant) for variant in available_variants()}
    assert len(found) > 1
    first, *others = found.values()
    for other in others:
        num_common = min(len(first), len(other))
        assert other[:num_common] == first[:num_common]
    assert max(map(len, found.values())) == len(set(first + others[0])) == len(prompts)


@pytest.mark.parametrize(
    ("num_generated", "num_looped"), [(NUM_GENERATED, 1), pytest.param(64, len(PROMPTS), marks=pytest.mark.soak)]
)
def test_greedy_tokens_equal_transformers(
    folder: Path, model: LoadedModel, num_generated: int, num_looped: int
) -> None:
    """The first `num_looped` prompts' are what transformers' own loop gives; the others' are
    checked in one pass each.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    generation = PagedGeneration(model, num_blocks=128, block_size=16)
    items = [generation.start(prompt, 48) for prompt in prompts]
    for item in items:
        generation.generate(item, num_generated)
    reference, ties = Reference(folder), NearTies()
    for number, (prompt, item) in enumerate(zip(prompts, items, strict=True)):
        check = reference.check_by_generating if number < num_looped else reference.check
        check(prompt, item.generated[:num_generated], ties)
    print(ties)
    assert len(ties.places) <= 1, str(ties)
    assert "Paris" in tokenizer.decode(items[0].generated)


def test_spec_is_that_of_smollm2(model: LoadedModel) -> None:
    layout = model.spec.kv_layout
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim) == (30, 3, 64)
    assert model.spec.architecture == "llama"
    assert model.spec.max_context_tokens == 8192
    assert model.spec.eos_token_ids
