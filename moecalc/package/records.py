"""Names of the records that a package has beside its scripted model.

In the archive they stand in `model/extra/`. C++ leaves out the top folder and calls them `extra/NAME`.
"""

from typing import Final

FORMAT: Final = "format_version"
METADATA: Final = "metadata.json"
REFERENCE: Final = "reference.json"
VERIFICATION: Final = "verification.json"
ARCHITECTURE: Final = "architecture.json"
TENSORS: Final = "tensors.json"

OF_MODEL: Final = (ARCHITECTURE, TENSORS)
"""What the core computes from; the digest covers them."""


def archived(name: str) -> str:
    """Full name in the archive."""
    return f"model/extra/{name}"
