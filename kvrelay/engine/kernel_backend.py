"""Moves a loaded model to compiled kernels, as a whole or its linear layers and attention.

The results must agree with torch's.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import structlog
import torch
from torch import Tensor

from kvrelay.core.model_spec import derive_fingerprint
from kvrelay.engine.bfloat16_modules import compute_in_float32, widen, widen_experts
from kvrelay.engine.decoder_weights import read_decoder
from kvrelay.engine.kernel_batch import SequenceInput
from kvrelay.engine.mapped_weights import few_pages_in_use, release_weight_pages
from kvrelay.engine.model_probe import least_cosine, short_windows
from kvrelay.engine.model_runner import LoadedModel, ModelRunner
from kvrelay.engine.native import load_library
from kvrelay.engine.native.library import KV_DTYPES, MatrixKind
from kvrelay.engine.native_decoder import pack, release_weights
from kvrelay.engine.packed_linear import pack_linears
from kvrelay.engine.paged_attention import NotInKernelsError
from kvrelay.engine.paged_kv_cache import PagedKVCache
from kvrelay.errors import ConfigError, ModelLoadError


@dataclass(frozen=True, slots=True)
class Scheme:
    kind: MatrixKind  # of most weights
    min_cosine: float  # between the logits of kernels and of float32 arithmetic in torch
    numerics: str = ""  # for the fingerprint, if they are not float32's
    name: str = ""  # for people
    num_parts: int = 0  # in bfloat16, of activations, queries and attention's weights


FLOAT32 = Scheme(MatrixKind.F32, 0.99999)
INT8 = Scheme(
    MatrixKind.INT8,
    0.95,
    "int8: weights whose sums of four have 16 bits with activations of 8, in groups of 64",
    "int8 weights",
)
BFLOAT16 = Scheme(
    MatrixKind.BF16,
    0.99999,
    "bfloat16: sums of 32 in two halves, in attention too, with activations in two parts of 8 bits",
    "bfloat16 weights",
    num_parts=2,
)
BFLOAT16_PLAIN = Scheme(
    MatrixKind.BF16_PLAIN,
    0.99,
    "bfloat16: sums of 32 in two halves, in attention too, with activations of 8 bits",
    "bfloat16 weights and activations",
    num_parts=1,
)

_PROBED_KV_DTYPE = "float32"  # so that its rounding hides nothing
MIN_KV_COSINE = 0.95  # between the logits with KV in int8 and in the model's own type

_log = structlog.get_logger(__name__)


def use_native_kernels(
    model: LoadedModel, *, int8: bool = False, plain_rows: bool = False, variant: str = "auto"
) -> LoadedModel:
    """Returns the model on compiled kernels, or for torch without them. Takes its weights.

    Args:
        plain_rows: round activations to bfloat16, beside weights in bfloat16.

    Raises:
        ModelLoadError: int8 needs kernels, or the results differ.
        ConfigError: the variant cannot run here, or nothing is bfloat16.
    """
    library = load_library(variant)
    why = _why_not(model) or ("the kernels could not be compiled; the log says why" if library is None else None)
    if int8 and model.dtype == torch.bfloat16:
        why = "it is made of float32 weights, so it needs --dtype float32"
    if plain_rows and (why is not None or library is None or model.dtype != torch.bfloat16):
        raise plain_rows_error()
    if why is not None or library is None:
        if int8:
            raise ModelLoadError(f"{model.spec.name} cannot be served in int8: {why}. Serve it with --quantize none")
        _log.info("the model runs in torch", model=model.spec.name, why=why)
        return _widened(model) if model.is_narrow else model
    scheme = _scheme(model, int8=int8, plain_rows=plain_rows)
    weights = read_decoder(model.module, model.spec.architecture, model.windows, model.dtype)
    expected = _expected_logits(model, in_kernels=weights is not None)
    release_weight_pages()
    decoder = None if weights is None else pack(weights, library, scheme.kind)
    del weights
    if decoder is not None:
        packed_bytes = decoder.weight_bytes
    else:
        packed_bytes = pack_linears(model.module, library, scheme.kind)
        widen_experts(model.module)
    native = replace(model, decoder=decoder, kernels=library, num_parts=scheme.num_parts, is_narrow=False)
    with _comparable(native, every_expert=decoder is not None):
        computed = _probe(native, _PROBED_KV_DTYPE)
    cosine = least_cosine(computed, expected)
    if not cosine >= scheme.min_cosine:
        message = f"{model.spec.name}: compiled kernels compute something else than transformers (cosine {cosine:.6f})"
        raise ModelLoadError(f"{message}. Serve it with --kernels off, and please report the model")
    if decoder is not None:
        release_weights(model.module, embeddings=decoder.has_own_embeddings)
    spec = model.spec
    if scheme.numerics:
        spec = replace(spec, fingerprint=derive_fingerprint(spec.fingerprint, scheme.numerics))
    return replace(native, spec=spec, weight_bytes=packed_bytes + _weight_bytes(model), scheme=scheme.name)


def _widened(model: LoadedModel) -> LoadedModel:
    widen(model.module)
    return replace(model, weight_bytes=_weight_bytes(model), is_narrow=False)


def _weight_bytes(model: LoadedModel) -> int:
    return sum(tensor.nbytes for tensor in model.module.state_dict().values())


def plain_rows_error() -> ConfigError:
    return ConfigError(
        "--bfloat16-activations plain needs compiled kernels and weights in bfloat16: "
        "give --dtype bfloat16 on a CPU, or leave --bfloat16-activations at split"
    )


def _scheme(model: LoadedModel, *, int8: bool, plain_rows: bool) -> Scheme:
    if model.dtype == torch.bfloat16:
        return BFLOAT16_PLAIN if plain_rows else BFLOAT16
    return INT8 if int8 else FLOAT32


def _expected_logits(model: LoadedModel, *, in_kernels: bool) -> Tensor:
    """In float32, from now on."""
    if model.dtype == torch.bfloat16:
        compute_in_float32(model.module, model.dtype)
    with few_pages_in_use(model.module), _comparable(model, every_expert=in_kernels):
        return _probe(model, _PROBED_KV_DTYPE)


@contextmanager
def _comparable(model: LoadedModel, *, every_expert: bool) -> Iterator[None]:
    """Shortens windows, so that a few tokens reach beyond them.

    every_expert: each token takes all experts, so that no rounding decides which.
    """
    parts = model.module.modules() if every_expert else ()
    routers = [(part, part.top_k) for part in parts if hasattr(part, "top_k") and hasattr(part, "num_experts")]
    with ExitStack() as stack:
        shortened = stack.enter_context(short_windows(model.module))
        if model.decoder is not None:
            stack.enter_context(model.decoder.comparable(shortened))
        try:
            for router, _ in routers:
                router.top_k = router.num_experts
            yield
        finally:
            for router, top_k in routers:
                router.top_k = top_k


def with_kv_dtype(model: LoadedModel, kv_dtype: str) -> LoadedModel:
    """Raises ModelLoadError: the kernels do not read that type, or int8 needs kernels."""
    layout = model.spec.kv_layout
    if kv_dtype in ("auto", layout.dtype):
        return model
    if model.kernels is not None and kv_dtype not in KV_DTYPES:
        known = ", ".join(KV_DTYPES)
        raise ModelLoadError(
            f"the kernels on this machine keep KV in {known}, not in {kv_dtype}; choose another --kv-dtype"
        )
    spec = replace(
        model.spec,
        kv_layout=replace(layout, dtype=kv_dtype),
        fingerprint=derive_fingerprint(model.spec.fingerprint, f"KV in {kv_dtype}"),
    )
    changed = replace(model, spec=spec)
    if kv_dtype == "int8":
        _check_int8_kv(model, changed)
    return changed


def _check_int8_kv(model: LoadedModel, changed: LoadedModel) -> None:
    refusal = f"{model.spec.name} cannot keep KV in int8"
    remedy = "Serve it with --kv-dtype auto"
    if model.kernels is None:
        why = _why_not(model) or "it is not on compiled kernels: --kernels is off, or there is no C compiler"
        raise ModelLoadError(f"{refusal}: {why}. {remedy}")
    try:
        with _comparable(model, every_expert=model.decoder is not None):
            cosine = least_cosine(_probe(changed), _probe(model))
    except NotInKernelsError as error:
        why = "its attention has a soft cap, or heads whose size is no multiple of 16, which the kernels do not compute"
        raise ModelLoadError(f"{refusal}: {why}. {remedy}") from error
    if not cosine >= MIN_KV_COSINE:
        raise ModelLoadError(f"{refusal}: it computes something else then (cosine {cosine:.6f}). {remedy}")


def _why_not(model: LoadedModel) -> str | None:
    if model.device.type != "cpu":
        return f"compiled kernels are for the CPU, not for {model.device.type}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"compiled kernels take float32 and bfloat16 weights, not {str(model.dtype).removeprefix('torch.')}"
    return None


def _probe(model: LoadedModel, kv_dtype: str | None = None) -> Tensor:
    if kv_dtype is not None:
        layout = replace(model.spec.kv_layout, dtype=kv_dtype)
        model = replace(model, spec=replace(model.spec, kv_layout=layout))
    tokens = [(7 * number + 3) % model.spec.vocab_size for number in range(11)]
    runner = ModelRunner(model, PagedKVCache(model.spec.kv_layout, num_blocks=6, block_size=4))
    steps = [
        [SequenceInput(tokens[:3], 0, (0,), num_logits=1), SequenceInput(tokens[:6], 0, (4, 2, 5), num_logits=0)],
        [SequenceInput(tokens[3:4], 3, (0,), num_logits=1), SequenceInput(tokens[6:], 6, (4, 2, 5), num_logits=2)],
    ]
    return torch.cat([runner.run(batch) for batch in steps])
