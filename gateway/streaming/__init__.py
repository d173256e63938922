"""Turns tokens into frames for readers."""
