"""Request state and memberships in Redis."""
