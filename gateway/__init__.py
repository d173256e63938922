"""The gateway: all that clients see. Validates, tokenizes, admits, routes, streams; computes
nothing itself.
"""
