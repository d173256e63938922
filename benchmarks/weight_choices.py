"""What weights and activations are, as a worker's settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True, slots=True)
class Weights:
    name: str
    settings: dict[str, str]


def make_weights(quantize: Sequence[str], dtypes: Sequence[str], activations: Sequence[str]) -> list[Weights]:
    """Every choice, where --dtype changes what is not quantized, and activations belong to bfloat16."""
    chosen = {}
    for kind, dtype, rows in product(quantize, dtypes, activations):
        if kind != "none":
            chosen[kind] = Weights(kind, {"quantize": kind})
        elif dtype != "bfloat16":
            name = "none" if dtype == "auto" else dtype
            chosen[name] = Weights(name, {} if dtype == "auto" else {"dtype": dtype})
        else:
            name = dtype if rows == "split" else f"{dtype}, {rows}"
            settings = {"dtype": dtype} if rows == "split" else {"dtype": dtype, "bfloat16_activations": rows}
            chosen[name] = Weights(name, settings)
    return list(chosen.values())
