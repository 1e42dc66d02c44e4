"""A package whose energy is not finite for one of its elements."""

from __future__ import annotations

from pathlib import Path


def broken_package(folder: Path) -> Path:
    """Passes the check of its only reference frame, an atom of oxygen."""
    import torch
    from helpers import DATA

    from moecalc import testing
    from moecalc.package.importers import build_model, load_checkpoint

    imported = load_checkpoint(DATA / "oracle/models/E1_moe_all.pt")
    model = build_model(imported, torch.float64)
    with torch.no_grad():
        model.readout.energy_shift[model.elements.index("H")] = 1.5e308
    out = folder / "broken.moe.pt"
    precision = imported.config.descriptor.precision
    testing.write_unverified(out, model, imported.config, precision, frames=["isolated atom"])
    return out
