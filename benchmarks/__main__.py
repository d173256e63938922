"""`make bench`: what `kvrelay bench serve` does, with the same options."""

import typer

from benchmarks.serve import command

if __name__ == "__main__":
    typer.run(command)
