"""One measurement of the engine: a prompt in chunks, or a decode step of a batch. How it is timed,
and what it costs at least.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.engine_steps import EngineSteps
from benchmarks.roofline import Limits, ModelCost, Product, StepCost
from benchmarks.statistics import Spread, spread
from kvrelay.core.model_spec import DTYPE_BYTES, KVLayout
from kvrelay.engine.native import kernel_seconds
from kvrelay.engine.paged_kv_cache import TORCH_DTYPES
from kvrelay.kv_cache.memory_planning import INT8_GROUP
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.models.shape import read_model_shape
from kvrelay.worker.sequence import TokenSequence

FIRST_TOKEN = 300
PRODUCTS: dict[str, Product] = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8"}
SPARE_TOKENS = 64
"""Of each sequence, for blocks that are not full."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: a prompt in chunks, or one decode step of a batch."""

    phase: str
    num_tokens: int
    """Of the prompt, or behind which each sequence goes on."""
    chunk_tokens: int | None
    batch_size: int | None


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of a case."""

    seconds: float
    kernel_s: float
    limits: Limits


@dataclass(frozen=True, slots=True)
class Result:
    """A case after all rounds."""

    phase: str
    num_tokens: int
    chunk_tokens: int | None
    batch_size: int | None
    seconds: Spread
    tokens_per_s: float
    gb_per_s: float
    gflop_per_s: float
    percent_of_bound: float
    percent_outside_kernels: float | None


def prefill_cases(lengths: Sequence[int], chunk_sizes: Sequence[int]) -> list[Case]:
    """Every length in chunks of every size below it, and whole where a size reaches it."""
    pairs = {(length, min(length, size)): None for length in lengths for size in chunk_sizes}
    return [Case("prefill", length, size, None) for length, size in pairs]


def decode_cases(batch_sizes: Sequence[int], context_lengths: Sequence[int]) -> list[Case]:
    """Every batch behind every length."""
    return [Case("decode", length, None, size) for length in context_lengths for size in batch_sizes]


def pool_tokens(cases: Sequence[Case], steps: int) -> int:
    """Tokens that the largest case needs, with room for blocks that are not full."""
    return max((case.batch_size or 1) * (case.num_tokens + steps + SPARE_TOKENS) for case in cases)


def fill_pool(ours: EngineSteps) -> None:
    """Random numbers into all blocks: memory that was never written is not there, and reads faster
    than it should.
    """
    cache = ours.engine.cache
    blocks = range(cache.num_blocks)
    num_tokens = cache.num_blocks * cache.block_size
    for layer in range(cache.layout.num_layers):
        content = _random_rows(cache.layout, num_tokens)
        cache.import_kv(content.numpy().data, KVSpan(layer, layer + 1, 0, num_tokens), blocks)


def _random_rows(layout: KVLayout, num_tokens: int) -> torch.Tensor:
    """K and V of one layer as a transfer has them: uint8 [2, num_tokens, num_kv_heads, row bytes]."""
    rows = (2, num_tokens, layout.num_kv_heads)
    if layout.dtype != "int8":
        return torch.randn(*rows, layout.head_dim).to(TORCH_DTYPES[layout.dtype]).view(torch.uint8)
    numbers = torch.randint(-127, 128, (*rows, layout.head_dim), dtype=torch.int8)
    # three standard deviations, about the largest of a head's numbers
    scales = torch.full((*rows, 1), 3 / 127)
    return torch.cat((numbers.view(torch.uint8), scales.view(torch.uint8)), dim=-1)


def model_cost(ours: EngineSteps, quantize: str | None) -> ModelCost:
    """What steps of the loaded model cost at least."""
    weight_bytes = 1 + 4 / INT8_GROUP if quantize == "int8" else DTYPE_BYTES[dtype_name(ours)]
    return ModelCost(read_model_shape(ours.engine.folder), weight_bytes, ours.engine.model.kv_layout.dtype)


def product_type(ours: EngineSteps, quantize: str | None) -> Product:
    """What the engine multiplies, as the roofline has it; float32 for what it widens."""
    return PRODUCTS.get(quantize or dtype_name(ours), "float32")


def dtype_name(ours: EngineSteps) -> str:
    """What the model computes in."""
    return str(ours.engine.model_runner.model.dtype).removeprefix("torch.")


def case_cost(cost: ModelCost, case: Case) -> StepCost:
    """What the case costs at least."""
    if case.batch_size is not None:
        return cost.decode(case.batch_size, case.num_tokens)
    return cost.prefill(case.num_tokens, case.chunk_tokens or case.num_tokens)


def time_case(ours: EngineSteps, case: Case, steps: int) -> tuple[float, float]:
    """Seconds of the prompt or of a decode step, the median of `steps`; and those of them in
    kernels.
    """
    return _time_prefill(ours, case) if case.phase == "prefill" else _time_decode(ours, case, steps)


def _time_prefill(ours: EngineSteps, case: Case) -> tuple[float, float]:
    sequence = ours.start([FIRST_TOKEN + number % 256 for number in range(case.num_tokens)])
    begin_s, begin_kernel_s = time.perf_counter(), kernel_seconds()
    ours.prefill(sequence, case.chunk_tokens or case.num_tokens)
    elapsed = time.perf_counter() - begin_s, kernel_seconds() - begin_kernel_s
    ours.release(sequence)
    return elapsed


def _time_decode(ours: EngineSteps, case: Case, steps: int) -> tuple[float, float]:
    assert case.batch_size is not None
    sequences = [_decoding(ours, FIRST_TOKEN + number, case.num_tokens) for number in range(case.batch_size)]
    parts = [(sequence, 1) for sequence in sequences]
    measured = []
    for _ in range(steps):
        begin_s, begin_kernel_s = time.perf_counter(), kernel_seconds()
        ours.step(parts)
        measured.append((time.perf_counter() - begin_s, kernel_seconds() - begin_kernel_s))
    for sequence in sequences:
        ours.release(sequence)
    seconds, kernel_s = zip(*measured, strict=True)
    return statistics.median(seconds), statistics.median(kernel_s)


def _decoding(ours: EngineSteps, token_id: int, num_context_tokens: int) -> TokenSequence:
    """A sequence with so many tokens in the pool, as if computed: time does not depend on what they
    are.
    """
    sequence = ours.start([token_id] * (num_context_tokens + 1))
    sequence.num_computed_tokens = num_context_tokens
    return sequence


def summarize(case: Case, samples: Sequence[Sample], cost: StepCost, *, is_compiled: bool) -> Result:
    """All rounds of a case."""
    seconds = spread([sample.seconds for sample in samples])
    num_new_tokens = case.batch_size or case.num_tokens
    outside = statistics.median([1 - sample.kernel_s / sample.seconds for sample in samples])
    return Result(
        phase=case.phase,
        num_tokens=case.num_tokens,
        chunk_tokens=case.chunk_tokens,
        batch_size=case.batch_size,
        seconds=seconds,
        tokens_per_s=num_new_tokens / seconds.median,
        gb_per_s=cost.num_bytes / seconds.median / 1e9,
        gflop_per_s=cost.num_operations / seconds.median / 1e9,
        percent_of_bound=100
        * statistics.median([sample.limits.least_seconds(cost) / sample.seconds for sample in samples]),
        percent_outside_kernels=100 * outside if is_compiled else None,
    )
