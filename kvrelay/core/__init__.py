"""Values and rules that all processes share: no network, no clock, no tensors."""
