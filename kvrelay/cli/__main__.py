"""`python -m kvrelay.cli`, the same as the console script `kvrelay`."""

from kvrelay.cli import main

if __name__ == "__main__":
    main()
