"""Work in processes of their own: what it takes in memory, or does to the process, is its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from moecalc.benchmark.hardware import Ceilings
from moecalc.benchmark.results import Case, Result
from moecalc.errors import MoecalcError

_CEILINGS: Final = (
    "import sys; from moecalc.benchmark import ceilings; "
    "print(ceilings(sys.argv[1], int(sys.argv[2])).model_dump_json())"
)


class ProcessError(MoecalcError):
    """A process that failed; the message is the last line that it wrote."""


def run_isolated(case: Case) -> Result:
    """`measure` in a process of its own.

    Raises:
        ProcessError: the process failed.
    """
    # as JSON, whose ASCII passes any locale
    command = [sys.executable, "-P", "-m", "moecalc.benchmark", json.dumps(case.model_dump())]
    return Result.model_validate(answer_of(command, _with_threads(case.threads)))


def isolated_ceilings(dtype: str, threads: int, environment: Mapping[str, str] | None = None) -> Ceilings:
    """`ceilings` in a process of its own: the threads of NumPy's products are set when it is imported.

    Args:
        dtype: "float32" or "float64".
        threads: of products and copies.
        environment: of the process; None: this one's, with as many threads.

    Raises:
        ProcessError: the process failed.
    """
    command = [sys.executable, "-P", "-c", _CEILINGS, dtype, str(threads)]
    return Ceilings.model_validate(answer_of(command, environment or _with_threads(threads)))


def _with_threads(threads: int | None) -> dict[str, str]:
    return os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})


def answer_of(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    folder: Path | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """The JSON object that a program writes as its last line.

    Args:
        command: program and arguments.
        environment: None: this one's.
        folder: to run in; None: this one's.
        seconds: that it may take; None: as long as it wants.

    Raises:
        ProcessError: it failed, or took longer.
    """
    try:
        done = subprocess.run(  # noqa: S603 - a command of the caller
            command, capture_output=True, text=True, check=False, env=environment, cwd=folder, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise ProcessError(f"no end after {seconds:.0f} s") from None
    if done.returncode:
        code = f"the process ended with code {done.returncode} (out of memory?)"
        raise ProcessError(last_line(done.stderr) or last_line(done.stdout) or code)
    answer: dict[str, Any] = json.loads(last_line(done.stdout))
    return answer


def last_line(text: str) -> str:
    """What a program wrote last, empty if nothing."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


class Worker:
    """A program that answers every line that it gets with a JSON object.

    Attributes:
        about: what it answered when it was ready, before the first line.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> None:
        self._command = command
        self._process = subprocess.Popen(  # noqa: S603 - a command of the caller
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment
        )
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.end()
            raise ProcessError(f"{self._command[0]} ended with code {self._process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, line: str = "") -> dict[str, Any]:
        """The answer to a line.

        Raises:
            ProcessError: the program has ended.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """Let the program end, and wait for it."""
        with self._process:  # closes its input and output
            pass
