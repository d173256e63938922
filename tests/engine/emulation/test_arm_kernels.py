"""Kernels for ARM, compiled here and run by an emulator: the bits of this machine's own.

Each variant runs on a processor that has its instructions and no newer ones.
"""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from kvrelay.engine.kernel_backend import use_native_kernels, with_kv_dtype
from kvrelay.engine.model_loader import load_model
from kvrelay.engine.native import load_library
from kvrelay.engine.native.build import build_library
from kvrelay.engine.native.library import NativeLibrary
from kvrelay.engine.native.variant_choice import FEATURES, VARIANTS
from kvrelay.engine.native_decoder import NativeDecoder
from tests.engine.emulation.emulated_library import EmulatedLibrary, Emulator
from tests.engine.test_kernel_variants import (
    SCHEMES,
    Lengths,
    attended,
    extreme,
    greatest_int8,
    infinite,
    pack,
    pool_of,
    products,
    random,
    same_bits,
    small,
    steep,
    tame,
)
from tests.engine.test_native_decoder import run_in_chunks, tokens
from tests.support import left_out
from tests.support.tiny_models import make_tiny_model

COMPILER, EMULATOR, LIBRARIES = "aarch64-linux-gnu-gcc", "qemu-aarch64", "/usr/aarch64-linux-gnu"
PROCESSORS = {"i8mm": "max", "dotprod": "neoverse-n1", "neon": "cortex-a53", "portable": "cortex-a53"}
DRIVER = Path(__file__).with_name("driver.c")
NUM_ROWS = 20

pytestmark = [
    pytest.mark.skipif(load_library() is None, reason=left_out.C_COMPILER),
    pytest.mark.skipif(None in (shutil.which(COMPILER), shutil.which(EMULATOR)), reason=left_out.ARM),
]
variants = pytest.mark.parametrize("variant", list(PROCESSORS))


@dataclass(frozen=True)
class Arm:
    library: Path
    driver: Path

    def start(self, processor: str) -> Emulator:
        return Emulator([EMULATOR, "-cpu", processor, "-L", LIBRARIES, self.driver, self.library])


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Arm:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", COMPILER)
        library = build_library("aarch64")
    driver = tmp_path_factory.mktemp("arm") / "driver"
    subprocess.run([COMPILER, "-O1", "-Wall", "-Werror", DRIVER, "-ldl", "-o", driver], check=True, timeout=120)
    return Arm(library, driver)


@pytest.fixture(scope="module", params=list(PROCESSORS))
def emulated(arm: Arm, request: pytest.FixtureRequest) -> Iterator[NativeLibrary]:
    with arm.start(PROCESSORS[request.param]) as emulator:
        yield cast(NativeLibrary, EmulatedLibrary(emulator, request.param))


def native() -> NativeLibrary:
    library = load_library()
    assert library is not None
    return library


def needs(variant: str) -> set[str]:
    return set(next(each.needs for each in VARIANTS if each.name == variant))


@variants
def test_a_processor_says_which_variants_it_can_run(arm: Arm, variant: str) -> None:
    with arm.start(PROCESSORS[variant]) as emulator:
        found = emulator.call("processor_features")
    features = {name for place, name in enumerate(FEATURES) if found >> place & 1}
    assert features == (needs(variant) or needs("neon"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("content", [random, extreme, tame, greatest_int8, small, infinite])
def test_products_have_the_same_bits(emulated: NativeLibrary, content: Callable[..., Tensor], scheme: str) -> None:
    if content is infinite and not scheme.startswith("bfloat16"):
        content = extreme
    for n, k in ((16, 64), (40, 192)):
        weight, inputs = content(n, k) / 16, content(NUM_ROWS, k)
        has_bias = content is not small  # it would hide them
        packed, expected_packed = (pack(each, weight, scheme, has_bias=has_bias) for each in (emulated, native()))
        for ours, theirs in zip(packed.tensors, expected_packed.tensors, strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), "weights are packed alike"
        expected = products(native(), expected_packed, inputs)
        for num_rows in range(1, NUM_ROWS + 1):
            assert same_bits(products(emulated, packed, inputs[:num_rows]), expected[:num_rows]), num_rows
        alone = torch.cat([products(emulated, packed, inputs[row : row + 1]) for row in range(NUM_ROWS)])
        assert same_bits(alone, expected)


@pytest.mark.parametrize("scheme", ["bfloat16", "bfloat16, plain"])
def test_products_that_nearly_vanish_have_the_same_bits(emulated: NativeLibrary, scheme: str) -> None:
    """A sum just below the smallest normal number is rounded up to it, or counts as 0."""
    inputs, weight = torch.zeros(4, 32), torch.zeros(64, 32)
    inputs[:, 0], weight[:, 0] = 2.0**-63, 2.0**-63  # their product is that number
    inputs[:, 2] = torch.tensor([1.0, -1.0, 1.0078125, -1.9921875]) * 2.0**-75
    weight[:, 2] = torch.linspace(-4, 4, 64) * 2.0**-76  # changes it by less than its last bit
    packed, expected_packed = (pack(each, weight, scheme, has_bias=False) for each in (emulated, native()))
    expected = products(native(), expected_packed, inputs)
    assert 0 < (expected == 0).sum() < expected.numel()
    assert same_bits(products(emulated, packed, inputs), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_by_several_threads_have_the_same_bits(emulated: NativeLibrary, scheme: str) -> None:
    weight, inputs = random(48, 64), random(300, 64)
    packed = pack(native(), weight, scheme)
    assert emulated.use_threads(3) == 3
    try:
        assert same_bits(products(emulated, packed, inputs), products(native(), packed, inputs))
    finally:
        emulated.use_threads(1)


@cache
def expected_attention(
    kv_dtype: str, num_parts: int, head_dim: int, content: Callable[..., Tensor], lengths: Lengths, window: int
) -> tuple[Tensor, Tensor]:
    pool = pool_of(native(), kv_dtype, head_dim, content)
    return pool.bytes(), attended(native(), pool, lengths, window, num_parts=num_parts)


@pytest.mark.parametrize(
    ("kv_dtype", "num_parts"), [("float32", 0), ("bfloat16", 0), ("bfloat16", 1), ("bfloat16", 2), ("int8", 0)]
)
@pytest.mark.parametrize(
    ("head_dim", "content", "lengths", "window"),
    [
        (64, random, ((0, 70),), 0),
        (80, tame, ((100, 3), (0, 20)), 0),
        (16, steep, ((60, 1), (90, 1), (131, 4)), 0),
        (64, steep, ((120, 20),), 33),
    ],
)
def test_attention_has_the_same_bits(
    emulated: NativeLibrary,
    kv_dtype: str,
    num_parts: int,
    head_dim: int,
    content: Callable[..., Tensor],
    lengths: Lengths,
    window: int,
) -> None:
    written, expected = expected_attention(kv_dtype, num_parts, head_dim, content, lengths, window)
    pool = pool_of(emulated, kv_dtype, head_dim, content)
    assert torch.equal(pool.bytes(), written), "keys and values are written alike"
    assert same_bits(attended(emulated, pool, lengths, window, num_parts=num_parts), expected)


@pytest.mark.parametrize(
    ("kind", "dtype", "kv_dtype", "int8"),
    [
        ("llama", "float32", "float32", True),
        ("qwen3", "bfloat16", "bfloat16", False),
        ("gpt2", "float32", "int8", False),
        ("gemma3_text", "float32", "bfloat16", True),
        ("gpt_oss", "float32", "float32", True),
    ],
)
def test_logits_of_a_model_have_the_same_bits(
    tiny_models: Path, emulated: NativeLibrary, kind: str, dtype: str, kv_dtype: str, int8: bool
) -> None:
    loaded = load_model(make_tiny_model(kind, tiny_models), kind, dtype, "cpu")
    model = with_kv_dtype(use_native_kernels(loaded, int8=int8), kv_dtype)
    expected = run_in_chunks(model, tokens(8, 30), [30])
    assert isinstance(model.decoder, NativeDecoder)
    model.decoder._library = emulated
    for lengths in ([30], [7, 20, 1, 2]):
        assert same_bits(run_in_chunks(model, tokens(8, 30), lengths), expected)
