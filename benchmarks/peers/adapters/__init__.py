"""One program per engine. Each runs in its peer's environment: here only the standard library and
that engine may be imported.
"""
