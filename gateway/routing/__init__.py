"""Picks workers for a job. Pure."""
