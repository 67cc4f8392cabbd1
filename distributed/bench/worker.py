"""Runs one workload in this process: `python -m distributed.bench.worker MODULE:FUNCTION JSON_ARGUMENTS`.

Rank 0 prints one JSON line: the clock's readings and the peak memory in MiB, which on CUDA is the device's (torch's count)
and otherwise the process's. All processes share CLOCK_MONOTONIC, so the parent can compare the readings with its own clock.
If the function returns figures, every rank prints them in a line of its own.
"""

import json
import pkgutil
import resource
import sys

from distributed.bench.measure import StepClock


def main() -> None:
    from distributed.topology import Topology

    arguments = json.loads(sys.argv[2])
    clock = StepClock(**arguments["clock"])
    figures = pkgutil.resolve_name(sys.argv[1])(clock, **arguments["settings"])
    if figures:
        # One write: lines of several ranks would mix otherwise.
        sys.stdout.write(f"\nFIGURES {json.dumps(figures)}\n")
        sys.stdout.flush()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if clock.device == "cuda":
        import torch

        memory = torch.cuda.max_memory_allocated() / 2**20
    if Topology.from_environment().is_main:
        print("CLOCK", json.dumps([clock.readings, memory]), flush=True)


if __name__ == "__main__":
    main()
