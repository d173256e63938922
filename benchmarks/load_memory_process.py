"""A process that loads models as a worker does, one after the other, and prints what each took as a
line of JSON.

    python -m benchmarks.load_memory_process FIRST FOLDER DTYPE QUANTIZE [FOLDER DTYPE QUANTIZE ...]

FIRST is a small model of the same architecture, which is loaded before the count begins.
"""

import ctypes
import dataclasses
import gc
import json
import sys
from pathlib import Path

from kvrelay.config.settings import EngineSettings
from kvrelay.worker.engine_setup import WorkerEngine, build_engine

NUM_KV_BLOCKS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class LoadMemory:
    """Bytes. Those in memory are above what the process held before."""

    weight_bytes: int
    """As they are computed with."""
    peak_bytes: int
    held_bytes: int
    """When the model was loaded."""
    kernels: str


def measure(folder: Path, dtype: str, quantize: str) -> LoadMemory:
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak begins anew
    engine = _load(folder, dtype, quantize)
    peak = _status_bytes("VmHWM")
    _collect()
    weight_bytes = engine.model_runner.model.weight_bytes
    return LoadMemory(weight_bytes, peak - before, _status_bytes("VmRSS") - before, engine.description)


def _load(folder: Path, dtype: str, quantize: str) -> WorkerEngine:
    chosen = {"model": str(folder), "dtype": dtype, "quantize": quantize, "num_kv_blocks": NUM_KV_BLOCKS}
    return build_engine(EngineSettings.model_validate(chosen))


def _status_bytes(name: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
    return int(fields[name].split()[0]) * 1024


def _collect() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    first, *rest = sys.argv[1:]
    for dtype, quantize in (("float32", "none"), ("bfloat16", "none")):
        _load(Path(first), dtype, quantize)
    while rest:
        folder, dtype, quantize, *rest = rest
        _collect()
        print(json.dumps(dataclasses.asdict(measure(Path(folder), dtype, quantize))), flush=True)


if __name__ == "__main__":
    main()
