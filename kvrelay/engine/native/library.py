"""The compiled kernels: structures as in the C headers, and typed functions.

Callers keep tensors alive. Calls release the interpreter lock.
"""

import ctypes
import errno
import os
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_float, c_int64, c_void_p
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import structlog

from kvrelay.engine.native.build import KernelsUnavailableError, build_library
from kvrelay.engine.native.core_sharing import CoreActivityTable
from kvrelay.engine.native.prebuilt import prebuilt_library
from kvrelay.engine.native.variant_choice import AUTO, choose_variant, usable_variants
from kvrelay.errors import ConfigError
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.runtime.cache_folder import is_own

PANEL = 16  # output columns stored and computed together
GROUP = 64  # int8: inputs that share a scale
TILE_ROWS = 96  # most rows of an attention tile: tokens times query heads that share a key
MAX_ROPES = 2  # of a decoder: layers may have one or the other
BF16_STEP = 32  # bfloat16: inputs that an instruction of AMX sums
KV_DTYPES = {"float32": 0, "bfloat16": 1, "int8": 2}

_log = structlog.get_logger(__name__)


class MatrixKind(IntEnum):
    """`MATRIX_...` of kernels.h."""

    F32 = 0
    INT8 = 1
    BF16 = 2
    BF16_PLAIN = 3


class Matrix(ctypes.Structure):
    """`matrix` of kernels.h."""

    _fields_ = [
        ("n", c_int64),
        ("k", c_int64),
        ("kind", c_int64),
        ("data", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("bias", c_void_p),
    ]


class OutputMode(IntEnum):
    """`OUTPUT_...` of kernels.h, those of an MLP's first product."""

    SILU_GATED = 2
    GELU_GATED = 3
    GELU = 4
    CLAMPED_GATED = 5


class RowNorm(ctypes.Structure):
    """`row_norm` of decoder.h."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("width", c_int64), ("epsilon", c_float)]


class Mlp(ctypes.Structure):
    """`mlp` of decoder.h."""

    _fields_ = [("up", Matrix), ("down", Matrix)]


class DecoderLayer(ctypes.Structure):
    """`decoder_layer` of decoder.h."""

    _fields_ = [
        ("attention_norm", RowNorm),
        ("attention_out_norm", RowNorm),
        ("mlp_norm", RowNorm),
        ("mlp_out_norm", RowNorm),
        ("query_norm", RowNorm),
        ("key_norm", RowNorm),
        ("qkv", Matrix),
        ("output", Matrix),
        ("router", Matrix),
        ("experts", POINTER(Mlp)),
        ("num_experts", c_int64),
        ("experts_per_token", c_int64),
        ("shares_of_chosen", c_int64),
        ("up_mode", c_int64),
        ("window", c_int64),
        ("rope", c_int64),
        ("sinks", c_void_p),
        ("attention_scale", c_float),
    ]


class Decoder(ctypes.Structure):
    """`decoder` of decoder.h."""

    _fields_ = [
        ("num_layers", c_int64),
        ("hidden", c_int64),
        ("intermediate", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("rotary_dim", c_int64),
        ("cosines", c_void_p * MAX_ROPES),
        ("sines", c_void_p * MAX_ROPES),
        ("embeddings", c_void_p),
        ("narrow_embeddings", c_void_p),
        ("position_embeddings", c_void_p),
        ("embedding_scale", c_float),
        ("layers", POINTER(DecoderLayer)),
        ("final_norm", RowNorm),
        ("lm_head", Matrix),
        ("token_rows", Matrix),
    ]


class KVLayer(ctypes.Structure):
    """`kv_layer` of attention.h."""

    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("dtype", c_int64),
        ("block_size", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
    ]


class KVBlocks(ctypes.Structure):
    """`kv_blocks` of kv_copy.c."""

    _fields_ = [
        ("first_layer", c_void_p),
        ("side_bytes", c_int64),
        ("row_bytes", c_int64),
        ("block_size", c_int64),
        ("block_ids", POINTER(c_int64)),
    ]


class AttentionCall(ctypes.Structure):
    """`attention_call` of attention.h."""

    _fields_ = [
        ("segments", c_void_p),
        ("tiles", c_void_p),
        ("num_tiles", c_int64),
        ("queries", c_void_p),
        ("query_stride", c_int64),
        ("num_heads", c_int64),
        ("scale", c_float),
        ("num_parts", c_int64),
        ("window", c_int64),
        ("sinks", c_void_p),
        ("out", c_void_p),
    ]


class DecoderStep(ctypes.Structure):
    """`decoder_step` of decoder.h."""

    _fields_ = [
        ("num_tokens", c_int64),
        ("num_segments", c_int64),
        ("num_tiles", c_int64),
        ("num_logits", c_int64),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("segments", c_void_p),
        ("tiles", c_void_p),
        ("logit_rows", c_void_p),
        ("pool", c_void_p),
        ("kv_dtype", c_int64),
        ("num_blocks", c_int64),
        ("block_size", c_int64),
        ("logits", c_void_p),
    ]


class NativeLibrary:
    """One variant of the kernels. All variants of a process share its threads.

    Args:
        why_not: the reason for each better variant.
        prebuilt: it came with kvrelay, instead of being compiled here.
    """

    def __init__(
        self, library: ctypes.CDLL, variant: str, why_not: Mapping[str, str], *, prebuilt: bool = False
    ) -> None:
        self.variant = variant
        self.why_not = why_not
        self.prebuilt = prebuilt
        self._library = library
        self._activity: CoreActivityTable | None = None
        self._run_decoder = self._function(
            "run_decoder", c_int64, POINTER(Decoder), POINTER(DecoderStep), c_int64, c_int64
        )
        self._run_linear = self._function("run_linear", c_int64, POINTER(Matrix), c_int64, c_void_p, c_void_p)
        self._quantize_weights = self._function("quantize_weights", None, c_int64, c_int64, *[c_void_p] * 4)
        self._attend = self._function("attend", None, POINTER(AttentionCall), POINTER(KVLayer))
        self._write_kv = self._function("write_kv", None, POINTER(KVLayer), c_int64, *[c_void_p] * 3, c_int64)
        self._copy_kv = self._function("copy_kv", None, POINTER(KVBlocks), *[c_int64] * 3, c_void_p, c_int64)
        library.set_threads.argtypes = [
            *(c_int64, POINTER(c_int64), c_int64, POINTER(c_int64), c_int64),
            *(c_void_p, c_int64),
        ]
        library.set_threads.restype = c_int64

    @property
    def description(self) -> str:
        kernels = "kernels of the wheel" if self.prebuilt else "kernels"
        return "; ".join([f"{self.variant} {kernels}", *(f"not {name}: {why}" for name, why in self.why_not.items())])

    def _function(self, name: str, result: type[c_int64] | None, *arguments: Any) -> Any:
        function = getattr(self._library, f"{name}_{self.variant}")
        function.argtypes, function.restype = arguments, result
        return function

    def use_threads(
        self, num_threads: int, cores: Sequence[int] = (), activity: CoreActivityTable | None = None
    ) -> int:
        """Sets a step's threads, the caller's included; returns how many there are.

        Args:
            cores: the caller's, which must run there already, then those of other threads.
            activity: borrows idle cores of other processes, and lends these.
        """
        borrowed = () if activity is None else tuple(core for core in activity.cores if core not in cores)
        address, num_entries = (None, 0) if activity is None else (activity.address, activity.num_entries)
        num_in_all = self._library.set_threads(
            num_threads, _numbers(cores), len(cores), _numbers(borrowed), len(borrowed), address, num_entries
        )
        # as long as its threads run; those of the previous table have ended
        self._activity = activity
        return int(num_in_all)

    def run_decoder(self, decoder: Decoder, step: DecoderStep, layer_begin: int, layer_end: int) -> None:
        """Runs layers [layer_begin, layer_end), embeddings first, logits last."""
        if not self._run_decoder(decoder, step, layer_begin, layer_end):
            raise MemoryError(f"no memory for a step of {step.num_tokens} tokens")

    def run_linear(self, matrix: Matrix, num_rows: int, inputs_address: int, outputs_address: int) -> None:
        """float32 [num_rows, n] = [num_rows, k] W^T + bias."""
        if not self._run_linear(matrix, num_rows, inputs_address, outputs_address):
            raise MemoryError(f"no memory for {num_rows} rows of a linear layer")

    def quantize_weights(
        self, n: int, k: int, weights_address: int, data_address: int, scales_address: int, sums_address: int
    ) -> None:
        """Quantizes float32 [n, k] into zeroed data, scales and sums of a `Matrix`."""
        self._quantize_weights(n, k, weights_address, data_address, scales_address, sums_address)

    def attend(self, call: AttentionCall, kv: KVLayer) -> None:
        self._attend(call, kv)

    def write_kv(
        self, kv: KVLayer, num_tokens: int, slots_address: int, keys_address: int, values_address: int
    ) -> None:
        """slots: int64 [num_tokens]; keys, values: float32 [num_tokens, num_kv_heads, head_dim]."""
        stride = kv.num_kv_heads * kv.head_dim
        self._write_kv(kv, num_tokens, slots_address, keys_address, values_address, stride)

    def copy_kv(self, blocks: KVBlocks, span: KVSpan, wire_address: int, *, into_pool: bool) -> None:
        """Copies between the pool and `wire_address`: K, then V of each layer, [tokens, row_bytes].

        The span's tokens count from the first of `blocks`.
        """
        self._copy_kv(blocks, span.num_layers, span.token_begin, span.token_end, wire_address, into_pool)


def _numbers(values: Sequence[int]) -> "ctypes.Array[c_int64]":
    return (c_int64 * len(values))(*values)


def load_own(path: Path) -> ctypes.CDLL:
    """Checks the owner; the file cannot be replaced in between. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not is_own(os.fstat(descriptor)):
            raise PermissionError(errno.EPERM, "it is another user's, or others may write to it", str(path))
        opened = Path(f"/proc/self/fd/{descriptor}")
        return ctypes.CDLL(str(opened if opened.exists() else path))
    finally:
        os.close(descriptor)


def load_library(variant: str = AUTO) -> NativeLibrary | None:
    """None: not available; a warning says why.

    Raises:
        ConfigError: the wanted variant is unknown, cannot run here, or there are no kernels at all.
    """
    library = _load()
    if library is not None:
        return _load_variant(variant)
    if variant != AUTO:
        raise ConfigError(f"--kernel-variant {variant} needs compiled kernels; the log says why there are none")
    return None


def available_variants() -> list[str]:
    library = _load()
    return [] if library is None else usable_variants(library)


def kernel_seconds() -> float:
    """Time in `run_decoder` since the process began."""
    library = _load()
    return 0.0 if library is None else float(library.nanoseconds_spent()) * 1e-9


@cache
def _load() -> ctypes.CDLL | None:
    library = _load_prebuilt()
    try:
        library = library or load_own(build_library())
    except (KernelsUnavailableError, OSError) as error:
        _log.warning("no compiled kernels: torch's are used, which are slower, and int8 is not served", why=str(error))
        return None
    for name in ("processor_features", "request_tiles", "nanoseconds_spent"):
        getattr(library, name).restype = c_int64
    return library


@cache
def _load_prebuilt() -> ctypes.CDLL | None:
    try:
        return None if (path := prebuilt_library()) is None else load_own(path)
    except OSError as error:
        _log.warning("the wheel's kernels are not used", why=str(error))
        return None


@cache
def _load_variant(variant: str) -> NativeLibrary:
    library = _load()
    assert library is not None, "the caller has looked"
    choice = choose_variant(library, variant)
    return NativeLibrary(library, choice.name, choice.why_not, prebuilt=library is _load_prebuilt())
