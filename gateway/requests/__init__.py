"""Requests of clients, from message to end."""
