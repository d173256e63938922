"""Commands to the prefill worker's engine thread."""

from dataclasses import dataclass

from kvrelay.core.job import JobId
from kvrelay.worker.commands import CancelJob, FailJob, MasksMade
from kvrelay.worker.sequence import PreparedJob


@dataclass(frozen=True, slots=True)
class StartPrompt:
    prepared: PreparedJob
    received_at: float
    """Monotonic seconds."""


@dataclass(frozen=True, slots=True)
class SenderEnded:
    """The sender no longer reads the blocks. `problem` is None after a complete push."""

    job_id: JobId
    problem: str | None


Command = MasksMade | StartPrompt | SenderEnded | CancelJob | FailJob
