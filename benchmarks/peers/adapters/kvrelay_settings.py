"""What both adapters of kvrelay tell its engine."""

from typing import TYPE_CHECKING, Any

from benchmarks.peers.adapters.adapter_loop import Options

if TYPE_CHECKING:
    from kvrelay.config.settings import EngineSettings


def engine_settings(options: Options, **more: Any) -> "EngineSettings":
    """Settings for these options.

    Raises:
        ValueError: this version cannot quantize in that way.
    """
    from kvrelay.config.settings import EngineSettings

    dtype = "bfloat16" if options.weights == "bf16" else "float32"
    settings: dict[str, Any] = {"model": options.model_folder, "dtype": dtype, "prefix_cache": False, **more}
    if options.chunk_tokens is not None:
        settings["prefill_chunk_tokens"] = options.chunk_tokens
    if options.weights not in ("f32", "bf16"):
        if "quantize" not in EngineSettings.model_fields:
            raise ValueError(f"this version of kvrelay has no weights of {options.weights}")
        settings["quantize"] = options.weights
    return EngineSettings(**settings)
