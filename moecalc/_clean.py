"""Keeps what a program has set for its own use of torch out of the work of moecalc."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch

from moecalc._torch_lib import load_torch_library


@contextmanager
def clean_torch() -> Iterator[None]:
    """Context, or decorator, in which torch is as at the start of a program.

    On this thread: gradients, no inference mode, no autocast, no modes (default device, ...), no transforms
    of torch.func, default arithmetic (`cpp/backends/torchscript/clean_state.h`). In the process, for as long
    as it lasts: float32 as default dtype.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(load_torch_library().CleanState())
        except ImportError:
            _clean_by_python(stack)
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


def _clean_by_python(stack: ExitStack) -> None:
    """Without the library that is linked to torch: as far as Python can."""
    _leave_modes(stack)
    for context in (torch.inference_mode(False), torch.enable_grad(), torch.device("cpu")):
        stack.enter_context(context)
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        stack.enter_context(torch.autocast(kind, enabled=False))
    with suppress(
        RuntimeError
    ):  # set for each library by its own name, which the common setting refuses to read
        precision = torch.get_float32_matmul_precision()
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, precision)
    if sys.float_info.min / 2 == 0.0:  # there is no other way to ask
        torch.set_flush_denormal(False)
        stack.callback(torch.set_flush_denormal, True)


def _leave_modes(stack: ExitStack) -> None:
    """Leave transforms and dispatch modes of the program.

    torch has no public way: a version without these functions keeps them.
    """
    with suppress(ImportError):
        from torch._C._functorch import peek_interpreter_stack

        if peek_interpreter_stack() is not None:
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            stack.enter_context(temporarily_clear_interpreter_stack())
    with suppress(ImportError):
        from torch._C import _len_torch_dispatch_stack

        if _len_torch_dispatch_stack() > 0:
            from torch.utils._python_dispatch import _disable_current_modes

            stack.enter_context(_disable_current_modes())
