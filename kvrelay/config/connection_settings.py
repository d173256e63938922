"""Settings of what one client's connection may take from a gateway."""

from pydantic import Field

from kvrelay.config.base import Settings
from kvrelay.network.connection_limits import ConnectionLimits

BYTES_PER_KIB = 1024
LEAST_STREAMS = 300


class ConnectionSettings(Settings):
    max_message_kib: int = Field(
        default=1024, ge=64, le=8192, description="Largest message of a client, in KiB. Answers may be larger."
    )
    max_streams_per_connection: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="Most calls at once on one connection; a client lets more wait. "
        f"Default: {LEAST_STREAMS}, or --max-running-requests if that is more.",
    )
    max_connections: int = Field(
        default=1024, ge=1, le=1_000_000, description="Most connections of clients at once; more are closed."
    )

    def limits(self, max_running_requests: int) -> ConnectionLimits:
        return ConnectionLimits(
            self.max_message_kib * BYTES_PER_KIB,
            self.max_streams_per_connection or max(LEAST_STREAMS, max_running_requests),
            self.max_connections,
        )
