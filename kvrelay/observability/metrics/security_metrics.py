"""Metrics of the guards of a process and of the files of credentials."""

from collections.abc import Iterator

from kvrelay.errors import AccessDeniedError, UnauthenticatedError
from kvrelay.observability.metrics.families import Family, Sample
from kvrelay.security.process_security import ProcessSecurity

REASONS = (UnauthenticatedError.reason, AccessDeniedError.reason)

CALLS_REFUSED = Family(
    "kvrelay_calls_refused_total",
    "counter",
    "Calls and HTTP requests that were refused for who makes them, by the error's reason.",
    ("reason",),
)
PROBLEMS = Family(
    "kvrelay_credential_problems",
    "gauge",
    "Files of credentials that cannot be read as they are now; what they had before counts.",
)
FAMILIES = (CALLS_REFUSED, PROBLEMS)


def security_samples(security: ProcessSecurity) -> Iterator[Sample]:
    for reason in REASONS:
        yield Sample(CALLS_REFUSED, security.num_refused[reason], (reason,))
    yield Sample(PROBLEMS, len(security.problems))
