"""How a KV cache travels between workers: its layout in messages, its digests and its transports."""
