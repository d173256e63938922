"""Which workers get jobs: those that the registry names, with allowed models. Pure.

A certificate has proven the role before.
"""

from collections.abc import Iterable

from kvrelay.core.member import Member, MemberRole
from kvrelay.core.model_spec import ModelSpec
from kvrelay.core.quoting import quoted


class WorkerTrust:
    """Without `allowed_fingerprints`, every model of a registered worker is served."""

    def __init__(self, allowed_fingerprints: Iterable[str] = ()) -> None:
        self._allowed = frozenset(allowed_fingerprints)
        self._members: tuple[Member, ...] = ()

    def set_members(self, members: tuple[Member, ...]) -> None:
        self._members = members

    def is_named(self, role: MemberRole, address: str, worker_id: str) -> bool:
        return self._find(role, address, worker_id) is not None

    def problem_with(self, role: MemberRole, address: str, worker_id: str, model: ModelSpec) -> str | None:
        member = self._find(role, address, worker_id)
        if member is None:
            return (
                f"{address} answers as {quoted(worker_id)}, which the registry does not name there; "
                "see which process listens at this address"
            )
        # Older versions register no model.
        if member.fingerprint and (member.model, member.fingerprint) != (model.name, model.fingerprint):
            return (
                f"{address} serves {quoted(model.name)} with fingerprint {quoted(model.fingerprint)}, and has "
                f"registered {quoted(member.model)} with {quoted(member.fingerprint)}; restart it"
            )
        if self._allowed and model.fingerprint not in self._allowed:
            return (
                f"{address} serves {quoted(model.name)} with fingerprint {quoted(model.fingerprint)}, which "
                "--allowed-fingerprints does not list; stop the worker, or add the fingerprint"
            )
        return None

    def _find(self, role: MemberRole, address: str, worker_id: str) -> Member | None:
        wanted = (role, address, worker_id)
        return next((each for each in self._members if (each.role, each.address, each.instance_id) == wanted), None)
