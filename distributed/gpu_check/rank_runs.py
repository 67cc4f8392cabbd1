"""Trains one run after another with the recipe, on each rank of a group: `rank_runs DEVICE FILE`.

FILE is a JSON list with the arguments of `distributed.train` for each run. After a failed run the next ones still start.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from distributed.comm.process_group import choose_device, process_group
from distributed.config import from_command_line
from distributed.process import logs
from distributed.recipe import train
from distributed.topology import Topology


def main() -> int:
    """Return 0 if all runs finished, else 1."""
    device_name, file = sys.argv[1:]
    topology = Topology.from_environment()
    logs.terminal_logs(topology.rank, level="WARNING")
    failures = 0
    with process_group(topology, choose_device(device_name, topology), timeout_seconds=30):
        for arguments in json.loads(Path(file).read_text()):
            try:
                train(from_command_line(arguments).config)
            except Exception:
                failures += 1
                print("failed:", *arguments, flush=True)
                traceback.print_exc()
    return 1 if failures else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo threads that wait for a lost peer must not keep the process alive
