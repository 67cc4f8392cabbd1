"""`distributed.train`, in which a save needs a few seconds more, as on a slow file system.

python -m kit.slow_save [arguments of distributed.train]
"""

import time
from pathlib import Path

from distributed import train
from distributed.process.streams import run_command
from distributed.run.claim import ClaimedRun

_SECONDS = 4.0
_commit = ClaimedRun.commit


def _slow_commit(self: ClaimedRun, temporary: Path, path: Path) -> None:
    time.sleep(_SECONDS)
    _commit(self, temporary, path)


if __name__ == "__main__":
    ClaimedRun.commit = _slow_commit  # type: ignore[method-assign]
    run_command(train.main, skip_cleanup=True)
