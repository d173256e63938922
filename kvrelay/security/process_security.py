"""What one process knows about credentials: built once, when it starts."""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import grpc
import structlog

from kvrelay.errors import ConfigError, KvrelayError
from kvrelay.security.audit import REFUSED, AuditLog, CallAudit, set_current_audit
from kvrelay.security.cluster_key import ClusterKey, ProveWorker, prove_nothing
from kvrelay.security.credentials import ChannelCredentials, ProcessCertificates
from kvrelay.security.guard import AuthContext, BearerVerifier, Guard
from kvrelay.security.method_rules import GRPC_RULES, HTTP_RULES, Rules
from kvrelay.security.principal import Principal, Role
from kvrelay.security.role_names import is_plain_text

if TYPE_CHECKING:
    from kvrelay.config.security_settings import SecuritySettings

POLL_INTERVAL_S = 0.5
"""A changed file counts after two polls."""

ALL_RIGHTS = "everybody there has all rights"
PLAIN_KEYS = "clients' keys come there in plain text"

_log = structlog.get_logger(__name__)


class WatchedFile(Protocol):
    @property
    def name(self) -> str:
        """Says what is in it, to everybody."""

    @property
    def problem(self) -> str | None:
        """Why what it had before counts; without secrets."""

    def poll(self) -> bool:
        """Whether running calls must be looked at. Blocks: call it in a thread."""


@dataclass(frozen=True, slots=True)
class GuardedBy:
    """Rules of the two ports; None lets every caller in."""

    grpc: Rules | None
    http: Rules | None


class ProcessSecurity:
    """`guard` is of gRPC. A guard is None where callers cannot prove who they are: each is LOCAL."""

    def __init__(
        self,
        rules: GuardedBy,
        role: Role,
        verifiers: Sequence[BearerVerifier],
        files: Sequence[WatchedFile],
        certificates: ProcessCertificates | None = None,
        takes_keys: bool = False,
        cluster_key: ClusterKey | None = None,
        audit: AuditLog | None = None,
        local_clients: bool = False,
    ) -> None:
        """`local_clients`: plain text comes from LOCAL callers."""
        self._certificates = certificates
        self._cluster_key = cluster_key
        self._prover = None if cluster_key is None else partial(cluster_key.proof_of, role)
        self.prove_worker: ProveWorker = (
            prove_nothing if cluster_key is None else partial(cluster_key.prove_worker, role)
        )
        self._takes_keys = takes_keys
        self._local_clients = local_clients
        self.num_refused: Counter[str] = Counter()
        """By the error's reason."""
        self._audit = audit
        self.guard = self._guard_of(rules.grpc, verifiers)
        self.http_guard = self._guard_of(rules.http, verifiers)
        self._files = tuple(files)

    def _guard_of(self, rules: Rules | None, verifiers: Sequence[BearerVerifier]) -> Guard | None:
        if rules is None:
            return None
        return Guard(
            rules,
            verifiers,
            self._peer_roles,
            on_refused=self._on_refused,
            on_admitted=self._on_admitted,
            is_local=is_plain_text if self._local_clients else lambda auth_context: False,
        )

    @classmethod
    def of(cls, settings: SecuritySettings, role: Role, *, local_clients: bool = False) -> ProcessSecurity:
        """`role` is the process's own."""
        settings = settings.of_role(role)
        verifiers, files = _verifiers(settings)
        takes_keys = role is Role.GATEWAY and bool(verifiers)  # workers are called with certificates only
        certificates = _certificates(settings, role)
        if certificates is not None:
            files.append(certificates.files)
        if local_clients:
            _check_local_clients(settings)
        cluster_key = None if settings.cluster_key_file is None else ClusterKey.read(settings.cluster_key_file)
        if cluster_key is not None:
            verifiers.insert(0, cluster_key)  # JWTs have two dots, too
        has_guard = takes_keys or certificates is not None or (cluster_key is not None and role is not Role.GATEWAY)
        return cls(
            GuardedBy(
                GRPC_RULES.get(role) if has_guard else None,
                HTTP_RULES[role] if settings.has_client_credentials and not local_clients else None,
            ),
            role,
            verifiers,
            files,
            certificates,
            takes_keys,
            cluster_key,
            None if settings.audit_log is None else AuditLog(settings.audit_log),
            local_clients,
        )

    @property
    def problems(self) -> tuple[str, ...]:
        """Sentences without secrets, for operators."""
        return tuple(problem for file in self._files if (problem := file.problem) is not None)

    def health_notes(self, exposure: str | None) -> dict[str, object]:
        """What everybody may know: no paths, no names."""
        broken = [file.name for file in self._files if file.problem is not None]
        notes: dict[str, object] = {"insecure": True} if exposure else {}
        return {**notes, "credential_problems": broken} if broken else notes

    @property
    def danger(self) -> str | None:
        """From other machines, for which a cluster's key is not made."""
        if self._certificates is not None:
            return None
        return PLAIN_KEYS if self._takes_keys else ALL_RIGHTS

    @property
    def needs_peer_port(self) -> bool:
        """gRPC cannot ask for a certificate that may be missing, and these clients have none."""
        return self._certificates is not None and (self._takes_keys or self._local_clients)

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """Asks for certificates unless callers may have keys. None: plain text."""
        if self._certificates is None or self._local_clients:
            return None
        return self._certificates.server(asks_for_certificate=not self._takes_keys)

    def peer_credentials(self) -> grpc.ServerCredentials | None:
        """Of a port that every caller needs a certificate for."""
        return None if self._certificates is None else self._certificates.server(asks_for_certificate=True)

    def https_context(self) -> ssl.SSLContext | None:
        """Of the HTTP port. None: plain text."""
        if self._certificates is None or self._local_clients:
            return None
        from kvrelay.security.https import https_context

        return https_context(self._certificates.files)

    def towards(self, role: Role) -> ChannelCredentials | None:
        """For a channel to a process of this role, as the files are now. None: plain text."""
        if self._certificates is not None:
            return self._certificates.towards(role)
        return None if self._prover is None else ChannelCredentials(None, None, b"", self._prover, self._cluster_key)

    def listens(self, is_own: Callable[[str], bool]) -> None:
        """See `ClusterKey.listens`."""
        if self._cluster_key is not None:
            self._cluster_key.listens(is_own)

    def _peer_roles(self, auth_context: AuthContext) -> frozenset[Role]:
        return frozenset() if self._certificates is None else self._certificates.peer_roles(auth_context)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Takes changed files over within the block, and writes the audit log to its end after it.

        With an audit log SIGHUP reopens it, and ends nothing.
        """
        watch = asyncio.create_task(self._watch(), name="watch of the credentials")
        loop = asyncio.get_running_loop()
        if self._audit is not None:
            loop.add_signal_handler(signal.SIGHUP, self._audit.reopen)
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.wait([watch])
            if self._audit is not None:
                loop.remove_signal_handler(signal.SIGHUP)
                await asyncio.to_thread(self._audit.close)

    async def _watch(self) -> None:
        while self._files:
            await asyncio.sleep(POLL_INTERVAL_S)
            # All of them: `any` over a generator would leave out files after the first change.
            if any([await asyncio.to_thread(file.poll) for file in self._files]):
                self._end_withdrawn()

    def _on_refused(self, who: str, method: str, error: KvrelayError) -> None:
        self.num_refused[error.reason] += 1
        if self._audit is not None:
            self._audit.record(who=who, method=method, request_id="", decision=REFUSED, reason=error.reason)

    def _on_admitted(self, principal: Principal, method: str) -> None:
        set_current_audit(None if self._audit is None else CallAudit(self._audit, principal, method))

    def _end_withdrawn(self) -> None:
        num_ended = sum(guard.end_withdrawn() for guard in (self.guard, self.http_guard) if guard is not None)
        if num_ended:
            _log.info("calls ended, because their credentials were withdrawn", num_calls=num_ended)


def _verifiers(settings: SecuritySettings) -> tuple[list[BearerVerifier], list[WatchedFile]]:
    """Imports only what the settings ask for: PyJWT slows the start."""
    verifiers: list[BearerVerifier] = []
    files: list[WatchedFile] = []
    if settings.keys_file is not None:
        from kvrelay.security.keys import KeysFile

        keys = KeysFile(settings.keys_file)
        verifiers.append(keys)
        files.append(keys.file)
    if settings.jwks_file is not None:
        if settings.jwt_issuer is None or settings.jwt_audience is None:
            raise ConfigError("jwks_file needs jwt_issuer and jwt_audience: give --jwt-issuer and --jwt-audience")
        from kvrelay.security.json_web_tokens import JsonWebTokens, TokenRules

        rules = TokenRules(
            settings.jwt_issuer, settings.jwt_audience, settings.jwt_tenant_claim, settings.jwt_roles_claim
        )
        tokens = JsonWebTokens(settings.jwks_file, rules)
        verifiers.append(tokens)
        files.append(tokens.file)
    return verifiers, files


def _certificates(settings: SecuritySettings, role: Role) -> ProcessCertificates | None:
    certificate, key, authorities = settings.tls_cert, settings.tls_key, settings.tls_ca
    if certificate is None and key is None and authorities is None:
        return None
    if certificate is None or key is None or authorities is None:
        raise ConfigError("--tls-cert, --tls-key and --tls-ca go together: give all three or none")
    return ProcessCertificates.read(certificate, key, authorities, settings.trust_domain, role)


def _check_local_clients(settings: SecuritySettings) -> None:
    if settings.tls_ca is None:
        raise ConfigError(
            "--local-clients needs certificates for the processes of the cluster: give --tls-folder, or --tls-cert, "
            "--tls-key and --tls-ca"
        )
    if settings.takes_keys:
        raise ConfigError(
            "--local-clients lets clients in without a key, and --keys-file and --jwks-file ask for one: leave one out"
        )
