"""The command line. Each command is a function in the module of its subject; `app` puts them together."""

from kvrelay.cli.app import main

__all__ = ["main"]
