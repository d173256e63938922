"""KV bytes of one generation: by the formulas, in our pool, as exported for a transfer, and in
transformers' cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks.engine_steps import load_engine
from kvrelay.engine.paged_kv_cache import TORCH_DTYPES
from kvrelay.kv_cache.memory_planning import attention_kind, kv_cache_bytes, mha_kv_cache_bytes_16_bit
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.models.shape import read_model_shape

FIRST_TOKEN = 100


@dataclass(frozen=True, slots=True)
class KVBytes:
    """Bytes of a batch when generation has ended: `m` prompt tokens, `n` new ones, the last of
    which has no KV.
    """

    model: str
    attention: str
    num_heads: int
    num_kv_heads: int
    dtype: str
    """Of weights, and of KV in transformers."""
    kv_dtype: str
    batch_size: int
    num_prompt_tokens: int
    num_new_tokens: int
    mha_formula: int | None
    """4 b l h (m + n); only where it holds: MHA in 16 bit."""
    general_formula: int
    """2 bytes b l kv_heads head_dim (m + n)"""
    general_formula_computed: int
    """The same for the m + n - 1 tokens whose KV is computed."""
    exported: int
    """By `export_kv`, all sequences."""
    blocks: int
    """Blocks that the sequences hold, of the pool's real size."""
    transformers: int
    """Tensors of its DynamicCache."""


def measure_kv_bytes(
    name: str,
    model: str,
    dtype: str,
    batch_size: int,
    num_prompt_tokens: int,
    num_new_tokens: int,
    num_threads: int,
    kv_dtype: str = "auto",
) -> KVBytes:
    """Generates with our engine and with transformers, and counts.

    Args:
        name: to show.
        model: as in the setting.
        dtype: of weights, and of KV in transformers.
        batch_size, num_prompt_tokens, num_new_tokens: what is generated.
        num_threads: CPU threads.
        kv_dtype: of our KV, as in the setting.
    """
    ours = load_engine(
        model, num_threads, batch_size * (num_prompt_tokens + num_new_tokens + 64), dtype=dtype, kv_dtype=kv_dtype
    )
    engine = ours.engine
    prompts = [[FIRST_TOKEN + number] * num_prompt_tokens for number in range(batch_size)]
    sequences = [ours.start(prompt) for prompt in prompts]
    for _ in range(num_new_tokens):
        ours.step([(sequence, sequence.num_uncomputed_tokens) for sequence in sequences])
    layout = engine.model.kv_layout
    exported = 0
    for sequence in sequences:
        assert sequence.block_table is not None
        span = KVSpan(0, layout.num_layers, 0, sequence.num_computed_tokens)
        payload = bytearray(span.num_bytes(layout))
        engine.cache.export_kv(memoryview(payload), span, sequence.block_table.blocks)
        exported += len(payload)
    shape = read_model_shape(engine.folder)
    kind = attention_kind(shape.num_heads, shape.num_kv_heads)
    lengths = (num_prompt_tokens, num_new_tokens)
    has_formula = kind == "MHA" and layout.dtype in ("bfloat16", "float16")
    return KVBytes(
        model=name,
        attention=kind,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        dtype=dtype,
        kv_dtype=layout.dtype,
        batch_size=batch_size,
        num_prompt_tokens=num_prompt_tokens,
        num_new_tokens=num_new_tokens,
        mha_formula=mha_kv_cache_bytes_16_bit(batch_size, shape.num_layers, shape.hidden_size, *lengths)
        if has_formula
        else None,
        general_formula=kv_cache_bytes(layout, batch_size, *lengths),
        general_formula_computed=kv_cache_bytes(layout, batch_size, num_prompt_tokens, num_new_tokens - 1),
        exported=exported,
        blocks=engine.blocks.num_used_blocks * (engine.cache.pool_bytes // engine.cache.num_blocks),
        transformers=_transformers_bytes(engine.folder, dtype, prompts, num_new_tokens),
    )


def _transformers_bytes(folder: Path, dtype: str, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> int:
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    auto_model: Any = AutoModelForCausalLM
    model = auto_model.from_pretrained(folder, dtype=TORCH_DTYPES[dtype]).eval()
    input_ids = torch.tensor(prompts)
    with torch.inference_mode():
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=num_new_tokens,
            min_new_tokens=None,
            eos_token_id=None,
            pad_token_id=0,
            do_sample=False,
            return_dict_in_generate=True,
        )
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
