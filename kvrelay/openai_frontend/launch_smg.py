"""Runs smg in this process. Arguments with secrets come on standard input, one a line: other users
see command lines.
"""

import sys


def main() -> None:
    from smg.cli import main as run_smg

    run_smg([*sys.argv[1:], *sys.stdin.read().splitlines()])


if __name__ == "__main__":
    main()
