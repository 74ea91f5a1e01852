"""Where the time goes between the start of a process and its first optimizer step."""

import os
import time
from pathlib import Path


class Startup:
    """Seconds of each phase of a start, the first of which begins with the process itself."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic() - _process_age_seconds()

    def mark(self, phase: str) -> None:
        """End a phase, which began when the one before ended."""
        now = time.monotonic()
        self.seconds[phase] = round(now - self._last, 3)
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"first step after {sum(self.seconds.values()):.1f} s ({parts})"


def _process_age_seconds() -> float:
    """Return how long this process lives; 0 where the kernel does not say."""
    try:
        started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
