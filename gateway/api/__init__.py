"""Serves generation and conversations of kvrelay's own protocol."""
