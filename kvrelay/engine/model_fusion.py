"""Puts a loaded model on compiled kernels where it can be, and quantizes it where that was asked for.

Whether the kernels compute what transformers computes is found out by running both; when they do not, the model stays in torch.
"""

from dataclasses import replace

import structlog
import torch
from torch import Tensor

from kvrelay.engine.attention_context import StepInput
from kvrelay.engine.fused_decoder import FusedDecoder, fuse, release_weights
from kvrelay.engine.loaded_model import LoadedModel
from kvrelay.engine.model_runner import ModelRunner
from kvrelay.engine.native import load_library
from kvrelay.engine.native.library import KV_DTYPES
from kvrelay.engine.paged_kv_cache import PagedKVCache
from kvrelay.errors import ModelLoadError
from kvrelay.model_spec import derive_fingerprint

MIN_COSINE = {False: 0.99999, True: 0.95}
"""How alike the logits of kernels and torch must be, in float32 and in int8."""

_log = structlog.get_logger(__name__)


def fuse_model(model: LoadedModel, *, int8: bool = False) -> LoadedModel:
    """The model on compiled kernels, or as it is where there are none for it.

    Args:
        model: as loaded; its module gives up its weights when the result has a decoder.
        int8: quantize weights and activations.

    Raises:
        ModelLoadError: int8 was asked for and cannot be had.
    """
    decoder, why = _try_to_fuse(model, int8=int8)
    if decoder is None:
        if int8:
            raise ModelLoadError(f"{model.spec.name} cannot be served in int8: {why}. Serve it with --quantize none")
        _log.info("the model runs in torch", model=model.spec.name, why=why)
        return model
    release_weights(model.module)
    spec = model.spec
    if int8:
        spec = replace(spec, fingerprint=derive_fingerprint(spec.fingerprint, "int8 in groups of 64"))
    kept_bytes = sum(tensor.nbytes for tensor in model.module.state_dict().values())
    return replace(model, spec=spec, decoder=decoder, weight_bytes=decoder.weight_bytes + kept_bytes)


def with_kv_dtype(model: LoadedModel, kv_dtype: str) -> LoadedModel:
    """The model with its KV kept in another type than it computes in.

    Args:
        model: as loaded.
        kv_dtype: float32, bfloat16, float16, or auto: what the model computes in.

    Raises:
        ModelLoadError: the model's kernels do not read that type.
    """
    layout = model.spec.kv_layout
    if kv_dtype in ("auto", layout.dtype):
        return model
    if model.decoder is not None and kv_dtype not in KV_DTYPES:
        known = " or ".join(KV_DTYPES)
        raise ModelLoadError(f"the kernels on this machine keep KV in {known}, not in {kv_dtype}; choose another --kv-dtype")
    spec = replace(
        model.spec,
        kv_layout=replace(layout, dtype=kv_dtype),
        fingerprint=derive_fingerprint(model.spec.fingerprint, f"KV in {kv_dtype}"),
    )
    return replace(model, spec=spec)


def _try_to_fuse(model: LoadedModel, *, int8: bool) -> tuple[FusedDecoder | None, str]:
    """The decoder, or why there is none."""
    if model.device.type != "cpu":
        return None, f"compiled kernels are for the CPU, not for {model.device.type}"
    if model.dtype != torch.float32:
        return None, f"compiled kernels take float32 weights, not {str(model.dtype).removeprefix('torch.')}"
    library = load_library()
    if library is None:
        return None, "the kernels could not be compiled; the log says why"
    decoder = fuse(model.module, model.spec.architecture, library, int8=int8)
    if decoder is None:
        return None, f"there are no compiled kernels for models of type {model.spec.architecture} with these settings"
    cosine = _compare(model, decoder)
    if not cosine >= MIN_COSINE[int8]:
        return None, f"the kernels compute something else than transformers (cosine {cosine:.6f})"
    return decoder, ""


def _compare(model: LoadedModel, decoder: FusedDecoder) -> float:
    """Least cosine between logits of torch and of the kernels, for a few tokens in two chunks beside another sequence."""
    tokens = [(7 * number + 3) % model.spec.vocab_size for number in range(11)]
    steps = [
        [StepInput(tokens[:3], 0, (0,), num_logits=1), StepInput(tokens[:6], 0, (4, 2, 5), num_logits=0)],
        [StepInput(tokens[3:4], 3, (0,), num_logits=1), StepInput(tokens[6:], 6, (4, 2, 5), num_logits=2)],
    ]
    expected_cache, cache = (PagedKVCache(model.spec.kv_layout, num_blocks=6, block_size=4) for _ in range(2))
    runner = ModelRunner(replace(model, decoder=None), expected_cache)
    cosines = [
        torch.cosine_similarity(_centred(runner.run(batch)), _centred(decoder.run(batch, cache)), dim=-1).min() for batch in steps
    ]
    return float(min(cosines))


def _centred(logits: Tensor) -> Tensor:
    return (logits - logits.mean(dim=-1, keepdim=True)).double()
