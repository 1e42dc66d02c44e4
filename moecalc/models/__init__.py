"""The packages that come with moecalc.

The file `default` in this folder names the one that is used when no model is named, `metals10` for
metals10.moe.pt. Both engines read it: `default_model_path` here, and pair_style moe where an input has
`pair_coeff * * default`.
"""

from pathlib import Path
from typing import Final

from moecalc.errors import PackageError

FOLDER: Final = Path(__file__).parent


def default_model_path(folder: Path = FOLDER) -> Path:
    """Path of the package that is used when no model is named.

    Args:
        folder: of the packages and the file `default`.

    Raises:
        PackageError: the installation lacks it.
    """
    choice = folder / "default"
    try:
        name = choice.read_text(encoding="utf-8").strip()
    except OSError:
        raise PackageError(_missing(choice, "the name of the default model")) from None
    path = folder / f"{name}.moe.pt"
    if not path.is_file():
        raise PackageError(_missing(path, "the default model"))
    return path


def _missing(path: Path, what: str) -> str:
    return (
        f"{path}: no such file, expected {what} here: install moecalc again, or name a package of your own "
        "(model=...)"
    )
