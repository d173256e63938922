"""Loads a causal language model with paged attention.

Never unpickles and never runs code from a model's folder.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from kvrelay.core.model_spec import ModelSpec, fingerprint
from kvrelay.engine.bfloat16_modules import compute_in_float32
from kvrelay.engine.decoder_weights import LAYOUTS, LENGTH_DEPENDENT_ROPE
from kvrelay.engine.fast_transformers_import import light_imports, transformers
from kvrelay.engine.mapped_weights import few_pages_in_use, stored_dtypes
from kvrelay.engine.model_probe import probe_model, unsupported_architecture
from kvrelay.engine.model_runner import LoadedModel
from kvrelay.engine.paged_attention import ATTENTION_NAME
from kvrelay.engine.paged_kv_cache import TORCH_DTYPES
from kvrelay.engine.weights_digest import weights_digest
from kvrelay.errors import ModelLoadError
from kvrelay.models.end_tokens import declared_end_tokens, token_ids_in, within_vocabulary

FALLBACK_CONTEXT_TOKENS = 4096  # limit of models that name none
# What transformers raises for a broken or unknown model.
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)


def load_model(
    path: Path, name: str, dtype: str = "auto", device: str = "auto", *, for_kernels: bool = False
) -> LoadedModel:
    """Loads a model and checks that it can be served.

    Args:
        path: folder with config.json and safetensors, .gguf file, or name in a reachable hub.
        dtype: auto: the checkpoint's own, float32 for GGUF.
        for_kernels: weights stored in bfloat16 may stay so until `use_native_kernels`.

    Raises:
        ModelLoadError: missing, broken or unsupported; says what to do.
    """
    torch_device = torch.device(choose_device(device))
    is_gguf = path.suffix.lower() == ".gguf"
    _check_files(path, is_gguf)
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent if is_gguf else path)}
    if is_gguf:
        source["gguf_file"] = path.name
    config = _load_config(source, path)
    torch_dtype = _resolve_dtype(dtype, config, is_gguf)
    architecture = str(config.model_type)
    is_mxfp4 = (getattr(config, "quantization_config", None) or {}).get("quant_method") == "mxfp4"
    is_narrow = for_kernels and torch_device.type == "cpu" and _can_stay_narrow(path, architecture, torch_dtype)
    loaded_dtype = torch.bfloat16 if is_narrow else torch_dtype
    module = _load_module(source, path, architecture, loaded_dtype, is_mxfp4=is_mxfp4).to(torch_device)
    if is_narrow:
        compute_in_float32(module, torch_dtype)
    dtype_name = str(torch_dtype).removeprefix("torch.")
    with few_pages_in_use(module):
        probe = probe_model(module, architecture, dtype_name, torch_device)
    spec = ModelSpec(
        name=name,
        architecture=architecture,
        kv_layout=probe.kv_layout,
        vocab_size=probe.vocab_size,
        max_context_tokens=_max_context_tokens(config.get_text_config()),
        eos_token_ids=within_vocabulary(_end_tokens(path, module), probe.vocab_size),
        fingerprint=fingerprint(
            weights_digest(module, torch_dtype if is_narrow else None),
            architecture,
            probe.kv_layout,
            _rope_text(config.get_text_config()),
            _compute_text(module),
        ),
    )
    state = module.state_dict().values()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state}
    num_bytes = sum(storages.values())
    return LoadedModel(module, spec, torch_device, torch_dtype, num_bytes, probe.windows, is_narrow=is_narrow)


def _can_stay_narrow(path: Path, architecture: str, dtype: torch.dtype) -> bool:
    """Only bfloat16 is stored, or MXFP4, and the kernels know the architecture."""
    if dtype != torch.float32 or architecture not in LAYOUTS or not path.is_dir():
        return False
    stored = stored_dtypes(path)
    return "BF16" in stored and stored <= {"BF16", "U8"}


def _check_files(path: Path, is_gguf: bool) -> None:
    if is_gguf:
        if not path.is_file():
            raise ModelLoadError(f"{path} is not a file; give the path of an existing .gguf file")
        return
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(f"{path} has no config.json; give a folder as transformers' save_pretrained writes it")
        if not any(path.glob("*.safetensors")):
            raise ModelLoadError(f"{path} has no .safetensors file; convert the weights to safetensors first")
        return
    if path.exists():
        raise ModelLoadError(f"{path} is neither a folder nor a .gguf file")
    # A hub name has one slash; anything else is meant as a path.
    if path.is_absolute() or len(path.parts) != 2 or path.parts[0] in (".", ".."):
        raise ModelLoadError(
            f"there is no model folder {path}; give an existing folder, a .gguf file or a hub name owner/model"
        )


def _load_config(source: dict[str, Any], path: Path) -> Any:
    try:
        with light_imports():
            config = transformers.AutoConfig.from_pretrained(**source, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise ModelLoadError(f"the configuration of {path} cannot be read: {_first_line(error)}") from error
    text_config = config.get_text_config()
    if config.is_encoder_decoder:
        raise ModelLoadError(
            f"{path} is an encoder-decoder model ({config.model_type}); only decoder-only models can be served"
        )
    if getattr(text_config, "is_causal", True) is False or getattr(text_config, "use_bidirectional_attention", None):
        raise ModelLoadError(f"{path} is not a causal model: its attention looks ahead; choose a causal language model")
    if getattr(text_config, "attention_chunk_size", None) is not None:
        raise ModelLoadError(
            f"{path} attends in chunks (attention_chunk_size), which is not supported; choose another model"
        )
    return config


def _load_module(source: dict[str, Any], path: Path, architecture: str, dtype: torch.dtype, *, is_mxfp4: bool) -> Any:
    transformers.utils.logging.disable_progress_bar()  # a worker's log is no terminal
    if is_mxfp4:  # experts become dense weights, whatever kernels for them are installed
        source = {**source, "quantization_config": transformers.Mxfp4Config(dequantize=True)}
    try:
        with light_imports():
            module, report = transformers.AutoModelForCausalLM.from_pretrained(
                **source,
                dtype=dtype,
                attn_implementation=ATTENTION_NAME,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except LOAD_ERRORS as error:
        # The architecture looked our attention up in its own table.
        if ATTENTION_NAME in str(error) or "attention implementation" in str(error):
            raise unsupported_architecture(architecture, "it does not use transformers' attention interface") from error
        raise ModelLoadError(
            f"the weights of {path} cannot be loaded: {_first_line(error)}. "
            "If a file is cut short, copy or convert it again"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelLoadError(
            f"{path} lacks {len(missing)} weights, such as {missing[0]}; copy or convert the model again"
        )
    return module.eval().requires_grad_(False)


def choose_device(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise ModelLoadError(f"the device is {device!r}; it must be auto, cpu or cuda")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(
            "the device is cuda, but torch finds no CUDA device; use cpu or install a CUDA build of torch"
        )
    return device


def choose_dtype(dtype: str, device: str) -> str:
    """auto is float32 on a CPU, else the model's own."""
    return "float32" if dtype == "auto" and device == "cpu" else dtype


def _resolve_dtype(dtype: str, config: Any, is_gguf: bool) -> torch.dtype:
    if dtype in TORCH_DTYPES:
        return TORCH_DTYPES[dtype]
    if dtype != "auto":
        raise ModelLoadError(f"the dtype is {dtype!r}; it must be auto, {', '.join(TORCH_DTYPES)}")
    stored: Any = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    return next((known for known in TORCH_DTYPES.values() if known == stored and not is_gguf), torch.float32)


def _max_context_tokens(config: Any) -> int:
    """Length-dependent rope stays within its original range."""
    limit = getattr(config, "max_position_embeddings", None) or FALLBACK_CONTEXT_TOKENS
    for rope in _rope_parameters(config):
        if rope.get("rope_type", rope.get("type")) in LENGTH_DEPENDENT_ROPE:
            original = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limit = min(limit, original or limit)
    return int(limit)


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """One set, or one per type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _rope_text(config: Any) -> str:
    settings = {
        name: getattr(config, name, None)
        for name in (
            "rope_parameters",
            "rope_scaling",
            "rope_theta",
            "partial_rotary_factor",
            "max_position_embeddings",
        )
    }
    return json.dumps(settings, sort_keys=True, default=str)


def _compute_text(module: Any) -> str:
    """Settings that change K and V as weights do."""
    config = module.config.get_text_config().to_dict()
    volatile = (
        "transformers_version",
        "_name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
        "use_cache",
        "_attn_implementation",
    )
    settings = {name: value for name, value in config.items() if name not in volatile}
    return json.dumps(settings, sort_keys=True, default=str)


def _end_tokens(path: Path, module: Any) -> set[int]:
    """The folder's, else the architecture's usual ones."""
    if declared := path.is_dir() and declared_end_tokens(path):
        return set(declared)
    configs = (module.generation_config, module.config, module.config.get_text_config())
    return {token_id for config in configs for token_id in token_ids_in(getattr(config, "eos_token_id", None))}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
