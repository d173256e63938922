"""Finds, fetches and describes models on disk. Loads no weights."""
