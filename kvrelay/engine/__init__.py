"""Everything that imports torch: models, the paged KV pool, sampling."""
