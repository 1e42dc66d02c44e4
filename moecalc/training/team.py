"""Processes that share the steps of a fit: each has the gradient of its own batch, all take their mean."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Final

import torch
from torch import Tensor

from moecalc.errors import MoecalcError

_START: Final = "spawn"  # a fork would not have the threads that torch and the kernels keep
_SECONDS_TO_END: Final = 10.0


class Alone:
    """A process that shares its steps with no other."""

    rank = 0
    size = 1

    def average(self, parameters: Sequence[Tensor]) -> None:
        """Put the mean of the processes' gradients into `grad` of the parameters."""

    def of_first(self, value: Any) -> Any:
        """The value that the first process has."""
        return value


class Team(Alone):
    """One of several processes. Each knows at once when another is gone.

    Args:
        rank: of this process; the first is 0.
        others: to every other process for the first, to the first for any other.
        sums: (size, parameters) gradients, shared by the processes.
    """

    def __init__(self, rank: int, others: list[Connection], sums: Tensor) -> None:
        self.rank = rank
        self.size = len(sums)
        self._others = others
        self._sums = sums

    def average(self, parameters: Sequence[Tensor]) -> None:
        """Put the mean of the processes' gradients into `grad` of the parameters."""
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        torch.cat([gradient.reshape(-1) for gradient in own], out=self._sums[self.rank])
        self._gather()
        if self.rank == 0:
            # in the order of the processes: the same sum, to the last bit, in every run
            self._sums[0] = self._sums.mean(0)
        self.of_first(None)
        begin = 0
        for parameter, gradient in zip(parameters, own, strict=True):
            end = begin + gradient.numel()
            parameter.grad = self._sums[0, begin:end].reshape(gradient.shape).clone()
            begin = end
        self._gather()  # nobody writes before all have read

    def of_first(self, value: Any) -> Any:
        """The value that the first process has."""
        with _refusing_the_gone(self.rank):
            if self.rank > 0:
                return self._others[0].recv()
            for other in self._others:
                other.send(value)
        return value

    def _gather(self) -> None:
        """Wait until all have come here; the first may be ahead of none."""
        with _refusing_the_gone(self.rank):
            if self.rank > 0:
                self._others[0].send(None)
                return
            for other in self._others:
                other.recv()


@contextmanager
def _refusing_the_gone(rank: int) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        if rank > 0:
            raise SystemExit from None  # the first has ended, and says why
        raise MoecalcError(
            "a process of the fit has ended; what it printed is above. Go on from the state that was saved "
            "last with the same command"
        ) from None


@contextmanager
def team(
    size: int, parameters: Sequence[Tensor], work: Callable[..., None], *arguments: Any
) -> Iterator[Alone]:
    """Processes that run `work(team, *arguments)` beside this one, which is the first, inside a `with` block.

    Args:
        size: number of processes, with this one.
        parameters: whose gradients they average.
        work: a function of a module; it returns when the first process says so.
        arguments: what can be pickled.
    """
    if size == 1:
        yield Alone()
        return
    context = multiprocessing.get_context(_START)
    n = sum(parameter.numel() for parameter in parameters)
    sums = torch.zeros(size, n, dtype=parameters[0].dtype).share_memory_()
    ends, processes = [], []
    try:
        for rank in range(1, size):
            here, there = context.Pipe()
            ends.append(here)
            process = context.Process(target=_work, args=(rank, there, sums, work, arguments), daemon=True)
            process.start()
            there.close()
            processes.append(process)
        yield Team(0, ends, sums)
    finally:
        for end in ends:
            end.close()
        for process in processes:
            process.join(_SECONDS_TO_END)
            if process.is_alive():
                process.terminate()
                process.join()


def _work(rank: int, first: Connection, sums: Tensor, work: Callable[..., None], arguments: Any) -> None:
    with suppress(KeyboardInterrupt):  # the first one reports it
        work(Team(rank, [first], sums), *arguments)
