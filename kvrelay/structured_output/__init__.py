"""Compiles response formats to grammars, and follows them token by token."""
