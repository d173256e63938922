"""Converts a GGUF file into a transformers folder: safetensors, config, tokenizer.

    python -m kvrelay.engine.gguf_conversion SOURCE.gguf TARGET --dtype float32

Its own process, whose end frees the memory. Prints lines of JSON: {"stage": text, "fraction": 0
to 1}, or at last {"error": text} with exit code 1.
"""

import argparse
import json
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvrelay.models.end_tokens import token_ids_in
from kvrelay.runtime.cpu_cores import processor_share
from kvrelay.runtime.extras import missing_extra

DTYPES = ("float32", "bfloat16", "float16")

# Progress at the start of each stage, measured with SmolLM2-135M. Most time goes into parsing the
# vocabulary, which transformers does three times: for config, weights and tokenizer.
STAGES = {
    "loading torch": 0.0,
    "reading the GGUF header": 0.15,
    "dequantizing the weights": 0.40,
    "building the tokenizer": 0.75,
    "writing safetensors": 0.95,
}


def convert_gguf(source: Path, target: Path, dtype: str, report: Callable[[str, float], None]) -> None:
    """Raises any exception of transformers and gguf for a bad file."""
    report("loading torch", STAGES["loading torch"])
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from kvrelay.engine.model_runner import use_torch_threads

    use_torch_threads(processor_share().num_threads)

    def stage(name: str) -> None:
        report(name, STAGES[name])

    stage("reading the GGUF header")
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    stage("dequantizing the weights")
    with counted_tensors(
        source, lambda share: report("dequantizing the weights", _within("dequantizing the weights", share))
    ):
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, config=config, dtype=getattr(torch, dtype), use_safetensors=True
        )
    # The weights are plain now; with "gguf" in its config the folder would be dequantized again.
    del model.hf_quantizer
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    stage("building the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    if (generation_config := model.generation_config) is not None:
        ends = {*token_ids_in(generation_config.eos_token_id), *gguf_end_tokens(source)}
        generation_config.eos_token_id = sorted(ends) or None
    stage("writing safetensors")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    report("converted", 1.0)


@contextmanager
def counted_tensors(source: Path, report: Callable[[float], None]) -> Iterator[None]:
    """Reports the finished share; transformers shows it only on a terminal."""
    import gguf

    with source.open("rb") as file:
        _, _, num_tensors = struct.unpack("<4sIQ", file.read(16))
    dequantize = gguf.dequantize
    num_done = 0

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal num_done
        weights = dequantize(*arguments, **options)
        num_done += 1
        report(min(num_done / max(num_tensors, 1), 1.0))
        return weights

    gguf.dequantize = counting
    try:
        yield
    finally:
        gguf.dequantize = dequantize


def _within(stage: str, share: float) -> float:
    """Progress in all when this share of a stage is done."""
    begin = STAGES[stage]
    end = min((other for other in STAGES.values() if other > begin), default=1.0)
    return begin + (end - begin) * share


def gguf_end_tokens(source: Path) -> set[int]:
    """Of texts, turns and messages; transformers keeps only the first."""
    from gguf import GGUFReader

    fields = GGUFReader(source).fields
    declared = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return {token_id for field in declared if field is not None for token_id in token_ids_in(field.contents())}


def _print_line(**fields: str | float) -> None:
    # A closed pipe means that the caller has gone: BrokenPipeError ends the process.
    print(json.dumps(fields), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Converts a GGUF file into a safetensors folder.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments = parser.parse_args()
    try:
        convert_gguf(
            arguments.source,
            arguments.target,
            arguments.dtype,
            lambda stage, fraction: _print_line(stage=stage, fraction=fraction),
        )
    except ImportError as error:
        _print_line(error=f"{error}; converting needs the extra `worker`: {missing_extra('worker')}")
        return 1
    except Exception as error:  # the readers raise anything for a broken file, such as struct.error
        _print_line(error=f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
