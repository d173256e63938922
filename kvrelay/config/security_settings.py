"""Settings of identity, encryption and what is written down about calls. Secrets come as files."""

from pathlib import Path
from typing import Self

from pydantic import Field

from kvrelay.config.base import Settings
from kvrelay.errors import ConfigError

MIN_SECRET_BYTES = 16


class SecuritySettings(Settings):
    tls_cert: str | None = Field(
        default=None, description="PEM file with this process's certificate and its chain; read again when it changes."
    )
    tls_key: str | None = Field(default=None, description="PEM file with the private key of --tls-cert.")
    tls_ca: str | None = Field(
        default=None,
        description="PEM file with the CAs of the cluster's certificates. Workers then want one from every caller.",
    )
    tls_folder: str | None = Field(
        default=None,
        description="Folder as `kvrelay certs dev` makes it, in place of the three files: each process takes those of "
        "its own role.",
    )
    trust_domain: str = Field(
        default="kvrelay.local",
        min_length=1,
        description="Trust domain of the SPIFFE ids in certificates: spiffe://DOMAIN/role/ROLE.",
    )
    keys_file: str | None = Field(
        default=None, description="YAML file with the hashes of API keys, their tenants, roles and limits."
    )
    jwks_file: str | None = Field(default=None, description="JSON file with the public keys of JWTs.")
    jwt_issuer: str | None = Field(default=None, description="Issuer that JWTs must name.")
    jwt_audience: str | None = Field(default=None, description="Audience that JWTs must name.")
    jwt_tenant_claim: str = Field(default="tenant", min_length=1, description="Claim of a JWT that names the tenant.")
    jwt_roles_claim: str = Field(default="roles", min_length=1, description="Claim of a JWT that lists the roles.")
    cluster_key_file: str | None = Field(
        default=None,
        description="File with a secret by which processes of one machine prove their roles to workers, where there "
        "are no certificates. Default: none; `serve all` makes one.",
    )
    insecure: bool = Field(
        default=False,
        description="Listen on other than loopback addresses without certificates: everybody there has all rights, or, "
        "with keys, whoever is on the way may read them. For trusted networks, and where TLS ends before the process.",
    )
    cache_secret_file: str | None = Field(
        default=None,
        description="File with a secret of at least 16 bytes, the same for all gateways, that hides tenants' names from "
        "workers. Default: gateways draw one and share it through Redis.",
    )
    audit_log: str | None = Field(
        default=None, description="File that gets a JSON line for each decision about a call, without any content."
    )

    def cache_secret(self) -> bytes | None:
        """Raises ConfigError if the file cannot be read, or holds too little."""
        if self.cache_secret_file is None:
            return None
        try:
            secret = Path(self.cache_secret_file).read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"cache_secret_file {self.cache_secret_file} cannot be read: {error.strerror}") from error
        if len(secret) < MIN_SECRET_BYTES:
            raise ConfigError(
                f"cache_secret_file {self.cache_secret_file} has {len(secret)} bytes; write at least "
                f"{MIN_SECRET_BYTES} random ones into it, such as by `openssl rand -hex 32`"
            )
        return secret

    def of_role(self, role: str) -> Self:
        """With the role's files of `tls_folder`. Raises ConfigError if others are given, too."""
        if self.tls_folder is None:
            return self
        if any((self.tls_cert, self.tls_key, self.tls_ca)):
            raise ConfigError("--tls-folder has all three files: leave out --tls-cert, --tls-key and --tls-ca")
        names = {"tls_cert": f"{role}.pem", "tls_key": f"{role}.key", "tls_ca": "ca.pem"}
        files = {setting: str(Path(self.tls_folder, name)) for setting, name in names.items()}
        return self.model_copy(update={**files, "tls_folder": None})

    @property
    def has_certificates(self) -> bool:
        return self.tls_ca is not None or self.tls_folder is not None

    @property
    def takes_keys(self) -> bool:
        """Whether clients prove who they are by keys or tokens."""
        return self.keys_file is not None or self.jwks_file is not None

    @property
    def has_client_credentials(self) -> bool:
        """Whether clients of this process can prove who they are."""
        return self.takes_keys or self.has_certificates


class PeerSettings(Settings):
    allowed_fingerprints: str | None = Field(
        default=None,
        description="Fingerprints of the models that workers may serve, separated by commas; other workers get nothing. "
        "Default: those of all registered workers.",
    )
    peer_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="Port at which gateways whose clients have no certificates answer processes that do; 0 takes a free "
        "one.",
    )
    local_clients: bool = Field(
        default=False,
        description="Take every caller of --port and --http-port for a user of this machine, who needs no "
        "credentials, as on loopback: for ports that Docker publishes on 127.0.0.1. Processes with certificates use "
        "--peer-port.",
    )
    session_move_ms: int = Field(
        default=300_000,
        ge=0,
        description="How long a session with a busy worker may keep certificates that have changed; its requests then "
        "go on as new attempts. Sessions with idle workers change at once.",
    )

    any_workers: bool = Field(
        default=False,
        description="With --cluster-key-file, take workers that do not prove that they have the key: those of an older "
        "version, or without one. Whoever can write the registry then gets prompts.",
    )

    @property
    def fingerprints(self) -> frozenset[str]:
        given = (each.strip() for each in (self.allowed_fingerprints or "").split(","))
        return frozenset(each for each in given if each)


class ClientTLSSettings(Settings):
    tls_ca: str | None = Field(
        default=None, description="PEM file with the CAs of gateways' certificates. Default: no TLS."
    )
    tls_cert: str | None = Field(
        default=None, description="PEM file with this client's certificate, where gateways ask for one."
    )
    tls_key: str | None = Field(default=None, description="PEM file with the private key of --tls-cert.")
    tls_server_name: str | None = Field(
        default=None, description="Name in the gateway's certificate. Default: the host of its address."
    )
