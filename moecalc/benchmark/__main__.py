"""One size, in the process that `run_isolated` starts.

The argument is a `Case`, the last line of output a `Result`, both as JSON.
"""

from __future__ import annotations

import json
import sys

from moecalc.benchmark.measure import measure
from moecalc.benchmark.results import Case
from moecalc.errors import MoecalcError


def main() -> int:
    """Measure; the exit code is 1 where that fails, and the last line of errors is the reason."""
    case = Case.model_validate_json(sys.argv[1])
    try:
        result = measure(case)
    except (MoecalcError, RuntimeError, MemoryError, ImportError) as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 1
    sys.stdout.write(json.dumps(result.model_dump()) + "\n")  # ASCII in any locale
    return 0


if __name__ == "__main__":
    sys.exit(main())
