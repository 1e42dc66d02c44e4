"""Which frames of a fit train, which decide, and which do neither."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ase import Atoms
from ase.io import write

from moecalc.data.frames import split_frames
from moecalc.errors import MoecalcError
from moecalc.files import make_folder, write_bytes, write_text

SPLIT = "split.json"
TEST = "test.extxyz"


@dataclass(frozen=True)
class Split:
    """Indices of the frames of a source, ascending.

    Attributes:
        train: the fit takes its steps with them.
        valid: their errors are in the log, and may decide on settings.
        test: neither. They are for one report, when all is decided.
    """

    train: list[int]
    valid: list[int]
    test: list[int]


def draw(frames: Sequence[Atoms], validation: float, test: float, seed: int) -> Split:
    """Draw first the test frames and then, of the others, those for validation; each as `split_frames` does.

    Args:
        frames: with forces and groups.
        validation, test: shares of every group.
        seed: of both draws.
    """
    tested = split_frames(frames, test, seed)
    chosen = set(tested)
    rest = [k for k in range(len(frames)) if k not in chosen]
    valid = [rest[k] for k in split_frames([frames[k] for k in rest], validation, seed)]
    held_out = chosen | set(valid)
    return Split([k for k in range(len(frames)) if k not in held_out], valid, tested)


def keep(folder: Path, split: Split, frames: Sequence[Atoms]) -> None:
    """Write `split.json` and the test frames, or check that an earlier call tested with the same ones.

    Raises:
        MoecalcError: the fit in the folder has other test frames, of which it may have seen these; the folder
            cannot be made.
    """
    path = folder / SPLIT
    if path.exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))["test"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MoecalcError(f"{path}: expected what an earlier call wrote ({error})") from None
        if earlier != split.test:
            raise MoecalcError(
                f"{path}: the fit in this folder keeps {len(earlier)} other frames for the test than these "
                f"{len(split.test)}: give the same frames, --test and seed, or another folder"
            )
        return
    if (folder / "state.pt").exists() and split.test:
        raise MoecalcError(
            f"{folder} has a fit that may have seen the frames for the test: give --test at its first call, "
            "or another folder"
        )
    make_folder(folder)
    if split.test:
        text = io.StringIO()
        write(text, [frames[k] for k in split.test], format="extxyz")
        write_bytes(folder / TEST, text.getvalue().encode("utf-8", errors="surrogateescape"))
    write_text(path, json.dumps(asdict(split)) + "\n")
