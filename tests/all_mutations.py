"""`python -m tests.all_mutations`: takes out every guard, one by one, and expects a test to fail.

It works in a copy of the sources and takes an hour. `-k` chooses some; `-O` leaves asserts out.
"""

import sys
from collections.abc import Mapping, Sequence

from tests.faults import mutations as faults
from tests.security import (
    bound_mutations,
    confinement_mutations,
    front_mutations,
    identity_mutations,
    quota_mutations,
    tenant_mutations,
    transport_mutations,
    worker_mutations,
)
from tests.support.mutations import Mutation, run_mutations

LISTS: Mapping[str, Sequence[Mutation]] = {
    module.__name__: module.MUTATIONS
    for module in (
        bound_mutations,
        confinement_mutations,
        front_mutations,
        identity_mutations,
        quota_mutations,
        tenant_mutations,
        transport_mutations,
        worker_mutations,
        faults,
    )
}
"""By module."""

if __name__ == "__main__":
    sys.exit(run_mutations([mutation for mutations in LISTS.values() for mutation in mutations]))
