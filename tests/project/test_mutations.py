"""The lists of mutations follow the sources."""

import pytest

from tests.faults.mutations import MUTATIONS as FAULT_MUTATIONS
from tests.security.identity_mutations import MUTATIONS as IDENTITY_MUTATIONS
from tests.security.tenant_mutations import MUTATIONS as TENANT_MUTATIONS
from tests.support.mutations import ROOT, Mutation


@pytest.mark.parametrize(
    "mutation", [*FAULT_MUTATIONS, *IDENTITY_MUTATIONS, *TENANT_MUTATIONS], ids=lambda mutation: mutation.name
)
def test_a_mutation_finds_what_it_replaces_and_names_a_test(mutation: Mutation) -> None:
    assert mutation.apply(ROOT) != (ROOT / mutation.path).read_text("utf-8")
    path, _, name = mutation.test.partition("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text("utf-8")
