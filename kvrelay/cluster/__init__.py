"""Starts a whole cluster on one machine."""
