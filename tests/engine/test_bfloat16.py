"""bfloat16 on compiled kernels: float32 arithmetic on bfloat16 weights, in half the memory. Every
row is the same bits however and on whatever variant it is computed.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kvrelay.config.settings import EngineSettings
from kvrelay.engine import kernel_backend
from kvrelay.engine.kernel_backend import use_native_kernels, with_kv_dtype
from kvrelay.engine.kernel_batch import SequenceInput
from kvrelay.engine.model_loader import load_model
from kvrelay.engine.model_runner import LoadedModel, ModelRunner
from kvrelay.engine.native import available_variants, load_library
from kvrelay.engine.native.packing import pack_matrix
from kvrelay.engine.paged_kv_cache import PagedKVCache
from kvrelay.errors import ConfigError, ModelLoadError
from kvrelay.worker.engine_setup import build_engine
from tests.engine.paged_generation import PagedGeneration
from tests.engine.test_native_decoder import BLOCK_SIZE, load, run_in_chunks, tokens
from tests.support import left_out
from tests.support.tiny_models import TINY_KINDS, make_tiny_model, tiny_config

FUSED = "llama"

pytestmark = pytest.mark.skipif(load_library() is None, reason=left_out.C_COMPILER)

schemes = pytest.mark.parametrize("plain_rows", [False, True], ids=["split", "plain"])


def load_bfloat16(folder: Path, kind: str) -> LoadedModel:
    return load_model(make_tiny_model(kind, folder), kind, "bfloat16", "cpu")


def bfloat16(folder: Path, kind: str, *, plain_rows: bool = False, variant: str = "auto") -> LoadedModel:
    return use_native_kernels(load_bfloat16(folder, kind), plain_rows=plain_rows, variant=variant)


def make_tied_model(folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(FUSED, **{**tiny_config(FUSED), "tie_word_embeddings": True})
    auto_model: type[AutoModelForCausalLM] = AutoModelForCausalLM
    torch.manual_seed(0)
    auto_model.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def float32_of_rounded_weights(model: LoadedModel) -> LoadedModel:
    for tensor in model.module.state_dict().values():
        tensor.data.copy_(tensor.bfloat16())
    return use_native_kernels(model)


def logits_with_float32_kv(model: LoadedModel, seed: int = 1) -> Tensor:
    return run_in_chunks(with_kv_dtype(model, "float32"), tokens(seed), [70, 1, 19])


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_logits_are_those_of_float32_with_the_rounded_weights(tiny_models: Path, kind: str) -> None:
    expected = logits_with_float32_kv(float32_of_rounded_weights(load(tiny_models, kind)))
    computed = logits_with_float32_kv(bfloat16(tiny_models, kind))
    torch.testing.assert_close(computed, expected, rtol=2e-3, atol=2e-3)


def test_plain_activations_are_further_from_float32_and_have_another_fingerprint(tiny_models: Path) -> None:
    expected = logits_with_float32_kv(float32_of_rounded_weights(load(tiny_models, FUSED)))
    split, plain = bfloat16(tiny_models, FUSED), bfloat16(tiny_models, FUSED, plain_rows=True)
    errors = [float((logits_with_float32_kv(model) - expected).norm()) for model in (split, plain)]
    assert errors[1] > 20 * errors[0]
    assert errors[1] < 0.05 * float(expected.norm())
    assert split.spec.fingerprint != plain.spec.fingerprint


@schemes
@pytest.mark.parametrize("kind", [FUSED, "mistral", "qwen3", "mixtral", "gpt_oss"])
def test_rows_are_the_same_bits_in_one_chunk_in_many_and_one_by_one(
    tiny_models: Path, kind: str, plain_rows: bool
) -> None:
    model = bfloat16(tiny_models, kind, plain_rows=plain_rows)
    assert model.decoder is not None
    whole = run_in_chunks(model, tokens(2), [90])
    for lengths in ([65, 25], [7] * 12 + [6], [1] * 90):
        assert torch.equal(run_in_chunks(model, tokens(2), lengths), whole)


@schemes
@pytest.mark.parametrize("variant", available_variants())
def test_greedy_tokens_are_the_same_alone_in_a_batch_and_on_every_variant(
    tiny_models: Path, variant: str, plain_rows: bool
) -> None:
    model = bfloat16(tiny_models, FUSED, plain_rows=plain_rows, variant=variant)
    prompts = [tokens(30 + number, 20 + 7 * number) for number in range(5)]
    together = PagedGeneration(model)
    running = [together.start(prompt, 11) for prompt in prompts]
    computed = [together.generate(item, 12)[:12] for item in running]
    reference = bfloat16(tiny_models, FUSED, plain_rows=plain_rows, variant="portable")
    for prompt, generated in zip(prompts, computed, strict=True):
        alone = PagedGeneration(reference)
        assert alone.generate(alone.start(prompt, len(prompt)), 12)[:12] == generated


@schemes
@pytest.mark.parametrize("kind", [FUSED, "gpt_oss"])
@pytest.mark.parametrize("variant", available_variants())
def test_logits_of_a_batch_have_the_same_bits_on_every_variant(
    tiny_models: Path, variant: str, kind: str, plain_rows: bool
) -> None:
    batch = [
        SequenceInput(tokens(50 + number, 3 + 5 * number), 0, list(range(10 * number, 10 * number + 10)), num_logits=2)
        for number in range(6)
    ]

    def logits(variant: str) -> Tensor:
        model = bfloat16(tiny_models, kind, plain_rows=plain_rows, variant=variant)
        return ModelRunner(model, PagedKVCache(model.spec.kv_layout, 60, BLOCK_SIZE)).run(batch)

    assert torch.equal(logits(variant).view(torch.int32), logits("portable").view(torch.int32))


def num_matrix_weights(model: LoadedModel) -> int:
    """A tied one counts once."""
    parts = [part for part in model.module.modules() if isinstance(part, nn.Linear | nn.Embedding)]
    return sum({part.weight.data_ptr(): part.weight.numel() for part in parts}.values())


def test_weights_and_kv_take_half_the_bytes(tiny_models: Path) -> None:
    wide = load(tiny_models, FUSED)
    num_weights = num_matrix_weights(wide)
    model = bfloat16(tiny_models, FUSED)
    assert model.decoder is not None
    assert 2 * num_weights <= model.decoder.weight_bytes < 2.02 * num_weights
    assert model.spec.kv_layout.dtype == "bfloat16"
    assert 2 * model.spec.kv_layout.bytes_per_token == wide.spec.kv_layout.bytes_per_token


def test_tied_embeddings_are_read_from_the_packed_head(tmp_path: Path) -> None:
    folder = make_tied_model(tmp_path / "tied")
    wide = load_model(folder, "tied", "float32", "cpu")
    num_weights = num_matrix_weights(wide)
    model = use_native_kernels(load_model(folder, "tied", "bfloat16", "cpu"))
    expected = logits_with_float32_kv(float32_of_rounded_weights(wide))
    torch.testing.assert_close(logits_with_float32_kv(model), expected, rtol=2e-3, atol=2e-3)
    assert model.decoder is not None
    assert model.decoder.weight_bytes < 2.02 * num_weights
    assert num_matrix_weights(model) == 0


def test_weights_are_packed_without_being_widened(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def note(weight: Tensor, *arguments: object, **options: object) -> object:
        seen.append(weight.dtype)
        return pack_matrix(weight, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("kvrelay.engine.native_decoder.pack_matrix", note)
    bfloat16(tiny_models, FUSED)
    assert seen == [torch.bfloat16] * len(seen)
    assert len(seen) == 2 * 4 + 2


def test_kv_in_int8_goes_with_bfloat16_weights(tiny_models: Path) -> None:
    model = bfloat16(tiny_models, FUSED)
    narrow = with_kv_dtype(model, "int8")
    assert narrow.spec.fingerprint != model.spec.fingerprint
    whole = run_in_chunks(narrow, tokens(4), [90])
    assert torch.equal(run_in_chunks(narrow, tokens(4), [7] * 12 + [6]), whole)
    assert torch.cosine_similarity(whole, logits_with_float32_kv(model, 4), dim=-1).min() > 0.98


def test_a_fingerprint_tells_kernels_in_bfloat16_from_torch_and_from_float32(tiny_models: Path) -> None:
    in_torch = load_bfloat16(tiny_models, FUSED).spec.fingerprint
    wide = use_native_kernels(load(tiny_models, FUSED)).spec.fingerprint
    assert len({in_torch, wide, bfloat16(tiny_models, FUSED).spec.fingerprint}) == 3


def test_without_kernels_bfloat16_runs_in_torch(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_bfloat16(tiny_models, FUSED)
    monkeypatch.setattr(kernel_backend, "load_library", lambda variant: None)
    assert use_native_kernels(model) is model


def test_int8_is_not_made_of_bfloat16(tiny_models: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"cannot be served in int8.*--dtype float32"):
        use_native_kernels(load_bfloat16(tiny_models, FUSED), int8=True)


@pytest.mark.parametrize(("activations", "described"), [("split", "weights"), ("plain", "weights and activations")])
def test_a_worker_says_that_it_computes_in_bfloat16(tiny_models: Path, activations: str, described: str) -> None:
    folder = make_tiny_model(FUSED, tiny_models)
    chosen = {"model": str(folder), "dtype": "bfloat16", "bfloat16_activations": activations, "num_kv_blocks": 4}
    engine = build_engine(EngineSettings.model_validate(chosen))
    library = load_library()
    assert library is not None
    assert engine.description == f"bfloat16 {described}, {library.description}"
    assert engine.model.kv_layout.dtype == "bfloat16"


@pytest.mark.parametrize("chosen", [{}, {"dtype": "bfloat16", "kernels": "off"}, {"dtype": "float16"}])
def test_plain_activations_need_bfloat16_on_kernels(tiny_models: Path, chosen: dict[str, str]) -> None:
    folder = make_tiny_model(FUSED, tiny_models)
    settings = {"model": str(folder), "bfloat16_activations": "plain", "num_kv_blocks": 4, **chosen}
    with pytest.raises(ConfigError, match="--dtype bfloat16 on a CPU"):
        build_engine(EngineSettings.model_validate(settings))
