"""Everything that imports torch: loading models, running them over a paged KV pool, and sampling.

Knows nothing of requests, schedulers, the wire or time.
"""
