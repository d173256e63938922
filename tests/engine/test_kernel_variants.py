"""Variants of the kernels: the same bits in all that this machine can run, and a clear word on
those that it cannot.
"""

import ctypes
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast, get_args
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from kvrelay.config.settings import EngineSettings
from kvrelay.engine.kernel_backend import use_native_kernels, with_kv_dtype
from kvrelay.engine.kernel_batch import KernelBatch, SequenceInput
from kvrelay.engine.native import available_variants, load_library
from kvrelay.engine.native.library import KV_DTYPES, AttentionCall, KVLayer, MatrixKind, NativeLibrary
from kvrelay.engine.native.packing import PackedMatrix, WeightArena, pack_matrix
from kvrelay.engine.native.variant_choice import AUTO, FEATURES, VARIANTS, choose_variant
from kvrelay.errors import ConfigError
from kvrelay.worker.engine_setup import build_engine
from tests.engine.test_native_decoder import load, run_in_chunks, tokens
from tests.support import left_out
from tests.support.tiny_models import make_tiny_model

REFERENCE = "portable"
MAX_ROWS = 70
BLOCK_SIZE = 16
NUM_BLOCKS = 44
MAX_QUERIES = 700
SCALE = 0.3  # of scores
GROUP_HEADS = 3  # query heads that share a KV head

pytestmark = pytest.mark.skipif(load_library() is None, reason=left_out.C_COMPILER)

others = pytest.mark.parametrize("variant", [name for name in available_variants() if name != REFERENCE])


def library_of(variant: str) -> NativeLibrary:
    library = load_library(variant)
    assert library is not None
    assert library.variant == variant
    return library


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """One NaN is as good as another."""
    nothing = ours.isnan() & theirs.isnan()
    return torch.equal(
        ours.masked_fill(nothing, 0).contiguous().view(torch.int32),
        theirs.masked_fill(nothing, 0).contiguous().view(torch.int32),
    )


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def extreme(*shape: int) -> Tensor:
    """Rows of denormals, of zeros of both signs, of the largest numbers, and mixtures of all."""
    chance = torch.Generator().manual_seed(sum(shape))
    kinds = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e-39, -1.1e-38, 1.2e-38, 1e-20, -1.0, 127.0, 1e18, -3e38, 3.4e38])
    mixed = kinds[torch.randint(len(kinds), shape, generator=chance)]
    for row in range(shape[0]):
        if row % 4 == 0:
            mixed[row] = kinds[row // 4 % len(kinds)]
        elif row % 4 == 1:
            mixed[row] = torch.randn(shape[1:], generator=chance) * kinds[row // 4 % len(kinds)]
    return mixed


def infinite(*shape: int) -> Tensor:
    mixed = extreme(*shape)
    mixed[1::7, ::5] = torch.inf
    mixed[2::7, ::3] = -torch.inf
    mixed[3::7, 1] = torch.nan
    return mixed


def small(*shape: int) -> Tensor:
    """Products and their sums are near the smallest normal number."""
    chance = torch.Generator().manual_seed(sum(shape))
    return random(*shape) * 2.0 ** torch.randint(-66, -58, shape, generator=chance)


def tame(*shape: int) -> Tensor:
    return extreme(*shape).clamp(-1e15, 1e15)


def greatest_int8(*shape: int) -> Tensor:
    """Every group's numbers become 127 or -127, in rows of one sign too."""
    signs = torch.where(random(*shape) > 0, 127.0, -127.0)
    signs[::3] = 127
    signs[1::3] = -127
    return signs


def products(library: NativeLibrary, packed: PackedMatrix, inputs: Tensor) -> Tensor:
    outputs = torch.empty(len(inputs), packed.matrix.n)
    library.run_linear(packed.matrix, len(inputs), inputs.data_ptr(), outputs.data_ptr())
    return outputs


def pack(library: NativeLibrary, weight: Tensor, scheme: str, *, has_bias: bool = True) -> PackedMatrix:
    if scheme.startswith("bfloat16"):
        weight = weight.bfloat16()
    bias = random(len(weight)) if has_bias else None
    return pack_matrix(weight, bias, WeightArena(1 << 16), library, KINDS[scheme])


KINDS = {
    "float32": MatrixKind.F32,
    "int8": MatrixKind.INT8,
    "bfloat16": MatrixKind.BF16,
    "bfloat16, plain": MatrixKind.BF16_PLAIN,
}
SCHEMES = list(KINDS)
SHAPES = [(16, 64), (40, 128), (130, 192), (96, 576)]
CONTENTS = [random, extreme, tame, greatest_int8]


@others
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (40, 96)])
def test_float32_products_have_the_same_bits(variant: str, content: Callable[..., Tensor], n: int, k: int) -> None:
    check_products(variant, content, n, k, "float32")


@others
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_int8_products_have_the_same_bits(variant: str, content: Callable[..., Tensor], n: int, k: int) -> None:
    check_products(variant, content, n, k, "int8")


@others
@pytest.mark.parametrize("scheme", ["bfloat16", "bfloat16, plain"])
@pytest.mark.parametrize("content", [random, extreme, infinite, small])
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (40, 96), (16, 32)])
def test_bfloat16_products_have_the_same_bits(
    variant: str, content: Callable[..., Tensor], n: int, k: int, scheme: str
) -> None:
    check_products(variant, content, n, k, scheme)


def check_products(variant: str, content: Callable[..., Tensor], n: int, k: int, scheme: str) -> None:
    """Rows alone and in batches of any size: as the reference computes them in one batch."""
    library, reference = library_of(variant), library_of(REFERENCE)
    weight, inputs = content(n, k) / 16, content(MAX_ROWS, k)
    has_bias = content is not small  # it would hide them
    packed, expected_packed = (pack(each, weight, scheme, has_bias=has_bias) for each in (library, reference))
    for ours, theirs in zip(packed.tensors, expected_packed.tensors, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), "weights are packed alike"
    expected = products(reference, expected_packed, inputs)
    for num_rows in range(1, MAX_ROWS + 1):
        assert same_bits(products(library, packed, inputs[:num_rows]), expected[:num_rows]), num_rows
    alone = torch.cat([products(library, packed, inputs[row : row + 1]) for row in range(MAX_ROWS)])
    assert same_bits(alone, expected)


@others
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_of_more_rows_than_one_task_takes_have_the_same_bits(variant: str, scheme: str) -> None:
    library, reference = library_of(variant), library_of(REFERENCE)
    weight, inputs = random(48, 128), random(600, 128)
    packed = pack(library, weight, scheme)
    expected = products(reference, packed, inputs)
    try:
        for num_threads in (1, 3):
            library.use_threads(num_threads)
            assert same_bits(products(library, packed, inputs), expected)
    finally:
        library.use_threads(1)


def steep(*shape: int) -> Tensor:
    """Scores of these are so far apart that many weights vanish."""
    return 10 * random(*shape)


@dataclass(frozen=True)
class Pool:
    """Two KV heads, each with three query heads."""

    kv: KVLayer
    keys: Tensor
    values: Tensor
    queries: Tensor

    def bytes(self) -> Tensor:
        return torch.cat((self.keys.flatten().view(torch.uint8), self.values.flatten().view(torch.uint8)))


def pool_of(library: NativeLibrary, kv_dtype: str, head_dim: int, content: Callable[..., Tensor] = random) -> Pool:
    num_kv_heads, num_slots = 2, NUM_BLOCKS * BLOCK_SIZE
    item = {"int8": torch.uint8, "bfloat16": torch.bfloat16, "float32": torch.float32}[kv_dtype]
    shape = (NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim + 4 if kv_dtype == "int8" else head_dim)
    keys, values = torch.zeros(shape, dtype=item), torch.zeros(shape, dtype=item)
    kv = KVLayer(keys.data_ptr(), values.data_ptr(), KV_DTYPES[kv_dtype], BLOCK_SIZE, num_kv_heads, head_dim)
    written = [content(num_slots, num_kv_heads, head_dim), content(num_slots, num_kv_heads, head_dim).flip(0)]
    written[0][5], written[1][7] = 0, 1e-42
    slots = torch.arange(num_slots)
    library.write_kv(kv, num_slots, slots.data_ptr(), written[0].data_ptr(), written[1].data_ptr())
    return Pool(kv, keys, values, content(MAX_QUERIES, num_kv_heads * GROUP_HEADS, head_dim))


def attended(
    library: NativeLibrary,
    pool: Pool,
    lengths: Sequence[tuple[int, int]],
    window: int = 0,
    first_query: int = 0,
    num_parts: int = 0,
) -> Tensor:
    """lengths: position and new tokens of each sequence."""
    tables = [list(range(number, NUM_BLOCKS, len(lengths))) for number in range(len(lengths))]
    batch = KernelBatch(
        [SequenceInput([1] * count, begin, table, 0) for (begin, count), table in zip(lengths, tables, strict=True)],
        BLOCK_SIZE,
    )
    queries = pool.queries[first_query : first_query + sum(count for _, count in lengths)]
    out, tiles, num_heads = torch.empty_like(queries), batch.tiles(GROUP_HEADS), queries.shape[1]
    library.attend(
        AttentionCall(
            segments=batch.segments.ctypes.data,
            tiles=tiles.ctypes.data,
            num_tiles=len(tiles),
            queries=queries.data_ptr(),
            query_stride=num_heads * pool.kv.head_dim,
            num_heads=num_heads,
            scale=SCALE,
            num_parts=num_parts,
            window=window,
            out=out.data_ptr(),
        ),
        pool.kv,
    )
    return out


Lengths = tuple[tuple[int, int], ...]


@cache
def reference_attention(
    kv_dtype: str, head_dim: int, content: Callable[..., Tensor], lengths: Lengths, window: int
) -> tuple[Tensor, Tensor]:
    """The pool's bytes, and what is computed from them."""
    library = library_of(REFERENCE)
    pool = pool_of(library, kv_dtype, head_dim, content)
    return pool.bytes(), attended(library, pool, lengths, window)


@others
@pytest.mark.parametrize("kv_dtype", list(KV_DTYPES))
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("content", [random, tame, steep])
@pytest.mark.parametrize(
    ("lengths", "window"),
    [
        (((0, 300),), 0),
        (((290, 1),), 0),
        (((100, 3), (0, 70)), 0),
        (((60, 1), (90, 1), (131, 4)), 0),
        (((200, 40),), 33),
    ],
)
def test_attention_has_the_same_bits(
    variant: str,
    kv_dtype: str,
    head_dim: int,
    content: Callable[..., Tensor],
    lengths: Lengths,
    window: int,
) -> None:
    written, expected = reference_attention(kv_dtype, head_dim, content, lengths, window)
    library = library_of(variant)
    pool = pool_of(library, kv_dtype, head_dim, content)
    assert torch.equal(pool.bytes(), written), "keys and values are written alike"
    assert not expected[0].isnan().any()
    assert same_bits(attended(library, pool, lengths, window), expected)


@others
@pytest.mark.parametrize("kv_dtype", list(KV_DTYPES))
@pytest.mark.parametrize(("position", "window"), [(0, 0), (100, 0), (100, 50)])
def test_attention_of_a_token_does_not_depend_on_how_many_come_with_it(
    variant: str, kv_dtype: str, position: int, window: int
) -> None:
    library = library_of(variant)
    pool = pool_of(library, kv_dtype, 64)
    _, expected = reference_attention(kv_dtype, 64, random, ((position, MAX_ROWS),), window)
    for count in range(1, MAX_ROWS + 1):
        assert same_bits(attended(library, pool, [(position, count)], window), expected[:count]), count
    alone = [attended(library, pool, [(position + row, 1)], window, first_query=row) for row in range(MAX_ROWS)]
    assert same_bits(torch.cat(alone), expected)


@others
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("kind", "kv_dtype"),
    [
        ("llama", "float32"),
        ("qwen3", "bfloat16"),
        ("mistral", "int8"),
        ("gpt2", "float32"),
        ("olmo2", "float32"),
        ("gemma3_text", "bfloat16"),
        ("qwen3_moe", "float32"),
        ("gpt_oss", "int8"),
    ],
)
def test_logits_of_a_model_have_the_same_bits(
    tiny_models: Path, variant: str, kind: str, kv_dtype: str, int8: bool
) -> None:
    expected = with_kv_dtype(use_native_kernels(load(tiny_models, kind), int8=int8, variant=REFERENCE), kv_dtype)
    model = with_kv_dtype(use_native_kernels(load(tiny_models, kind), int8=int8, variant=variant), kv_dtype)
    assert model.spec.fingerprint == expected.spec.fingerprint, "workers on different machines pair"
    logits = run_in_chunks(expected, tokens(8), [90])
    for lengths in ([90], [70, 20], [1] * 90):
        assert same_bits(run_in_chunks(model, tokens(8), lengths), logits)


def test_the_setting_knows_all_variants() -> None:
    known = get_args(EngineSettings.model_fields["kernel_variant"].annotation)
    assert set(known) == {AUTO, *(variant.name for variant in VARIANTS)}


class Machine:
    """A library on a processor with some features."""

    def __init__(
        self, features: tuple[str, ...], *, tiles_error: int = 0, lacks: str | None = None, machine: str = "x86_64"
    ) -> None:
        self._features, self._tiles_error, self._machine = features, tiles_error, machine
        for variant in VARIANTS:
            if variant.name != lacks:
                setattr(self, f"run_decoder_{variant.name}", object())

    def processor_features(self) -> int:
        return sum(1 << FEATURES.index(name) for name in self._features)

    def request_tiles(self) -> int:
        return self._tiles_error

    def choose(self, wanted: str = AUTO) -> tuple[str, dict[str, str]]:
        with patch.object(platform, "machine", return_value=self._machine):
            choice = choose_variant(cast(ctypes.CDLL, self), wanted)
        return choice.name, dict(choice.why_not)


def needs(name: str) -> tuple[str, ...]:
    return next(variant.needs for variant in VARIANTS if variant.name == name)


@pytest.mark.parametrize("name", [variant.name for variant in VARIANTS])
def test_the_best_variant_is_taken_whose_instructions_are_all_there(name: str) -> None:
    machines = next(variant.machines for variant in VARIANTS if variant.name == name)
    assert Machine(needs(name), machine=machines[0] if machines else "riscv64").choose()[0] == name


def test_of_another_architecture_nothing_is_said_unless_it_is_wanted() -> None:
    graviton2 = Machine(needs("dotprod"), machine="aarch64")
    assert graviton2.choose() == ("dotprod", {"i8mm": "the processor lacks i8mm"})
    with pytest.raises(ConfigError, match="--kernel-variant avx2 cannot run here: the processor lacks avx2"):
        graviton2.choose("avx2")


def test_what_is_missing_for_a_better_variant_is_said() -> None:
    name, why_not = Machine(needs("avx2")).choose()
    assert name == "avx2"
    assert list(why_not) == ["amx", "avx512", "avxvnni"]
    assert why_not["avxvnni"] == "the processor lacks avx_vnni"


def test_registers_that_the_system_does_not_save_are_not_used() -> None:
    features = tuple(name for name in needs("avx512") if name != "AVX-512 registers")
    name, why_not = Machine(features).choose()
    assert name == "avx2"
    assert why_not["avx512"] == "the operating system does not save AVX-512 registers"


def test_without_leave_to_use_tiles_the_next_variant_runs() -> None:
    name, why_not = Machine(FEATURES, tiles_error=1).choose()
    assert name == "avx512"
    assert "does not let this process use AMX tiles (Operation not permitted)" in why_not["amx"]


def test_a_variant_that_the_compiler_left_out_is_not_taken() -> None:
    name, why_not = Machine(FEATURES, lacks="amx").choose()
    assert name == "avx512"
    assert "install a newer one" in why_not["amx"]


def test_a_wanted_variant_is_taken_though_a_better_one_could_run() -> None:
    assert Machine(FEATURES).choose("avx2") == ("avx2", {})


def test_a_wanted_variant_that_cannot_run_stops_the_start() -> None:
    with pytest.raises(
        ConfigError, match=r"--kernel-variant amx cannot run here: the processor lacks .*amx_tile.*avx2"
    ):
        Machine(needs("avx2")).choose("amx")
    with pytest.raises(ConfigError, match=r"--kernel-variant sse9 is unknown; choose one of auto, amx"):
        Machine(FEATURES).choose("sse9")


@pytest.mark.parametrize("variant", available_variants())
def test_a_worker_runs_the_variant_of_its_settings(tiny_models: Path, variant: str) -> None:
    folder = make_tiny_model("llama", tiny_models)
    settings = EngineSettings.model_validate({"model": str(folder), "kernel_variant": variant, "num_kv_blocks": 4})
    engine = build_engine(settings)
    kernels = engine.model_runner.model.kernels
    assert kernels is not None
    assert kernels.variant == variant


def test_a_variant_without_kernels_is_refused(tiny_models: Path) -> None:
    folder = make_tiny_model("llama", tiny_models)
    with pytest.raises(ConfigError, match="--kernel-variant at auto"):
        build_engine(EngineSettings(model=str(folder), kernels="off", kernel_variant="portable"))
