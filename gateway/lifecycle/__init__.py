"""Decides what happens to a request: events in, actions out. Pure."""
