"""Garbage for everything that reads what others wrote: KV pushes, sessions, clients' calls, and
what lies in Redis.
"""
