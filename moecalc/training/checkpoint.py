"""State of a fit in a file, to go on from."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from moecalc.errors import MoecalcError
from moecalc.files import CHECKPOINT, describe, load_failure, to_bytes, write_bytes

_BEGIN_ANEW = "put back a copy of it, or remove it to begin anew"


@dataclass
class Checkpoint:
    """All that a fit needs to go on as if it had never stopped.

    Attributes:
        step: how many steps are done.
        model: state dict of the model.
        averaged: running average of the parameters, in their order.
        optimizer: state dict of the optimizer.
        rng: state of NumPy's generator.
        queue: indices of the frames that are left of this epoch.
        config: the architecture, as JSON has it.
        options: the settings, as JSON has them.
        seconds: how long the steps have taken in all.
    """

    step: int
    model: dict[str, Any]
    averaged: list[Tensor]
    optimizer: dict[str, Any]
    rng: dict[str, Any]
    queue: list[int]
    config: dict[str, Any]
    options: dict[str, Any]
    seconds: float = 0.0

    def write(self, path: Path) -> None:
        """Write to a file, in one go."""
        write_bytes(path, to_bytes(vars(self)))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file of `write`. Only tensors and plain containers are unpickled: the file cannot run code.

        Raises:
            MoecalcError: not such a file.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about pickles of others
                state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - torch raises whatever a damaged file leads it to
            what = describe(path)
            reason = what if what is not None and what != CHECKPOINT else load_failure(error)
            raise MoecalcError(f"{path}: not the state of a fit ({reason}): {_BEGIN_ANEW}") from None
        with refusing_damage(path):
            known = {field.name for field in fields(cls) if field.default is MISSING or field.name in state}
            return cls(**{name: state[name] for name in known})


@contextmanager
def refusing_damage(path: Path) -> Iterator[None]:
    """Turn what a file of another content leads to into one line.

    Raises:
        MoecalcError: names the file and the reason.
    """
    try:
        yield
    except MoecalcError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MoecalcError(
            f"{path}: not the state of a fit ({type(error).__name__}: {reason}): {_BEGIN_ANEW}"
        ) from None
