"""Memory of this process.

Nothing but the standard library is used: programs without moecalc run this file by its path.
"""

from __future__ import annotations

from pathlib import Path


def memory(field: str) -> float | None:
    """`VmRSS` (resident now) or `VmHWM` (its peak), MB of 1e6 bytes; None where the system does not tell."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    return None


def reset_peak() -> None:
    """Forget the peak memory so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return
