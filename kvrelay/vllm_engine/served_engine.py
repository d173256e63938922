"""What VllmEngine reports of a worker, as plain values."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvrelay.config.settings import EngineSettings
from kvrelay.core.model_spec import ModelSpec
from kvrelay.worker.engine_setup import WorkerEngine

Role = Literal["kv_producer", "kv_consumer"]


@dataclass(frozen=True, slots=True)
class ServedEngine:
    folder: Path
    model: ModelSpec
    block_size: int
    max_sequence_tokens: int
    max_running_sequences: int
    kv_role: Role

    @property
    def max_tokens(self) -> int:
        """Longest sequence, prompt and output together."""
        return min(self.model.max_context_tokens, self.max_sequence_tokens)


def served_engine(engine: WorkerEngine, settings: EngineSettings, kv_role: Role) -> ServedEngine:
    return ServedEngine(
        engine.folder,
        engine.model,
        engine.blocks.block_size,
        engine.max_sequence_tokens,
        settings.max_running_sequences,
        kv_role,
    )
