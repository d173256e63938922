"""Requests that this gateway did not start."""
