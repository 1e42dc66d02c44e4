"""What not every user of moecalc has installed."""

from __future__ import annotations

import sys

from moecalc import _install
from moecalc.errors import MoecalcError


def need_torch(what: str = "this command") -> None:
    """Import torch, which packaging, verification and training need and a run does not.

    Args:
        what: needs it, for the message.

    Raises:
        MoecalcError: it is not installed, does not import, is too old, or does not support this Python; one
            line with the remedy.
    """
    python = (sys.version_info.major, sys.version_info.minor)
    if python > _install.NEWEST_PYTHON_PACKAGING:
        newest = _install.dotted(_install.NEWEST_PYTHON_PACKAGING)
        raise MoecalcError(
            f"{what} needs Python {newest} or older, got Python {_install.dotted(python)}, "
            f"where torch does not support TorchScript: use an environment of Python {newest}; "
            "its packages run here"
        )
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise MoecalcError(
                f"{what} needs torch, which does not import ({error}): {_install.REPAIR_TORCH}"
            ) from error
        raise MoecalcError(f"{what} needs torch: {_remedy()}") from None
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise MoecalcError(
            f"{what} needs torch, which does not import ({reason}): {_install.REPAIR_TORCH}"
        ) from error
    if _install.minor(torch.__version__) < _install.OLDEST_TORCH:
        oldest = _install.dotted(_install.OLDEST_TORCH)
        raise MoecalcError(
            f"{what} needs torch {oldest} or newer, got torch {torch.__version__}: {_install.INSTALL_TORCH}"
        )


def _remedy() -> str:
    return _install.INSTALL_PACKAGING
