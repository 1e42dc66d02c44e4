"""The command `moecalc` in the process of a test."""

from typer.testing import CliRunner

from moecalc.cli import app

PROGRESS = ("reading:", "packaging:", "verifying:", "drawing:", "upgrading:")


def run(*arguments):
    """Result of a command in a terminal of 120 columns."""
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(a) for a in arguments])


def error_of(result):
    """The one line that a failed command printed."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith(PROGRESS)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")
