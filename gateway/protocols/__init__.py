"""Serves the protocols of other projects."""
