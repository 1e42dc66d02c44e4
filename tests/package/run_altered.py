"""Loads packages in a process of its own and says what became of each: `python run_altered.py FILE ...`.

One line of JSON per file: {"file", "outcome": "refused" | "answered" | "odd", "message", "energies", "forces"}. A file whose
line is missing ended the process.
"""

import json
import sys
import warnings

from moecalc import MoECalculator, testing
from moecalc.errors import MoecalcError


def structures():
    """What an accepted package is asked for: dense and sparse, with all elements."""
    elements = ["Nb", "Mo", "Ta", "W"]
    return [testing.bulk_alloy(elements), testing.molecule(elements), testing.slab(elements)]


def outcome(path):
    try:
        calculator = MoECalculator(path, device="cpu", allow_untrained=True)
        results = calculator.calculate_batch(structures(), ["energy", "forces"])
    except MoecalcError as error:
        return {"outcome": "refused", "message": str(error)}
    except Exception as error:  # noqa: BLE001 - what is not ours is what we look for
        return {"outcome": "odd", "message": f"{type(error).__name__}: {error}"}
    return {
        "outcome": "answered",
        "energies": [r["energy"] for r in results],
        "forces": [r["forces"].ravel().tolist() for r in results],
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for path in sys.argv[1:]:
        sys.stdout.write(json.dumps({"file": path, **outcome(path)}) + "\n")
        sys.stdout.flush()
