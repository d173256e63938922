"""Request state in Redis, and the gateways that share it."""
