"""The gateway as an engine for smg and its like: VllmEngine over the same request lifecycle as InferenceService."""
