"""Entry point of group `deepmd.pt`: DeePMD-kit's PyTorch backend imports it.

That registers the descriptor `dpa3_moe`.
"""

import logging
from importlib.metadata import version

SUPPORTED = "3.2"
_found = version("deepmd-kit")

if _found.split(".")[:2] == SUPPORTED.split("."):
    import moecalc.deepmd.arguments
    import moecalc.deepmd.descriptor  # noqa: F401
else:
    # DeePMD-kit must keep working for everything else
    logging.getLogger(__name__).warning(
        "moecalc: descriptor dpa3_moe needs deepmd-kit %s, found %s, and is not available: "
        "`pip install '.[deepmd]'` in the folder of moecalc's sources",
        SUPPORTED,
        _found,
    )
