"""The prefill worker: runs prompts and ships their KV cache."""
