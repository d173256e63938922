"""Turns a GGUF file into a folder as transformers writes it: safetensors, config, tokenizer. Knows nothing of the model store.

    python -m kvrelay.engine.gguf_conversion SOURCE.gguf TARGET --dtype float32

Run as a process of its own, so that the memory of the conversion goes when it ends and the caller needs no torch. Each line of
its standard output is a JSON object: {"stage": text, "fraction": 0 to 1}, or, as the last one, {"error": text} with exit code 1.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")

# How much of the whole each stage takes, measured with SmolLM2-135M. Most of it is parsing the vocabulary, which transformers
# does once for the config, once for the weights and once for the tokenizer.
STAGES = {
    "loading torch": 0.0,
    "reading the GGUF header": 0.15,
    "dequantizing the weights": 0.40,
    "building the tokenizer": 0.75,
    "writing safetensors": 0.95,
}


def convert_gguf(source: Path, target: Path, dtype: str, report: Callable[[str, float], None]) -> None:
    """Writes the model of the GGUF file `source` into the existing folder `target`, weights in `dtype`.

    Raises what transformers and gguf raise for a file that is broken or of an architecture they cannot read: of any type.
    """
    report("loading torch", STAGES["loading torch"])
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    def stage(name: str) -> None:
        report(name, STAGES[name])

    stage("reading the GGUF header")
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    stage("dequantizing the weights")
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, config=config, dtype=getattr(torch, dtype), use_safetensors=True
    )
    # The weights are plain numbers now; a folder that still said "gguf" would be dequantized a second time.
    del model.hf_quantizer
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    stage("building the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    stage("writing safetensors")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    report("converted", 1.0)


def _print_line(**fields: str | float) -> None:
    # A closed pipe means that nobody waits for the model any more: BrokenPipeError ends the process.
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
        _print_line(error=f"{error}; converting needs the extra `worker`: pip install 'kvrelay[worker]'")
        return 1
    except (
        Exception
    ) as error:  # A broken file makes the readers raise anything, struct.error included; this is the process's top.
        _print_line(error=f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
