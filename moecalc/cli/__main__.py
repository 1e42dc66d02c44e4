"""`python -m moecalc.cli`: the same as the command `moecalc`."""

from moecalc.cli.main import app

app()
