"""What the machine can do at most: bytes read and numbers multiplied per second, and how near a
step comes to it.

A step that must read so many bytes and compute so many operations takes at least as long as the
slower of the two (Williams et al. 2009, "Roofline: An Insightful Visual Performance Model for
Multicore Architectures").
"""

import time
from dataclasses import dataclass, field
from typing import Literal

import torch

from benchmarks.torch_threads import torch_threads
from kvrelay.models.shape import ModelShape

Product = Literal["float32", "bfloat16", "int8"]

READ_BYTES = 512 * 1024 * 1024
"""Far more than any cache holds."""
MATRIX_SIZE = 2048


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step must do at least."""

    num_bytes: float
    """Weights once, and the KV that is attended to."""
    num_operations: float
    """Multiplications and additions."""

    def __add__(self, other: "StepCost") -> "StepCost":
        return StepCost(self.num_bytes + other.num_bytes, self.num_operations + other.num_operations)


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates of the machine with so many threads."""

    bytes_per_s: float
    operations_per_s: float
    """Multiplications and additions, as torch's matrix product of the weights' type reaches them."""

    def mean(self, other: "Limits") -> "Limits":
        """Between two measurements."""
        bytes_per_s = (self.bytes_per_s + other.bytes_per_s) / 2
        return Limits(bytes_per_s, (self.operations_per_s + other.operations_per_s) / 2)

    def least_seconds(self, cost: StepCost) -> float:
        """How long it takes at least."""
        return max(cost.num_bytes / self.bytes_per_s, cost.num_operations / self.operations_per_s)


@dataclass(slots=True)
class LimitMeter:
    """Measures the limits several times during a run, since a shared machine's change.

    Args:
        num_threads: as the engine's.
        product: type of what is multiplied. bfloat16 and int8 use the tiles of AMX where torch
            finds them.
    """

    num_threads: int
    product: Product = "float32"
    matrix_size: int = MATRIX_SIZE
    bytes_per_s: list[float] = field(default_factory=list)
    operations_per_s: list[float] = field(default_factory=list)
    _buffer: torch.Tensor = field(default_factory=lambda: torch.ones(READ_BYTES // 4))
    _matrix: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        matrix = torch.randn(self.matrix_size, self.matrix_size)
        self._matrix = (10 * matrix).to(getattr(torch, self.product))
        self._multiply()  # the first one prepares

    def measure(self) -> Limits:
        """Measures both once more."""
        with torch_threads(self.num_threads), torch.inference_mode():
            begin_s = time.perf_counter()
            self._buffer.sum()
            read_s = time.perf_counter() - begin_s
            begin_s = time.perf_counter()
            self._multiply()
            multiply_s = time.perf_counter() - begin_s
        self.bytes_per_s.append(READ_BYTES / read_s)
        self.operations_per_s.append(2 * self.matrix_size**3 / multiply_s)
        return Limits(self.bytes_per_s[-1], self.operations_per_s[-1])

    def _multiply(self) -> torch.Tensor:
        if self.product == "int8":
            return torch._int_mm(self._matrix, self._matrix)
        return torch.mm(self._matrix, self._matrix)


class ModelCost:
    """What steps of a model cost at least.

    Args:
        shape: of the model.
        weight_bytes: of one number in a matrix of weights.
        kv_dtype: of the KV cache.
    """

    def __init__(self, shape: ModelShape, weight_bytes: float, kv_dtype: str) -> None:
        self._shape = shape
        self._weight_bytes = weight_bytes
        self._kv_bytes_per_token = shape.kv_layout(kv_dtype).bytes_per_token
        self._num_head_weights = shape.vocab_size * shape.hidden_size
        self._num_layer_weights = shape.weights.num_matrix + shape.weights.num_tied_head - self._num_head_weights

    def decode(self, batch_size: int, num_context_tokens: int) -> StepCost:
        """One new token for each of the sequences, behind so many tokens."""
        num_weights = self._num_layer_weights + self._num_head_weights
        num_keys = num_context_tokens + 1
        return StepCost(
            num_bytes=self._weight_bytes * num_weights + batch_size * num_keys * self._kv_bytes_per_token,
            num_operations=batch_size * (2 * num_weights + self._attention_operations(num_keys)),
        )

    def prefill(self, num_tokens: int, chunk_tokens: int) -> StepCost:
        """A prompt in chunks, with the logits of its last token."""
        total = StepCost(self._weight_bytes * self._num_head_weights, 2 * self._num_head_weights)
        for begin in range(0, num_tokens, chunk_tokens):
            end = min(num_tokens, begin + chunk_tokens)
            num_pairs = sum(range(begin + 1, end + 1))  # of a query and a key
            num_operations = 2 * self._num_layer_weights * (end - begin) + self._attention_operations(num_pairs)
            total += StepCost(
                self._weight_bytes * self._num_layer_weights + begin * self._kv_bytes_per_token, num_operations
            )
        return total

    def _attention_operations(self, num_pairs: int) -> int:
        """Products of queries with keys and of weights with values, in all layers."""
        return 4 * self._shape.num_layers * self._shape.num_heads * self._shape.head_dim * num_pairs
