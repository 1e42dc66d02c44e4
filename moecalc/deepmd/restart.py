"""`dp --pt train --restart` that continues as if it had never stopped.

DeePMD-kit 3.2.0 repeats the last finished step when it restarts, and draws its data from the beginning of the
random sequence again. For models with the descriptor `dpa3_moe` the trainer is prepared here before it runs:
random numbers start from the seed at the first step, and a restart skips the steps that are done, with the
batches that they used. What remains to ask for is `training.seed`.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

log = logging.getLogger("deepmd.moecalc")

_DESCRIPTOR_MODULE = "moecalc.deepmd.descriptor"
_TRAINER_MODULE = "deepmd.pt.train.training"


def install() -> None:
    """Prepare every trainer of this process before it runs.

    Does nothing where DeePMD-kit's trainer is not in use.
    """
    trainer = getattr(sys.modules.get(_TRAINER_MODULE), "Trainer", None)
    if trainer is None or hasattr(trainer.run, "prepared_by_moecalc"):
        return
    original = trainer.run

    @functools.wraps(original)
    def run(self: Any) -> None:
        if _applies(self):
            prepare(self)
        original(self)

    run.prepared_by_moecalc = True  # type: ignore[attr-defined]
    trainer.run = run


def _applies(trainer: Any) -> bool:
    """One model of ours, one process, the data loaders of NumPy systems, an optimizer with a scheduler."""
    if trainer.multi_task or trainer.is_distributed:
        ours = False
    else:
        ours = type(trainer.model.get_descriptor()).__module__ == _DESCRIPTOR_MODULE
    exact = ours and isinstance(trainer.training_dataloader, DataLoader) and hasattr(trainer, "scheduler")
    if trainer.restart_training and not exact:
        log.warning(
            "this restart repeats the last step and begins a new order of the data, as DeePMD-kit does by "
            "itself"
        )
    return exact


def _cycle(loader: Any) -> Iterator[Any]:
    while True:
        with torch.device("cpu"):
            batches = iter(loader)
        yield from batches


def prepare(trainer: Any) -> None:
    """Begin the random sequence of the data anew; on a restart go to the step after the last finished one."""
    torch.manual_seed(torch.initial_seed())
    for name in ("training", "validation"):
        loader = getattr(trainer, f"{name}_dataloader")
        if loader is None:
            continue
        with torch.device("cpu"):
            loader.dataset.iters = [iter(system) for system in loader.dataset.dataloaders]
        setattr(trainer, f"{name}_data", _cycle(loader))
    if not trainer.restart_training:
        return
    trainer.start_step += 1  # the checkpoint names the last step that was finished
    trainer.scheduler = trainer._create_lr_scheduler(  # noqa: SLF001
        trainer.optimizer, trainer.lr_schedule, trainer.start_step
    )
    log.info(
        "Going through the data of %d finished steps, so that training continues with what comes next.",
        trainer.start_step,
    )
    for step in range(1, trainer.start_step + 1):
        trainer._next_training_batch("Default")  # noqa: SLF001
        if trainer.display_in_training and (step % trainer.disp_freq == 0 or step == 1):
            for _ in range(trainer.valid_numb_batch):
                trainer.get_data(is_train=False, task_key="Default")
