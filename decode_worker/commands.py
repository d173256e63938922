"""What the service and the receiver tell the engine thread of a decode worker, as plain values."""

from dataclasses import dataclass

from kvrelay.work import FailureKind, SequenceToken, Work, WorkId


@dataclass(frozen=True, slots=True)
class ReserveBlocks:
    """A new, checked work."""

    work: Work


@dataclass(frozen=True, slots=True)
class ComputePrompt:
    """A reservation's prompt is to be computed here."""

    work_id: WorkId


@dataclass(frozen=True, slots=True)
class PushEnded:
    """The writer of a reservation has left its blocks. `first_tokens` is None when the push failed."""

    work_id: WorkId
    first_tokens: tuple[SequenceToken, ...] | None
    kv_bytes: int = 0
    num_transferred_tokens: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class EndSequence:
    """The gateway ends one sequence."""

    work_id: WorkId
    sequence: int


@dataclass(frozen=True, slots=True)
class SetPaused:
    """The gateway's client reads too slowly, or has caught up."""

    work_id: WorkId
    paused: bool


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


Command = ReserveBlocks | ComputePrompt | PushEnded | EndSequence | SetPaused | GiveUp | Fail
