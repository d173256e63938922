"""Converts values and errors to messages and statuses, and back."""
