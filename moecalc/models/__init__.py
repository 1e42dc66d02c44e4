"""The packages that come with moecalc."""

from pathlib import Path

from moecalc.errors import PackageError

DEFAULT_MODEL = "metals10"


def default_model_path() -> Path:
    """Path of the package that is used when no model is named.

    Raises:
        PackageError: the installation lacks it.
    """
    path = Path(__file__).with_name(f"{DEFAULT_MODEL}.moe.pt")
    if not path.is_file():
        raise PackageError(
            f"{path}: no such file, expected the default model here: install moecalc again, or name a package of your own (model=...)"
        )
    return path
