"""The prefill worker's pure scheduler."""
