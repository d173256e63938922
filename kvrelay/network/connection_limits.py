"""Bounds of a gRPC server's connections, as gRPC's options.

`max_pending_requests` counts calls that no handler has taken yet, of all connections. Above it gRPC
cancels also the calls of others.
"""

from dataclasses import dataclass

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
"""Of sessions and pushes."""
IDLE_TIMEOUT_MS = 300_000
HANDSHAKE_TIMEOUT_MS = 10_000
MAX_PENDING_REQUESTS = 20_000
PENDING_HARD_LIMIT = 2 * MAX_PENDING_REQUESTS
"""gRPC cancels a rising share of new calls between both."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_streams: int = 1000
    """Of one connection. A client lets further calls wait."""
    max_connections: int = 1024
    idle_timeout_ms: int = IDLE_TIMEOUT_MS
    handshake_timeout_ms: int = HANDSHAKE_TIMEOUT_MS

    @property
    def options(self) -> tuple[tuple[str, int], ...]:
        return (
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_concurrent_streams", self.max_streams),
            # Else gRPC refuses calls of a client that has as many as it may, while their ends are
            # under way: of 600 calls at once on one connection, 295 got UNAVAILABLE.
            ("grpc.http.overload_protection", 0),
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.max_connection_idle_ms", self.idle_timeout_ms),
            ("grpc.server_handshake_timeout_ms", self.handshake_timeout_ms),
            ("grpc.server.max_pending_requests", MAX_PENDING_REQUESTS),
            ("grpc.server.max_pending_requests_hard_limit", PENDING_HARD_LIMIT),
        )
