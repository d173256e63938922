"""Metrics: `families` counts, `exposition` serves them for Prometheus."""
