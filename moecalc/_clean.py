"""Keeps what a program has set for its own use of torch out of the work of moecalc."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from moecalc._lib import load


@contextmanager
def clean_torch() -> Iterator[None]:
    """Context, or decorator, in which torch is as at the start of a program.

    On this thread: gradients, no inference mode, no autocast, no modes (default device, ...), no transforms of torch.func, default
    arithmetic (`cpp/include/moecalc/clean_state.h`). In the process, for as long as it lasts: float32 as default dtype.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(load().CleanState())
        except ImportError:
            # what works without the native library (checkpoints, upcycling) gets what Python can set
            for context in (torch.inference_mode(False), torch.enable_grad(), torch.device("cpu")):
                stack.enter_context(context)
            for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
                stack.enter_context(torch.autocast(kind, enabled=False))
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield
