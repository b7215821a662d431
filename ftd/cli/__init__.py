"""The command line: one module for each group of commands, `entry` puts them together.

`ftd run` becomes the program that is installed now when `ftd upgrade` asks it to: ftd/succession.py.

Exit codes are those of ftd/errors.py; besides them 0 for success, 1 for `verify` that found differences, 2
for a wrong command line (argparse's, the same as a wrong configuration), 130 after Ctrl-C and 143 after
SIGTERM. For `ftd run` both signals are a planned stop, and end with 0.

No traceback reaches the operator unless --debug is given: an error is one line on standard error.
"""

from ftd.cli.entry import main

__all__ = ["main"]
