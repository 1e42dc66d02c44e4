"""Bars of long commands: with the time left in a terminal, and nothing or plain lines elsewhere."""

import sys

import pytest
from rich.console import Console

from moecalc.cli import console


@pytest.fixture
def terminal(monkeypatch):
    """Standard error is a terminal of 120 columns."""

    def make(**options):
        return Console(file=sys.stderr, force_terminal=True, width=120, **(options | {"stderr": False}))

    monkeypatch.setattr(console, "Console", make)


def test_a_terminal_shows_a_bar_with_the_time_left(terminal, capsys):
    with console.counted_progress("fitting") as say:
        say("training", 0, 40)
        say("training", 10, 40)
    shown = capsys.readouterr().err
    assert "fitting: training" in shown
    assert "10/40" in shown
    assert "left" in shown


def test_results_stay_on_standard_output_beside_a_bar(terminal, capsys):
    with console.counted_progress("fitting") as say:
        say("training", 1, 2)
        sys.stdout.write("a result\n")
    assert "a result" in capsys.readouterr().out


def test_elsewhere_there_is_a_line_per_step(capsys):
    with console.counted_progress("report") as say:
        for what, done in (("frames", 1), ("frames", 2), ("drawing", 0)):
            say(what, done, 2)
    assert capsys.readouterr().err == "report: frames\nreport: drawing\n"


def test_elsewhere_a_quiet_bar_shows_nothing(capsys):
    with console.counted_progress("md", lines=False) as say:
        say("nvt 300 K", 1, 2)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
