"""Which sequence holds which block of the KV pool."""
