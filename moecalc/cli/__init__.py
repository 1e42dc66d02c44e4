"""The command `moecalc`: make packages, look at them, verify and time them, find out what does not work.

Results go to standard output, progress and errors to standard error. Exit codes: 0 success, 1 a check failed,
2 an error, which is one line.

One file per family of commands; `main.py` lists them. Torch, matplotlib and what a command computes with are
imported when it runs: `moecalc --help` imports none of them.
"""

from moecalc.cli.main import app

__all__ = ["app"]
