"""Commands to the decode worker's engine thread."""

from dataclasses import dataclass

from kvrelay.core.job import JobId, SequenceToken
from kvrelay.worker.commands import CancelJob, FailJob, MasksMade
from kvrelay.worker.sequence import PreparedJob


@dataclass(frozen=True, slots=True)
class ReserveBlocks:
    prepared: PreparedJob


@dataclass(frozen=True, slots=True)
class ComputePrompt:
    job_id: JobId


@dataclass(frozen=True, slots=True)
class PushEnded:
    """`first_tokens` is None when the push failed."""

    job_id: JobId
    first_tokens: tuple[SequenceToken, ...] | None
    kv_bytes: int = 0
    num_transferred_tokens: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class EndSequence:
    job_id: JobId
    sequence: int


@dataclass(frozen=True, slots=True)
class SetPaused:
    """The client reads too slowly, or has caught up."""

    job_id: JobId
    paused: bool


@dataclass(frozen=True, slots=True)
class YieldReservations:
    """Reservations that nothing uses, oldest first."""

    idle: tuple[JobId, ...]


Command = (
    YieldReservations
    | MasksMade
    | ReserveBlocks
    | ComputePrompt
    | PushEnded
    | EndSequence
    | SetPaused
    | CancelJob
    | FailJob
)
