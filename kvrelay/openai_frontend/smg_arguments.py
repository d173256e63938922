"""Which of smg's own options a user may give. Pure."""

import shlex

from kvrelay.errors import ConfigError

_OF_THE_FRONT = (
    *("host", "port", "worker-urls", "api-key", "max-payload-size", "prometheus-host", "prometheus-port"),
    *("tenant-api-key", "trust-tenant-header", "tenant-header-name", "cors-allowed-origins"),
    *("control-plane-api-keys", "jwt-issuer", "jwt-audience", "jwt-jwks-uri", "jwt-role-mapping"),
    *("request-id-headers", "storage-context-headers"),
    *("client-cert-path", "client-key-path", "ca-cert-paths", "tls-cert-path", "tls-key-path"),
)
_OPENS_PORTS_OR_ADDS_WORKERS = (
    *("enable-mesh", "mesh-server-name", "mesh-host", "mesh-advertise-host", "mesh-port", "mesh-peer-urls"),
    *("mesh-tls-ca-cert", "mesh-tls-cert", "mesh-tls-key", "enable-igw", "enable-rl", "rdma-listen-ip"),
    *("service-discovery", "discovery-provider", "discovery-file", "service-discovery-port"),
    *("pd-disaggregation", "epd-disaggregation", "prefill", "decode", "encode"),
    *("enable-wasm", "storage-hook-wasm-path", "mm-allow-private-media-hosts", "mm-allowed-media-domains"),
)
GUARDED = tuple(f"--{name}" for name in (*_OF_THE_FRONT, *_OPENS_PORTS_OR_ADDS_WORKERS))


SHOWS_ANSWERS = "--history-backend"
"""smg then shows a kept answer to every client that knows its id."""


def parse_arguments(text: str | None, *, has_tenants: bool = False) -> list[str]:
    """Raises ConfigError for options that kvrelay sets, or that open smg to others.

    smg takes abbreviations too, such as --api for --api-key.
    """
    try:
        arguments = shlex.split(text or "")
    except ValueError as error:
        raise ConfigError(f"openai_args is {text!r}: {error}; quote it as in a shell") from None
    for argument in arguments:
        name = argument.partition("=")[0]
        if has_tenants and name.startswith("--") and SHOWS_ANSWERS.startswith(name):
            raise ConfigError(
                f"openai_args has {name[:64]}, and clients have tenants, which would read each other's answers: "
                "leave it out, or give each tenant a front with --openai-api-key"
            )
        if name.startswith("-") and any(guarded.startswith(name) for guarded in GUARDED):
            raise ConfigError(
                f"openai_args has {name[:64]}, which kvrelay decides itself, because it guards smg: leave it out; "
                "`kvrelay serve openai --help` lists what can be set"
            )
    return arguments
