"""Memory of this process."""

from pathlib import Path


def peak_mib() -> float:
    """Return the peak of this process's resident memory."""
    # Not getrusage's ru_maxrss, which a new program inherits from the process that started it.
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024
