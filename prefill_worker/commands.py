"""What the service and the sender tell the engine thread of a prefill worker, as plain values."""

from dataclasses import dataclass

from kvrelay.work import FailureKind, Work, WorkId


@dataclass(frozen=True, slots=True)
class StartPrompt:
    """A new, checked work."""

    work: Work
    received_at: float
    """Monotonic seconds."""


@dataclass(frozen=True, slots=True)
class SenderEnded:
    """The work's blocks are not read any more. `problem` is None when all KV was acknowledged."""

    work_id: WorkId
    problem: str | None


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The work is not wanted any more."""

    work_id: WorkId


@dataclass(frozen=True, slots=True)
class Fail:
    """The work ends without its result."""

    work_id: WorkId
    kind: FailureKind
    message: str


Command = StartPrompt | SenderEnded | GiveUp | Fail
