"""The way of a KV cache between workers."""
