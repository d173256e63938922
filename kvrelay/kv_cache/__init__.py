"""Who holds which block of the KV pool. Knows nothing of tensors, of the wire or of requests."""
