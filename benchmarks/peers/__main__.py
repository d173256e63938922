"""`python -m benchmarks.peers`, as `kvrelay bench peers`."""

import typer

from benchmarks.peers.comparison import command

typer.run(command)
