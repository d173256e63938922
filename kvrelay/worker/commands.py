"""Commands to engine threads and their events, for both kinds of workers."""

from dataclasses import dataclass

from kvrelay.core.job import FailureKind, JobId


@dataclass(frozen=True, slots=True)
class CancelJob:
    job_id: JobId


@dataclass(frozen=True, slots=True)
class FailJob:
    job_id: JobId
    kind: FailureKind
    message: str


@dataclass(frozen=True, slots=True)
class MasksMade:
    """A mask is ready. Only wakes the engine thread."""


@dataclass(frozen=True, slots=True)
class JobFailed:
    """The job ended without its result and holds nothing."""

    job_id: JobId
    kind: FailureKind
    message: str


@dataclass(frozen=True, slots=True)
class JobEnded:
    """The job finished or was cancelled, and holds nothing."""

    job_id: JobId


JobEnd = JobFailed | JobEnded
