"""VllmEngine, smg's protocol, over the same requests as InferenceService."""
