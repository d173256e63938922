"""kvrelay serves a causal language model with its prefill and decode phases in separate workers."""

__version__ = "0.1.0"
