"""Measurements of a running cluster, as its clients see it."""
