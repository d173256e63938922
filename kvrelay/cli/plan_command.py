"""`kvrelay plan`: memory of a model and its KV cache. Reads config.json only."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from kvrelay.cli.model_commands import open_store, progress_bar
from kvrelay.cli.setting_options import takes_settings
from kvrelay.cli.views.output import console, print_json
from kvrelay.config.settings import EngineSettings
from kvrelay.config.sources import SettingsSources
from kvrelay.core.model_spec import KV_SCALE_BYTES
from kvrelay.errors import ConfigError
from kvrelay.kv_cache.memory_planning import (
    attention_kind,
    blocks_for_tokens,
    bytes_per_block,
    kv_cache_bytes,
    mha_kv_cache_bytes_16_bit,
    weight_bytes,
)
from kvrelay.models.shape import ModelShape, read_model_shape

COMBINATIONS = (
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float32", "int8"),
    ("int8", "float32"),
    ("int8", "bfloat16"),
    ("int8", "int8"),
)
"""Types of weights and KV."""

COLUMNS = (
    "weights",
    "KV",
    "weights MiB",
    "KV KiB/token",
    "KV MiB",
    "blocks",
    "blocks MiB",
    "sequences fit",
    "tokens fit",
)

_KIB, _MIB, _GIB = 1024, 1024**2, 1024**3


@dataclass(frozen=True, slots=True)
class Demand:
    batch_size: int
    num_prompt_tokens: int
    num_new_tokens: int
    block_size: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    weights_dtype: str
    kv_dtype: str
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    """Of the whole batch, without rounding to blocks."""
    num_blocks: int
    block_bytes: int
    max_sequences: int
    """That fit beside the weights."""
    max_tokens: int


@takes_settings(EngineSettings, only={"model_dir", "block_size"})
def plan(
    sources: SettingsSources,
    model: Annotated[str | None, typer.Argument(help="Name in the store, or a folder with a config.json.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at once.")] = 1,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of each prompt.")] = 1024,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=0, help="Tokens generated behind each.")] = 256,
    memory_gib: Annotated[
        float | None, typer.Option("--memory-gib", help="Memory. Default: all of this machine's.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON, for programs.")] = False,
) -> None:
    """Show what memory a model's weights and KV cache take, and how many sequences fit. Needs no
    torch.
    """
    settings = sources.load("models", EngineSettings)
    demand = Demand(batch, prompt_tokens, new_tokens, settings.block_size, _memory_bytes(memory_gib))
    folder = _model_folder(sources, model or settings.model)
    shape = read_model_shape(folder)
    plans = [make_plan(shape, demand, *dtypes) for dtypes in COMBINATIONS]
    if json:
        print_json({"model": folder.name, "shape": shape, "demand": demand, "plans": plans})
    else:
        _show(folder.name, shape, demand, plans)


def make_plan(shape: ModelShape, demand: Demand, weights_dtype: str, kv_dtype: str) -> Plan:
    layout = shape.kv_layout(kv_dtype)
    num_tokens = demand.num_prompt_tokens + demand.num_new_tokens
    blocks_per_sequence = blocks_for_tokens(num_tokens, demand.block_size)
    num_blocks = demand.batch_size * blocks_per_sequence
    weights = weight_bytes(shape.weights, weights_dtype)
    max_blocks = max(0, demand.memory_bytes - weights) // bytes_per_block(layout, demand.block_size)
    return Plan(
        weights_dtype=weights_dtype,
        kv_dtype=kv_dtype,
        weight_bytes=weights,
        kv_bytes_per_token=layout.bytes_per_token,
        kv_bytes=kv_cache_bytes(layout, demand.batch_size, demand.num_prompt_tokens, demand.num_new_tokens),
        num_blocks=num_blocks,
        block_bytes=num_blocks * bytes_per_block(layout, demand.block_size),
        max_sequences=max_blocks // blocks_per_sequence,
        max_tokens=max_blocks * demand.block_size,
    )


def _memory_bytes(memory_gib: float | None) -> int:
    if memory_gib is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not 0 < memory_gib < 2**30:
        raise ConfigError(f"--memory-gib is {memory_gib}; it must be a number of GiB above 0")
    return int(memory_gib * _GIB)


def _model_folder(sources: SettingsSources, model: str) -> Path:
    """A folder with a config.json, or a name in the store."""
    if (Path(os.path.expanduser(model)) / "config.json").is_file():
        return Path(os.path.expanduser(model)).resolve()
    with progress_bar() as progress:
        return open_store(sources).ensure(model, progress)


def _show(name: str, shape: ModelShape, demand: Demand, plans: list[Plan]) -> None:
    from kvrelay.cli.views.fitted_table import FittedTable

    num_tokens = demand.num_prompt_tokens + demand.num_new_tokens
    lengths = f"{demand.batch_size} x ({demand.num_prompt_tokens} + {demand.num_new_tokens}) tokens"
    title = f"{lengths}, blocks of {demand.block_size}, {demand.memory_bytes / _GIB:,.1f} GiB"
    table = FittedTable(title, num_key_columns=2)
    for number, column in enumerate(COLUMNS):
        table.add_text_column(column, right=number >= 2)
    for each in plans:
        table.add_texts(
            each.weights_dtype,
            each.kv_dtype,
            f"{each.weight_bytes / _MIB:,.1f}",
            f"{each.kv_bytes_per_token / _KIB:,.1f}",
            f"{each.kv_bytes / _MIB:,.1f}",
            f"{each.num_blocks:,}",
            f"{each.block_bytes / _MIB:,.1f}",
            f"{each.max_sequences:,}",
            f"{each.max_tokens:,}",
        )
    for line in (*_describe(name, shape, demand), *_warnings(shape, num_tokens)):
        console().print(line, markup=False, soft_wrap=True)
    console().print(table)


def _describe(name: str, shape: ModelShape, demand: Demand) -> list[str]:
    kind = attention_kind(shape.num_heads, shape.num_kv_heads)
    size = f"{'about ' if shape.is_estimated else ''}{shape.weights.num_parameters / 1e6:,.1f} million parameters"
    heads = f"{kind} with {shape.num_heads} heads, {shape.num_kv_heads} KV heads of {shape.head_dim}"
    lines = [
        f"{name} ({shape.architecture}): {size}, {shape.num_layers} layers, {heads}",
        "KV bytes = 2 x bytes x batch x layers x KV heads x head size x (prompt + new tokens)",
        f"KV in int8: 1 byte, and {KV_SCALE_BYTES} for the scale of each KV head and token, of K and of V",
    ]
    if kind == "MHA":
        total = mha_kv_cache_bytes_16_bit(
            demand.batch_size, shape.num_layers, shape.hidden_size, demand.num_prompt_tokens, demand.num_new_tokens
        )
        lines.append(f"in 16 bit = 4 x batch x layers x hidden size x (prompt + new tokens) = {total:,} bytes")
    return lines


def _warnings(shape: ModelShape, num_tokens: int) -> list[str]:
    if shape.max_context_tokens is not None and num_tokens > shape.max_context_tokens:
        return [f"the model was made for {shape.max_context_tokens:,} tokens; these sequences have {num_tokens:,}"]
    return []
