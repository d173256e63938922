"""Settings of a worker's model: where it is, and in which types it is computed."""

from typing import Literal

from pydantic import Field

from kvrelay.config.base import Settings


class ModelSettings(Settings):
    model: str = Field(
        default="smollm2-135m-instruct",
        description="Model: a name in the model store, a folder, a GGUF file or a hub name.",
    )
    served_model_name: str | None = Field(
        default=None, description="Name that clients ask for. Default: the model's own."
    )
    model_dir: str | None = Field(
        default=None, description="The model store's folder. Default: kvrelay/models in the user's cache folder."
    )
    generation_config: Literal["auto", "none"] = Field(
        default="auto",
        description="Default sampling parameters: auto takes those in generation_config.json of the model, "
        "none has temperature 1 and no filters. End tokens are always the model's.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where to compute; auto takes cuda if available."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of weights and KV; auto is float32 on cpu and the model's own on cuda."
    )
    kernels: Literal["auto", "off"] = Field(
        default="auto",
        description="auto compiles kernels for float32, bfloat16 and int8 on the CPU; off uses torch only.",
    )
    bfloat16_activations: Literal["split", "plain"] = Field(
        default="split",
        description="Activations beside bfloat16 weights: split has 16 bits of each, plain rounds them to bfloat16.",
    )
    kernel_variant: Literal["auto", "amx", "avx512", "avxvnni", "avx2", "i8mm", "dotprod", "neon", "portable"] = Field(
        default="auto", description="Instructions of the kernels; auto takes the best here. All give the same bits."
    )
    quantize: Literal["none", "int8"] = Field(
        default="none", description="int8 quantizes weights and activations; the same on all workers of a model."
    )
    kv_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        default="auto",
        description="Type of stored and sent KV; auto is the model's type of computation, int8 needs the kernels.",
    )
